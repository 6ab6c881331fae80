"""jax_flash.linen: Flax's weights and numbers, dropout's rules, transformations, refusals."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import linen as nn

from jax_flash import linen

B, T, S, N, K, H, D = 2, 13, 7, 6, 2, 8, 20
TOLERANCE = dict(rtol=2e-5, atol=2e-6)  # float32, the same formula in another order


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def close(got, want, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **(TOLERANCE | tolerance)), got, want
    )


def jax_nn(qkv, **options):
    return jax.nn.dot_product_attention(*jnp.moveaxis(qkv, -3, 0), **options)


def flax_layer(**options):
    options = dict(num_heads=N, qkv_features=N * H, out_features=D + 3) | options
    return nn.MultiHeadDotProductAttention(**options)


def our_layer(**options):
    options = dict(num_heads=N, qkv_features=N * H, out_features=D + 3) | options
    return linen.MultiHeadAttention(**options)


# ---- weights move between Flax's layer and ours


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_bias": False},
        {"normalize_qk": True},
        {"qkv_features": None, "num_heads": 4, "out_features": None},
        {"dtype": jnp.bfloat16},
        {"param_dtype": jnp.bfloat16},
        {"bias_init": nn.initializers.normal(), "out_kernel_init": nn.initializers.normal()},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_parameters_and_outputs_equal_flax(options):
    theirs, ours = flax_layer(**options), our_layer(**options)
    x = normal(0, B, T, D)
    their_variables = theirs.init(jax.random.key(1), x)
    our_variables = ours.init(jax.random.key(1), x)
    assert jax.tree.structure(their_variables) == jax.tree.structure(our_variables)
    jax.tree.map(np.testing.assert_array_equal, our_variables, their_variables)
    half = jnp.bfloat16 in options.values()
    tolerance = dict(rtol=0.03, atol=0.03) if half else {}
    want = theirs.apply(their_variables, x).astype(jnp.float32)
    got = ours.apply(their_variables, x)
    assert got.dtype == theirs.apply(their_variables, x).dtype
    close(got.astype(jnp.float32), want, **tolerance)
    close(theirs.apply(our_variables, x).astype(jnp.float32), got.astype(jnp.float32), **tolerance)


def test_cross_attention_and_mask_equal_flax():
    theirs, ours = flax_layer(), our_layer()
    q, k, v = normal(0, B, T, D), normal(1, B, S, D + 1), normal(2, B, S, D + 2)
    variables = theirs.init(jax.random.key(3), q, k, v)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(3), q, k, v), variables)
    mask = jax.random.bernoulli(jax.random.key(4), 0.6, (B, N, T, S)).at[..., 0].set(True)
    for given in (None, mask, mask.astype(jnp.float32), mask[:, :1]):
        close(
            ours.apply(variables, q, k, v, mask=given), theirs.apply(variables, q, k, v, mask=given)
        )


def test_gradients_equal_flax():
    theirs, ours = flax_layer(), our_layer(is_causal=True)
    x = normal(0, B, T, D)
    variables = theirs.init(jax.random.key(1), x)
    mask = nn.make_causal_mask(jnp.ones((B, T)))

    def loss(apply, variables, x):
        return jnp.sum(jnp.sin(apply(variables, x)))

    want = jax.grad(loss, (1, 2))(functools.partial(theirs.apply, mask=mask), variables, x)
    close(jax.grad(loss, (1, 2))(ours.apply, variables, x), want, rtol=2e-4, atol=2e-5)


def test_gqa_differs_in_the_kv_heads_alone():
    x = normal(0, B, T, D)
    variables = our_layer(num_kv_heads=K).init(jax.random.key(1), x)
    shapes = jax.tree.map(jnp.shape, variables["params"])
    assert shapes == {
        "query": {"kernel": (D, N, H), "bias": (N, H)},
        "key": {"kernel": (D, K, H), "bias": (K, H)},
        "value": {"kernel": (D, K, H), "bias": (K, H)},
        "out": {"kernel": (N, H, D + 3), "bias": (D + 3,)},
    }
    # Flax's layer with each kv head repeated for its group of query heads.
    repeated = jax.tree.map(jnp.asarray, variables)
    for name in ("key", "value"):
        repeated["params"][name] = jax.tree.map(
            lambda leaf: jnp.repeat(leaf, N // K, -2), variables["params"][name]
        )
    close(our_layer(num_kv_heads=K).apply(variables, x), flax_layer().apply(repeated, x))


@pytest.mark.parametrize("window", [None, 2, (3, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_masks_equal_jax_nn(is_causal, window):
    options = dict(is_causal=is_causal, local_window_size=window)
    layer = our_layer(num_kv_heads=K, **options)
    x = normal(0, B, T, D)
    lengths = jnp.array([T, 4], jnp.int32)
    variables = layer.init(jax.random.key(1), x)
    p = variables["params"]
    q, k, v = (
        jnp.einsum("btd,dnh->btnh", x, p[name]["kernel"]) for name in ("query", "key", "value")
    )
    out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, **options)
    want = jnp.einsum("btnh,nhd->btd", out, p["out"]["kernel"])
    got = layer.apply(variables, x, key_value_seq_lengths=lengths)
    # jax.nn gives a row without keys the mean of all values, we give zeros.
    seen = np.ones((B, T), bool)
    if window is not None:
        seen[1, 4 + (window if isinstance(window, int) else window[0]) :] = False
    close(got[seen], want[seen])
    close(got[~seen], jnp.zeros_like(got[~seen]))


def test_lengths_bias_and_call_time_causal():
    layer = our_layer()
    x = normal(0, B, T, D)
    variables = layer.init(jax.random.key(1), x)
    lengths = jnp.array([5, T], jnp.int32)
    got = layer.apply(variables, x, query_seq_lengths=lengths, key_value_seq_lengths=lengths)
    close(got[0, :5], layer.apply(variables, x[:1, :5])[0])
    close(got[0, 5:], jnp.broadcast_to(variables["params"]["out"]["bias"], got[0, 5:].shape))
    bias = jnp.where(jnp.tri(T, dtype=bool), 0.0, -1e30)
    close(
        layer.apply(variables, x, bias=bias), layer.apply(variables, x, is_causal=True), atol=1e-5
    )


# ---- the layers without parameters


def test_self_attention_padded_and_packed():
    qkv = normal(0, B, T, 3, N, H)
    layer = linen.FlashSelfAttention(is_causal=True)
    close(layer.apply({}, qkv), jax_nn(qkv, is_causal=True))
    close(layer.apply({}, qkv, is_causal=False), jax_nn(qkv))
    assert layer.init(jax.random.key(0), qkv) == {}

    lengths = jnp.array([T, 5], jnp.int32)
    padded = layer.apply({}, qkv, seq_lengths=lengths)
    close(padded[1, :5], jax_nn(qkv[1:, :5], is_causal=True)[0])
    close(padded[1, 5:], jnp.zeros((T - 5, N, H)))

    total = jnp.concatenate([qkv[0], qkv[1, :5], qkv[1, 5:7]])  # the last rows belong to nobody
    packed = layer.apply({}, total, cu_seqlens=jnp.array([0, T, T + 5], jnp.int32))
    close(packed, jnp.concatenate([padded[0], padded[1, :5], jnp.zeros((2, N, H))]))


def test_cross_attention_padded_and_packed():
    q, kv = normal(0, B, T, N, H), normal(1, B, S, 2, K, H)
    layer = linen.FlashCrossAttention(scale=0.3)
    k, v = jnp.moveaxis(kv, -3, 0)
    want = jax.nn.dot_product_attention(q, k, v, scale=0.3)
    close(layer.apply({}, q, kv), want)
    got = layer.apply({}, q, kv, key_value_seq_lengths=jnp.array([S, 3], jnp.int32))
    close(got[0], want[0])
    close(got[1], jax.nn.dot_product_attention(q[1], k[1, :3], v[1, :3], scale=0.3))
    packed = layer.apply(
        {},
        q.reshape(B * T, N, H),
        kv.reshape(B * S, 2, K, H),
        cu_seqlens_q=jnp.array([0, T, 2 * T], jnp.int32),
        cu_seqlens_k=jnp.array([0, S, 2 * S], jnp.int32),
    )
    close(packed.reshape(B, T, N, H), want)
    bottom_right = linen.FlashCrossAttention(is_causal=True, causal_offset="bottom_right")
    mask = jnp.tri(T, S, S - T, dtype=bool)
    seen = mask.any(-1)
    want = jax.nn.dot_product_attention(q, k, v, mask=mask[None, None])
    close(bottom_right.apply({}, q, kv)[:, seen], want[:, seen])


def test_blocksparse_attention():
    length, rows, columns = 150, 64, 64
    qkv = normal(0, B, length, 3, N, H)
    blocks = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0]], bool)  # the last rows see nothing
    mask = np.kron(blocks, np.ones((rows, columns), bool))[:length, :length]
    asked = []

    def layout(num_queries, num_keys):
        asked.append((num_queries, num_keys))
        return blocks

    layer = linen.FlashBlocksparseAttention(layout=layout, block_size=(rows, columns))
    got = layer.apply({}, qkv)
    assert asked == [(length, length)]
    want = jax_nn(qkv, mask=jnp.asarray(mask)[None, None])
    close(got[:, : 2 * rows], want[:, : 2 * rows])
    close(got[:, 2 * rows :], jnp.zeros_like(got[:, 2 * rows :]))
    per_head = np.broadcast_to(blocks, (B, N, 3, 3))
    close(layer.apply({}, qkv, per_head), got)
    traced = jax.jit(lambda qkv, blocks: layer.apply({}, qkv, blocks))
    close(traced(qkv, jnp.ones((3, 3), bool)), jax_nn(qkv))
    causal = layer.apply({}, qkv, is_causal=True)
    want = jax_nn(qkv, mask=jnp.asarray(mask & np.tri(length, dtype=bool))[None, None])
    close(causal[:, : 2 * rows], want[:, : 2 * rows])


# ---- dropout


def test_dropout_follows_flax_streams():
    x = normal(0, B, T, D)
    layer = our_layer(dropout_rate=0.4)
    variables = layer.init(jax.random.key(1), x, deterministic=True)

    def run(seed, **options):
        rngs = {"dropout": jax.random.key(seed)}
        return np.asarray(layer.apply(variables, x, deterministic=False, rngs=rngs, **options))

    np.testing.assert_array_equal(run(5), run(5))
    assert not np.allclose(run(5), run(6))
    key = jax.random.key(7)
    np.testing.assert_array_equal(run(5, dropout_rng=key), run(6, dropout_rng=key))
    off = layer.apply(variables, x, deterministic=True)
    np.testing.assert_array_equal(off, our_layer().apply(variables, x))

    with pytest.raises(ValueError, match="deterministic"):
        layer.apply(variables, x)
    with pytest.raises(ValueError, match="deterministic"):
        our_layer(dropout_rate=0.4, deterministic=True).apply(variables, x, deterministic=True)
    with pytest.raises(Exception, match="dropout"):  # Flax's own error: no such stream
        layer.apply(variables, x, deterministic=False)


def test_dropout_keeps_the_mean():
    qkv = normal(0, 1, T, 3, N, H)
    layer = linen.FlashSelfAttention(dropout_rate=0.25, deterministic=False)
    keys = jax.random.split(jax.random.key(1), 400)
    runs = jax.lax.map(lambda key: layer.apply({}, qkv, dropout_rng=key), keys)
    want = jax_nn(qkv)
    error = np.abs(runs.mean(0) - want) / (np.asarray(runs.std(0)) / np.sqrt(len(keys)) + 1e-6)
    assert error.max() < 5.5  # standard errors; 600 values, so chance reaches about 3.5
    assert runs.std(0).min() > 0.0


def test_dropout_gradient_sees_the_same_mask():
    qkv = normal(0, B, T, 3, N, H)
    layer = linen.FlashSelfAttention(dropout_rate=0.5, deterministic=False)
    direction = normal(1, *qkv.shape)

    def loss(qkv):
        return jnp.sum(jnp.sin(layer.apply({}, qkv, dropout_rng=jax.random.key(2))))

    slope = jnp.vdot(jax.grad(loss)(qkv), direction)
    step = 1e-2
    finite = (loss(qkv + step * direction) - loss(qkv - step * direction)) / (2 * step)
    np.testing.assert_allclose(slope, finite, rtol=2e-2)


# ---- Flax's own layer on our attention_fn


def test_attention_fn_in_flax_layer():
    x = normal(0, B, T, D)
    theirs, ours = flax_layer(), flax_layer(attention_fn=linen.attention_fn)
    variables = theirs.init(jax.random.key(1), x)
    close(ours.apply(variables, x), theirs.apply(variables, x))
    mask = nn.make_causal_mask(jnp.ones((B, T)))
    want = theirs.apply(variables, x, mask=mask)
    close(ours.apply(variables, x, mask=mask), want)
    causal = functools.partial(linen.attention_fn, is_causal=True)
    close(flax_layer(attention_fn=causal).apply(variables, x), want)
    half = dict(dtype=jnp.bfloat16, force_fp32_for_softmax=True, precision="highest")
    got = flax_layer(attention_fn=linen.attention_fn, **half).apply(variables, x)
    assert got.dtype == jnp.bfloat16
    close(got.astype(jnp.float32), theirs.apply(variables, x), rtol=0.05, atol=0.05)


def test_attention_fn_dropout_in_flax_layer():
    x = normal(0, B, T, D)
    options = dict(dropout_rate=0.3, attention_fn=linen.attention_fn)
    layer = flax_layer(broadcast_dropout=False, **options)
    variables = layer.init(jax.random.key(1), x, deterministic=True)
    run = functools.partial(layer.apply, variables, x, deterministic=False)
    first = run(rngs={"dropout": jax.random.key(2)})
    np.testing.assert_array_equal(first, run(rngs={"dropout": jax.random.key(2)}))
    assert not np.allclose(first, run(rngs={"dropout": jax.random.key(3)}))
    shared = flax_layer(**options)
    with pytest.raises(ValueError, match="broadcast_dropout: expected False"):
        shared.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(2)})
    close(shared.apply(variables, x, deterministic=True), flax_layer().apply(variables, x))


def test_attention_fn_names_every_argument_of_flax():
    # Flax drops without a word what a signature does not name.
    import inspect

    theirs = inspect.signature(nn.dot_product_attention).parameters
    ours = inspect.signature(linen.attention_fn).parameters
    assert list(theirs) == list(ours)[: len(theirs)]


@pytest.mark.parametrize(
    "name, value",
    [
        ("module", nn.Dense(1)),
        ("einsum_dot_general", jax.lax.dot_general),
        ("qk_attn_weights_einsum", jnp.einsum),
        ("attn_weights_value_einsum", jnp.einsum),
        ("precision", "BF16_BF16_F32_X3"),
        ("dropout_rate", 1.0),
        ("dropout_rng", None),
    ],
)
def test_attention_fn_refuses_by_name(name, value):
    q = normal(0, B, T, N, H)
    options = dict(broadcast_dropout=False, dropout_rate=0.5, dropout_rng=jax.random.key(0))
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        linen.attention_fn(q, q, q, **(options | {name: value}))


def test_sow_weights_is_refused():
    x = normal(0, B, T, D)
    layer = flax_layer(attention_fn=linen.attention_fn)
    with pytest.raises(ValueError, match="^module: .*sow_weights"):
        layer.init(jax.random.key(0), x, sow_weights=True)


# ---- transformations


def test_jit_vmap_remat():
    layer = our_layer(num_kv_heads=K, is_causal=True)
    x = normal(0, 3, B, T, D)
    variables = layer.init(jax.random.key(1), x[0])
    want = layer.apply(variables, x)  # leading axes are free
    close(jax.jit(layer.apply)(variables, x), want)
    close(jax.vmap(layer.apply, (None, 0))(variables, x), want)
    close(jax.vmap(layer.apply, (None, 1), 1)(variables, x), want)
    several = jax.vmap(layer.init, (0, None))(jax.random.split(jax.random.key(2), 3), x[0])
    each = jnp.stack(
        [layer.apply(jax.tree.map(lambda p, i=i: p[i], several), x[i]) for i in range(3)]
    )
    close(jax.vmap(layer.apply)(several, x), each)

    rematerialised = nn.remat(linen.MultiHeadAttention)(
        num_heads=N, num_kv_heads=K, qkv_features=N * H, out_features=D + 3, is_causal=True
    )

    def gradient(layer):
        return jax.grad(lambda v: jnp.sum(layer.apply(v, x) ** 2))(variables)

    close(gradient(rematerialised), gradient(layer), rtol=1e-4, atol=1e-4)


def test_scan_over_layers():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            layer = linen.MultiHeadAttention(
                num_heads=N, qkv_features=N * H, dropout_rate=0.2, deterministic=False
            )
            return x + layer(x), None

    blocks = nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        length=3,
    )()
    x = normal(0, B, T, D)
    rngs = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
    variables = blocks.init(rngs, x, None)
    kernel = variables["params"]["MultiHeadAttention_0"]["query"]["kernel"]
    assert kernel.shape == (3, D, N, H)

    def loss(variables):
        out, _ = blocks.apply(variables, x, None, rngs={"dropout": jax.random.key(3)})
        return jnp.sum(out**2)

    gradient = jax.jit(jax.grad(loss))(variables)
    norms = jax.tree.map(lambda g: float(jnp.linalg.norm(g)), gradient["params"])
    assert np.isfinite(jax.tree.leaves(norms)).all()
    assert norms["MultiHeadAttention_0"]["query"]["kernel"] > 0


# ---- bad input


@pytest.mark.parametrize(
    "options, name",
    [
        ({"num_heads": 0}, "num_heads"),
        ({"num_kv_heads": 4}, "num_kv_heads"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"qkv_features": N * H + 1}, "qkv_features"),
        ({"dropout_rate": 1.0}, "dropout_rate"),
        ({"dropout_rate": -0.1}, "dropout_rate"),
        ({"local_window_size": -1}, "local_window_size"),
        ({"causal_offset": "top"}, "causal_offset"),
        ({"implementation": "tpu"}, "implementation"),
    ],
)
def test_bad_attributes_are_named(options, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        our_layer(**options).init(jax.random.key(0), normal(0, B, T, D))


def test_bad_inputs_are_named():
    layer, x = our_layer(), normal(0, B, T, D)
    init = functools.partial(layer.init, jax.random.key(0))
    with pytest.raises(ValueError, match="^inputs_q: expected"):
        init(x[0, 0])
    with pytest.raises(ValueError, match="^inputs_k: expected"):
        init(x, x[:1])
    with pytest.raises(ValueError, match="^inputs_k: expected"):
        init(x, None, x)
    with pytest.raises(ValueError, match="^inputs_v: expected"):
        init(x, x, x[:, :-1])
    with pytest.raises(ValueError, match="^mask: expected"):
        init(x, mask=jnp.ones((B, N, T, T - 1), bool))
    with pytest.raises(ValueError, match="^key_value_seq_lengths: expected"):
        init(x, key_value_seq_lengths=jnp.ones(B + 1, jnp.int32))


def test_bad_packed_inputs_are_named():
    qkv, kv = normal(0, B, T, 3, N, H), normal(1, B, S, 2, K, H)
    cu = jnp.array([0, T], jnp.int32)
    lengths = jnp.full(B, T, jnp.int32)
    this = linen.FlashSelfAttention()
    with pytest.raises(ValueError, match="^qkv: expected"):
        this.apply({}, qkv[:, :, :2])
    with pytest.raises(ValueError, match="^seq_lengths: expected"):
        this.apply({}, qkv, cu_seqlens=cu, seq_lengths=lengths)
    with pytest.raises(TypeError, match="^cu_seqlens: expected"):
        this.apply({}, qkv, cu_seqlens=cu.astype(jnp.float32))
    cross = linen.FlashCrossAttention()
    with pytest.raises(ValueError, match="^key_value: expected"):
        cross.apply({}, qkv[..., 0, :, :], qkv)
    with pytest.raises(ValueError, match="^cu_seqlens_q: expected"):
        cross.apply({}, qkv[..., 0, :, :], kv, cu_seqlens_k=cu)
    with pytest.raises(ValueError, match="^query_seq_lengths: expected"):
        cross.apply({}, qkv[..., 0, :, :], kv, cu_seqlens_q=cu, query_seq_lengths=lengths)
    sparse = linen.FlashBlocksparseAttention()
    with pytest.raises(ValueError, match="^block_mask: expected"):
        sparse.apply({}, qkv)
    with pytest.raises(ValueError, match="^block_mask: expected"):
        sparse.apply({}, qkv, np.ones((2, 2), bool))
    with pytest.raises(ValueError, match="^qkv: expected"):
        linen.FlashBlocksparseAttention(layout=lambda t, s: None).apply({}, qkv[0, 0, 0])


def test_zero_sizes():
    layer = our_layer()
    variables = layer.init(jax.random.key(0), normal(0, B, T, D))
    assert layer.apply(variables, jnp.zeros((0, T, D))).shape == (0, T, D + 3)
    assert layer.apply(variables, jnp.zeros((B, 0, D))).shape == (B, 0, D + 3)


# ---- Flax stays optional


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_import_without_flax():
    code = "import sys, jax_flash; print('flax' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"
    for name in ("linen", "nnx"):
        code = f"import sys; sys.modules['flax'] = None; import jax_flash.{name}"
        result = run_python(code)
        assert result.returncode == 1
        assert f"ImportError: jax_flash.{name} needs Flax" in result.stderr
        assert 'pip install "jax-flash[flax]"' in result.stderr
