"""jax_flash.nnx: Flax's weights and numbers, dropout's rules, transformations, refusals.

The layers' arithmetic is the Linen layers' (`jax_flash._flax`); test_linen.py covers it at length.
"""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import nnx

from jax_flash import linen
from jax_flash import nnx as layers

B, T, S, N, K, H, D = 2, 13, 7, 6, 2, 8, 20
TOLERANCE = dict(rtol=2e-5, atol=2e-6)  # float32, the same formula in another order


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **(TOLERANCE | tolerance)), got, want
    )


def jax_nn(qkv, **options):
    return jax.nn.dot_product_attention(*jnp.moveaxis(qkv, -3, 0), **options)


SIZES = dict(num_heads=N, in_features=D, qkv_features=N * H, out_features=D + 3)


def flax_layer(seed=1, **options):
    return nnx.MultiHeadAttention(**(SIZES | options), decode=False, rngs=nnx.Rngs(seed))


def our_layer(seed=1, **options):
    return layers.MultiHeadAttention(**(SIZES | options), rngs=nnx.Rngs(seed))


def parameters(layer):
    return nnx.to_pure_dict(nnx.state(layer, nnx.Param))


# ---- weights move between Flax's layer and ours


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": K},
        {"use_bias": False},
        {"normalize_qk": True},
        {"in_kv_features": D + 1},
        {"dropout_rate": 0.3, "deterministic": True},
        {"qkv_features": None, "num_heads": 4, "out_features": None},
        {"dtype": jnp.bfloat16},
        {"bias_init": nnx.initializers.normal(), "out_kernel_init": nnx.initializers.normal()},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_parameters_and_outputs_equal_flax(options):
    theirs, ours = flax_layer(**options), our_layer(**options)
    assert jax.tree.structure(parameters(theirs)) == jax.tree.structure(parameters(ours))
    jax.tree.map(np.testing.assert_array_equal, parameters(ours), parameters(theirs))

    inputs = [normal(0, B, T, D)]
    if "in_kv_features" in options:
        inputs.append(normal(2, B, S, D + 1))
    tolerance = dict(rtol=0.03, atol=0.03) if "dtype" in options else {}

    def compare():
        want, got = theirs(*inputs), ours(*inputs)
        assert got.dtype == want.dtype
        close(got.astype(jnp.float32), want.astype(jnp.float32), **tolerance)

    compare()
    # Theirs into ours, then other weights of ours into theirs.
    other = flax_layer(2, **options)
    nnx.update(ours, nnx.state(other, nnx.Param))
    nnx.update(theirs, nnx.state(other, nnx.Param))
    compare()
    nnx.update(theirs, nnx.state(our_layer(3, **options), nnx.Param))
    nnx.update(ours, nnx.state(our_layer(3, **options), nnx.Param))
    compare()


def test_weights_move_between_nnx_and_linen():
    ours = our_layer(num_kv_heads=K, is_causal=True)
    x = normal(0, B, T, D)
    names = ("num_heads", "qkv_features", "out_features")
    other = linen.MultiHeadAttention(
        num_kv_heads=K, is_causal=True, **{name: SIZES[name] for name in names}
    )
    close(other.apply({"params": parameters(ours)}, x), ours(x))


def test_gradients_equal_flax():
    theirs, ours = flax_layer(num_kv_heads=K), our_layer(num_kv_heads=K, is_causal=True)
    x = normal(0, B, T, D)

    def gradient(layer, **options):
        grads = nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(x, **options))))(layer)
        return nnx.to_pure_dict(grads)

    close(gradient(ours), gradient(theirs, is_causal=True), rtol=2e-4, atol=2e-5)


