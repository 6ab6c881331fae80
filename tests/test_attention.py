"""Dense attention against its definition: options alone and together, types, head dims."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jax_flash
from tests.helpers import (
    IMPLEMENTATIONS,
    KEY,
    Shape,
    attend_packed,
    check_attention,
    check_call,
    device,
    random,
)

DTYPES = ["float32", "bfloat16", "float16"]
LENGTHS = dict(
    query_seq_lengths=np.array([197, 71], np.int32),
    key_value_seq_lengths=np.array([130, 261], np.int32),
)
OPTIONS = {
    "none": {},
    "scale": dict(scale=0.31),
    "causal": dict(is_causal=True),
    "bottom_right": dict(is_causal=True, causal_offset="bottom_right"),
    "offset": dict(is_causal=True, causal_offset=-29),
    "offset_array": dict(is_causal=True, causal_offset=np.array([40, -70], np.int32)),
    "window": dict(local_window_size=33),
    "window_sides": dict(local_window_size=(70, 5)),
    "window_causal": dict(is_causal=True, local_window_size=(19, 50)),
    "window_bottom_right": dict(local_window_size=(64, 0), causal_offset="bottom_right"),
    "query_lengths": dict(query_seq_lengths=LENGTHS["query_seq_lengths"]),
    "key_lengths": dict(key_value_seq_lengths=LENGTHS["key_value_seq_lengths"]),
    "lengths": LENGTHS,
    "lengths_causal": dict(LENGTHS, is_causal=True, causal_offset="bottom_right"),
    "lengths_zero": dict(
        query_seq_lengths=np.array([0, 5], np.int32),
        key_value_seq_lengths=np.array([9, 0], np.int32),
    ),
    "dropout": dict(dropout_rate=0.17),
    "dropout_causal": dict(dropout_rate=0.5, is_causal=True),
    "dropout_lengths_window": dict(LENGTHS, dropout_rate=0.3, local_window_size=(40, 12)),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(implementation, dtype, option):
    check_attention(implementation, dtype, Shape(), OPTIONS[option])


# Head dims that fill a tile, that do not, and that are no multiple of 8; value dims of their own.
HEAD_DIMS = [(8, 8), (16, 16), (24, 24), (64, 64), (72, 72), (96, 96), (128, 128), (136, 136)]
HEAD_DIMS += [(192, 192), (256, 256), (192, 128), (64, 32), (40, 72), (16, 256), (13, 13), (20, 7)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim,value_dim", HEAD_DIMS)
def test_head_dims(implementation, dtype, head_dim, value_dim):
    if implementation == "xla" and (head_dim % 8 == 0 and head_dim != 136):
        pytest.skip("the XLA form has no tiles: one dim that is a multiple of 8 stands for all")
    shape = Shape(1, 101, 139, 4, 2, head_dim, value_dim)
    check_attention(implementation, dtype, shape, dict(is_causal=True))


SHAPES = {
    "one_query": Shape(3, 1, 75, 4, 2, 32),
    "one_key": Shape(2, 75, 1, 4, 2, 32),
    "one_of_each": Shape(1, 1, 1, 1, 1, 8),
    "short": Shape(2, 3, 5, 2, 1, 16),
    "multi_query": Shape(2, 65, 130, 5, 1, 24),
    "multi_head": Shape(1, 129, 64, 3, 3, 64),
    "many_tiles": Shape(1, 523, 641, 2, 1, 64),
    "more_queries": Shape(1, 333, 47, 2, 2, 48),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("option", ["none", "bottom_right", "dropout"])
def test_shapes(implementation, dtype, shape, option):
    check_attention(implementation, dtype, SHAPES[shape], OPTIONS[option])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "option,seq_q,seq_k,packing",
    [("none", 131, 259, "kv"), ("causal", 261, 261, "separate"), ("window_sides", 261, 261, "kv")],
)
def test_many_short_sequences(dtype, option, seq_q, seq_k, packing):
    """Enough of them that the Hopper backward gives each of its CTAs whole sequences."""
    shape = Shape(43, seq_q, seq_k, 6, 3, 40)
    check_attention("cuda", dtype, shape, OPTIONS[option], packing=packing)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("packing,kv_heads,seq_k", [("qkv", 4, 133), ("kv", 2, 77)])
@pytest.mark.parametrize("option", ["causal", "dropout"])
def test_packed(implementation, packing, kv_heads, seq_k, option):
    """A packed call has the bits of the separate one: same kernel, other strides."""
    shape = Shape(2, 133, seq_k, 4, kv_heads, 32)
    packed = check_attention(implementation, "bfloat16", shape, OPTIONS[option], packing=packing)
    separate = check_attention(implementation, "bfloat16", shape, OPTIONS[option])
    for a, b in zip(packed[:2], separate[:2], strict=True):
        np.testing.assert_array_equal(a, b)


@st.composite
def calls(draw):
    """A shape and a set of options that agree with it."""
    size = st.integers(1, 150)
    kv_heads = draw(st.integers(1, 3))
    shape = Shape(
        draw(st.integers(1, 3)),
        draw(size),
        draw(size),
        kv_heads * draw(st.integers(1, 3)),
        kv_heads,
        8 * draw(st.integers(1, 9)),
        8 * draw(st.integers(1, 9)),
    )
    options = {}
    if draw(st.booleans()):
        options["is_causal"] = True
    if draw(st.booleans()):
        options["local_window_size"] = draw(st.tuples(st.integers(0, 160), st.integers(0, 160)))
    offset = draw(st.sampled_from(["none", "bottom_right", "int", "array"]))
    if offset == "bottom_right":
        options["causal_offset"] = "bottom_right"
    elif offset == "int":
        options["causal_offset"] = draw(st.integers(-160, 160))
    elif offset == "array":
        numbers = st.lists(st.integers(-160, 160), min_size=shape.batch, max_size=shape.batch)
        options["causal_offset"] = np.array(draw(numbers), np.int32)
    for name, limit in (("query_seq_lengths", shape.seq_q), ("key_value_seq_lengths", shape.seq_k)):
        if draw(st.booleans()):
            numbers = st.lists(st.integers(0, limit), min_size=shape.batch, max_size=shape.batch)
            options[name] = np.array(draw(numbers), np.int32)
    if draw(st.booleans()):
        options["dropout_rate"] = draw(st.sampled_from([0.01, 0.25, 0.9]))
    if draw(st.booleans()):
        rows, cols = draw(st.sampled_from([(64, 64), (128, 128), (16, 256)]))
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        blocks = (-(-shape.seq_q // rows), -(-shape.seq_k // cols))
        heads = draw(st.sampled_from([1, shape.heads]))
        options["block_mask"] = rng.random((shape.batch, heads, *blocks)) < 0.6
        options["block_size"] = (rows, cols)
    return shape, options


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_options_together(implementation, dtype):
    examples = 8 if implementation == "xla" else 25

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(calls())
    def check(call):
        check_attention(implementation, dtype, *call)

    check()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_drop_in_for_jax_nn(implementation):
    """The same call as `jax.nn.dot_product_attention`, positional arguments, residual and all."""
    shape = Shape(2, 50, 70, 4, 2, 32)
    with jax.default_device(device(implementation)):
        q, k, v = map(jnp.asarray, random(3, "float32", shape.query, shape.key, shape.value))
        for options in (
            dict(is_causal=True),
            dict(local_window_size=(7, 3), scale=0.2),
            dict(key_value_seq_lengths=jnp.array([70, 11], jnp.int32)),
        ):
            ours = jax_flash.attention(
                q, k, v, return_residual=True, implementation=implementation, **options
            )
            theirs = jax.nn.dot_product_attention(q, k, v, return_residual=True, **options)
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("bias_shape", [(2, 4, 50, 70), (1, 4, 50, 70), (50, 70), (4, 1, 1), (70,)])
def test_bias_and_mask(bias_shape):
    shape = Shape(2, 50, 70, 4, 2, 32)
    q, k, v, bias = map(
        jnp.asarray, random(4, "float32", shape.query, shape.key, shape.value, bias_shape)
    )
    mask = jnp.asarray(np.random.default_rng(5).random((2, 1, 50, 70)) < 0.8)
    mask = mask.at[..., 0].set(True)  # jax.nn gives rows without a key a mean, ours are 0

    def ours(*args):
        return jax_flash.attention(*args, mask, is_causal=True)

    def theirs(q, k, v, bias):
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
        return jax.nn.dot_product_attention(q, k, v, bias, mask, is_causal=True)

    np.testing.assert_allclose(ours(q, k, v, bias), theirs(q, k, v, bias), rtol=2e-5, atol=2e-6)
    weight = random(6, "float32", shape.out)[0]
    grads = [
        jax.grad(lambda *a, f=f: (f(*a) * weight).sum(), (0, 1, 2, 3))(q, k, v, bias)
        for f in (ours, theirs)
    ]
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 2, 2)])
def test_leading_axes(implementation, lead):
    """Any number of batch axes is the flat batch."""
    rest = ((33, 4, 16), (41, 2, 16), (41, 2, 16))
    with jax.default_device(device(implementation)):
        q, k, v = map(jnp.asarray, random(7, "float32", *(lead + r for r in rest)))
        key = jax.random.wrap_key_data(KEY)
        call = functools.partial(
            jax_flash.attention,
            is_causal=True,
            dropout_rate=0.4,
            dropout_key=key,
            return_lse=True,
            implementation=implementation,
        )
        out, lse = call(q, k, v)
        flat = [x.reshape(-1, *x.shape[-3:]) for x in (q, k, v)]
        flat_out, flat_lse = call(*flat)
    np.testing.assert_array_equal(out, flat_out.reshape(*lead, 33, 4, 16))
    np.testing.assert_array_equal(lse, flat_lse.reshape(*lead, 4, 33))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bitwise_repeatable(implementation, dtype):
    """The forward always, the backward with deterministic=True."""
    shape = Shape(2, 300, 450, 4, 2, 64)
    with jax.default_device(device(implementation)):
        q, k, v, dout = map(
            jnp.asarray, random(8, dtype, shape.query, shape.key, shape.value, shape.out)
        )

        @jax.jit
        def call(q, k, v, dout):
            attend = functools.partial(
                jax_flash.attention,
                is_causal=True,
                deterministic=True,
                implementation=implementation,
            )
            out, pull = jax.vjp(attend, q, k, v)
            return out, *pull(dout)

        first = call(q, k, v, dout)
        for _ in range(3):
            for a, b in zip(first, call(q, k, v, dout), strict=True):
                np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("mask", ["lengths", "causal"])
def test_bitwise_repeatable_whoever_takes_a_tile(mask, dtype, head_dim):
    """Tiles go to whichever CTA is ready, and the rows of some end within one: what comes before a
    tile, in the same CTA, must not be seen in its bits."""
    shape, options = Shape(7, 159, 159, 40, 10, head_dim), dict(is_causal=True)
    if mask == "lengths":
        shape = Shape(7, 159, 70, 40, 10, head_dim)
        options = dict(key_value_seq_lengths=np.array([69, 64, 6, 4, 30, 70, 5], np.int32))
    attend = functools.partial(
        jax_flash.attention, **options, return_lse=True, implementation="cuda"
    )
    call = jax.jit(attend)
    with jax.default_device(device("cuda")):
        arrays = jax.device_put(random(9, dtype, shape.query, shape.key, shape.value))
        first, *others = jax.device_get([call(*arrays) for _ in range(200)])
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_return_probs(implementation):
    """P times V is the output; the mask is the kernel's own."""
    shape = Shape(2, 45, 61, 4, 2, 16)
    with jax.default_device(device(implementation)):
        q, k, v = map(jnp.asarray, random(9, "float32", shape.query, shape.key, shape.value))
        out, lse, probs = jax_flash.attention(
            q,
            k,
            v,
            is_causal=True,
            dropout_rate=0.25,
            dropout_key=jax.random.wrap_key_data(KEY),
            return_lse=True,
            return_probs=True,
            implementation=implementation,
        )
    assert probs.probs.shape == probs.dropout_mask.shape == (2, 4, 45, 61)
    assert lse.shape == (2, 4, 45)
    np.testing.assert_allclose(probs.probs.sum(-1), 1, rtol=1e-5)
    kept = jnp.where(probs.dropout_mask, probs.probs / 0.75, 0)
    expected = jnp.einsum("bnts,bsnh->btnh", kept, jnp.repeat(v, 2, -2))
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_scores(implementation, dtype):
    """Keys that grow along the sequence move the running maximum in every tile."""
    q, k, v = random(10, dtype, (1, 70, 2, 64), (1, 400, 1, 64), (1, 400, 1, 64))
    k = (k * np.linspace(0.1, 30, 400)[:, None, None]).astype(k.dtype)
    check_call(
        implementation,
        functools.partial(attend_packed, "separate", implementation, {}),
        (q, k, v),
        ok=np.ones((1, 2, 70, 400), bool),
        scale=0.125,
    )