def test_masks_and_lengths():
    ours, theirs = our_layer(), flax_layer()
    q, k, v = normal(0, B, T, D), normal(1, B, S, D), normal(2, B, S, D)
    mask = jax.random.bernoulli(jax.random.key(4), 0.6, (B, N, T, S)).at[..., 0].set(True)
    close(ours(q, k, v, mask=mask), theirs(q, k, v, mask=mask))
    close(ours(q, k, v, mask=mask.astype(jnp.float32)), theirs(q, k, v, mask=mask))
    lengths = jnp.array([S, 3], jnp.int32)
    mask = jnp.broadcast_to(jnp.arange(S) < lengths[:, None, None, None], (B, N, T, S))
    close(ours(q, k, v, key_value_seq_lengths=lengths), theirs(q, k, v, mask=mask))
    near = jnp.abs(jnp.arange(T)[:, None] - jnp.arange(T)) <= 2
    mask = jnp.broadcast_to(near & jnp.tri(T, dtype=bool), (B, N, T, T))
    close(our_layer(local_window_size=2)(q, is_causal=True), theirs(q, mask=mask))
    bias = jnp.where(near, 0.0, -1e30)
    close(ours(q, bias=bias), our_layer(local_window_size=2)(q), atol=1e-5)


# ---- the layers without parameters


def test_self_attention_padded_and_packed():
    qkv = normal(0, B, T, 3, N, H)
    layer = layers.FlashSelfAttention(is_causal=True)
    assert not jax.tree.leaves(nnx.state(layer))
    close(layer(qkv), jax_nn(qkv, is_causal=True))
    close(layer(qkv, is_causal=False), jax_nn(qkv))
    padded = layer(qkv, seq_lengths=jnp.array([T, 5], jnp.int32))
    close(padded[1, :5], jax_nn(qkv[1:, :5], is_causal=True)[0])
    close(padded[1, 5:], jnp.zeros((T - 5, N, H)))
    packed = layer(
        jnp.concatenate([qkv[0], qkv[1, :5]]), cu_seqlens=jnp.array([0, T, T + 5], jnp.int32)
    )
    close(packed, jnp.concatenate([padded[0], padded[1, :5]]))


def test_cross_attention_padded_and_packed():
    q, kv = normal(0, B, T, N, H), normal(1, B, S, 2, K, H)
    layer = layers.FlashCrossAttention(scale=0.3)
    k, v = jnp.moveaxis(kv, -3, 0)
    want = jax.nn.dot_product_attention(q, k, v, scale=0.3)
    close(layer(q, kv), want)
    lengths = jnp.array([S, 3], jnp.int32)
    got = layer(q, kv, key_value_seq_lengths=lengths, query_seq_lengths=jnp.array([T, 2]))
    close(got[0], want[0])
    close(got[1, :2], jax.nn.dot_product_attention(q[1, :2], k[1, :3], v[1, :3], scale=0.3))
    close(got[1, 2:], jnp.zeros((T - 2, N, H)))
    packed = layer(
        q.reshape(B * T, N, H),
        kv.reshape(B * S, 2, K, H),
        cu_seqlens_q=jnp.array([0, T, 2 * T], jnp.int32),
        cu_seqlens_k=jnp.array([0, S, 2 * S], jnp.int32),
    )
    close(packed.reshape(B, T, N, H), want)


def test_blocksparse_attention():
    length = 150
    qkv = normal(0, B, length, 3, N, H)
    blocks = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]], bool)
    mask = np.kron(blocks, np.ones((64, 64), bool))[None, None, :length, :length]
    layer = layers.FlashBlocksparseAttention(layout=lambda t, s: blocks, block_size=(64, 64))
    close(layer(qkv), jax_nn(qkv, mask=jnp.asarray(mask)))
    close(layer(qkv, np.ones((3, 3), bool)), jax_nn(qkv))


# ---- dropout


def test_dropout_follows_flax_streams():
    x = normal(0, B, T, D)

    def run(seed):
        layer = our_layer(dropout_rate=0.4, deterministic=False)
        layer.rngs = nnx.Rngs(dropout=seed).dropout
        return layer(x), layer(x)

    first, second = run(5)
    assert not np.allclose(first, second)  # the stream moves on
    again, _ = run(5)
    np.testing.assert_array_equal(first, again)
    layer = our_layer(dropout_rate=0.4)
    layer.eval()
    np.testing.assert_array_equal(layer(x), our_layer()(x))
    layer.train()
    assert not np.allclose(layer(x), our_layer()(x))
    np.testing.assert_array_equal(layer(x, deterministic=True), our_layer()(x))
    np.testing.assert_array_equal(nnx.view(layer, deterministic=True)(x), our_layer()(x))
    np.testing.assert_array_equal(layer(x, rngs=nnx.Rngs(dropout=5)), first)
    np.testing.assert_array_equal(layer(x, rngs=nnx.Rngs(dropout=5).dropout), first)

    with pytest.raises(ValueError, match="^deterministic: expected"):
        our_layer(dropout_rate=0.4)(x)
    unseeded = layers.FlashSelfAttention(dropout_rate=0.4, deterministic=False)
    with pytest.raises(ValueError, match="^rngs: expected"):
        unseeded(normal(0, B, T, 3, N, H))


# ---- Flax's own layer on our attention_fn


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": K}, {"dtype": jnp.bfloat16}], ids=str)
def test_attention_fn_in_flax_layer(options):
    x = normal(0, B, T, D)
    theirs = flax_layer(**options)
    ours = flax_layer(attention_fn=layers.attention_fn, **options)
    tolerance = dict(rtol=0.03, atol=0.03) if "dtype" in options else {}
    mask = jax.random.bernoulli(jax.random.key(4), 0.6, (B, N, T, T)).at[..., 0].set(True)
    for call in ({}, {"is_causal": True}, {"mask": mask}):
        got, want = ours(x, **call), theirs(x, **call)
        assert got.dtype == want.dtype
        close(got.astype(jnp.float32), want.astype(jnp.float32), **tolerance)
    window = functools.partial(layers.attention_fn, local_window_size=2)
    near = jnp.abs(jnp.arange(T)[:, None] - jnp.arange(T)) <= 2
    want = theirs(x, mask=jnp.broadcast_to(near, (B, N, T, T)))
    got = flax_layer(attention_fn=window, **options)(x)
    close(got.astype(jnp.float32), want.astype(jnp.float32), **tolerance)


def test_attention_fn_dropout_and_cache_in_flax_layer():
    x = normal(0, B, T, D)
    options = dict(dropout_rate=0.3, attention_fn=layers.attention_fn)
    layer = flax_layer(broadcast_dropout=False, **options)
    first = layer(x, deterministic=False, rngs=nnx.Rngs(dropout=2))
    np.testing.assert_array_equal(first, layer(x, deterministic=False, rngs=nnx.Rngs(dropout=2)))
    assert not np.allclose(first, layer(x, deterministic=False, rngs=nnx.Rngs(dropout=3)))
    with pytest.raises(ValueError, match="broadcast_dropout: expected False"):
        flax_layer(**options)(x, deterministic=False)
    close(flax_layer(**options)(x, deterministic=True), flax_layer()(x))

    decoder = flax_layer(attention_fn=layers.attention_fn)
    decoder.init_cache((B, T, D))
    tokens = [decoder(x[:, i : i + 1], decode=True) for i in range(4)]
    close(jnp.concatenate(tokens, 1), flax_layer()(x, is_causal=True)[:, :4], atol=1e-5)


def test_attention_fn_names_every_argument_of_flax():
    theirs = inspect.signature(nnx.dot_product_attention).parameters
    ours = inspect.signature(layers.attention_fn).parameters
    assert list(theirs) == list(ours)[: len(theirs)]


@pytest.mark.parametrize(
    "name, value",
    [
        ("module", nnx.Module()),
        ("input_positions", jnp.arange(T)),
        ("precision", "BF16_BF16_F32_X3"),
        ("dropout_rate", 1.0),
        ("dropout_rng", None),
    ],
)
def test_attention_fn_refuses_by_name(name, value):
    q = normal(0, B, T, N, H)
    options = dict(broadcast_dropout=False, dropout_rate=0.5, dropout_rng=jax.random.key(0))
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        layers.attention_fn(q, q, q, **(options | {name: value}))


def test_sow_weights_is_refused():
    with pytest.raises(ValueError, match="^module: .*sow_weights"):
        flax_layer(attention_fn=layers.attention_fn)(normal(0, B, T, D), sow_weights=True)


# ---- transformations


def test_jit_vmap_remat():
    layer = our_layer(num_kv_heads=K, is_causal=True)
    x = normal(0, 3, B, T, D)
    want = layer(x)  # leading axes are free
    close(nnx.jit(lambda layer, x: layer(x))(layer, x), want)
    close(nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 1), out_axes=1)(layer, x), want)

    def gradient(call):
        grads = nnx.grad(lambda layer: jnp.sum(call(layer, x) ** 2))(layer)
        return nnx.to_pure_dict(grads)

    plain = gradient(lambda layer, x: layer(x))
    close(gradient(nnx.remat(lambda layer, x: layer(x))), plain, rtol=1e-4, atol=1e-4)
    graph, state = nnx.split(layer)
    close(jax.jit(lambda state: nnx.merge(graph, state)(x))(state), want)


def test_scan_over_layers_with_dropout():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(rngs):
        return layers.MultiHeadAttention(
            N, D, N * H, dropout_rate=0.2, deterministic=False, rngs=rngs
        )

    stack = make(nnx.Rngs(0))
    assert stack.query.kernel[...].shape == (3, D, N, H)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return x + layer(x)

    x = normal(0, B, T, D)
    gradient = nnx.grad(lambda stack: jnp.sum(forward(stack, x) ** 2))(stack)
    norms = jax.tree.map(lambda g: float(jnp.linalg.norm(g)), nnx.to_pure_dict(gradient))
    assert np.isfinite(jax.tree.leaves(norms)).all()
    assert norms["query"]["kernel"] > 0
    assert not np.allclose(forward(stack, x), forward(stack, x))


# ---- bad input


@pytest.mark.parametrize(
    "options, name",
    [
        ({"num_heads": 0}, "num_heads"),
        ({"num_kv_heads": 4}, "num_kv_heads"),
        ({"qkv_features": N * H + 1}, "qkv_features"),
        ({"dropout_rate": 1.0}, "dropout_rate"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        our_layer(**options)


def test_bad_inputs_are_named():
    layer, x = our_layer(), normal(0, B, T, D)
    with pytest.raises(ValueError, match="^inputs_q: expected"):
        layer(x[..., 1:])
    with pytest.raises(ValueError, match="^inputs_k: expected"):
        layer(x, x[..., 1:])
    with pytest.raises(ValueError, match="^inputs_k: expected"):
        layer(x, None, x)
    with pytest.raises(ValueError, match="^inputs_v: expected"):
        layer(x, x, x[:, :-1])
    qkv = normal(0, B, T, 3, N, H)
    cu = jnp.array([0, T], jnp.int32)
    with pytest.raises(ValueError, match="^qkv: expected"):
        layers.FlashSelfAttention()(qkv[:, :, :2])
    with pytest.raises(ValueError, match="^seq_lengths: expected"):
        layers.FlashSelfAttention()(qkv, cu_seqlens=cu, seq_lengths=jnp.full(B, T))
    with pytest.raises(ValueError, match="^cu_seqlens_q: expected"):
        layers.FlashCrossAttention()(qkv[..., 0, :, :], qkv[..., 1:, :, :], cu_seqlens_k=cu)
    with pytest.raises(ValueError, match="^block_mask: expected"):
        layers.FlashBlocksparseAttention()(qkv)
