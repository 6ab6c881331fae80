"""Scores and values that an online softmax can stumble over: maxima that grow, fall or jump from
tile to tile, first tiles without a key, sums near overflow. In 16-bit types."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash
from jax_flash.reference import attention as reference
from tests import helpers

SEQ_Q, SEQ_K, HEADS = 131, 705, 2

# What is added to the scores of key j, in natural units; rows also have scores of their own, of
# standard deviation 1.
SLOPES = {
    "growing": lambda j: 0.12 * j,  # 15 a tile of 128: past any slack, again and again
    "growing slowly": lambda j: 0.03 * j,
    "growing steeply": lambda j: 2.0 * j,
    "falling": lambda j: -0.12 * j,
    "falling steeply": lambda j: -2.0 * j,
    "steps": lambda j: 11.0 * (j // 64),
    "saw": lambda j: 40.0 * (j // 64 % 2),
    "spike first": lambda j: 60.0 * (j == 0),
    "spike last": lambda j: 60.0 * (j == SEQ_K - 1),
    "spike inside": lambda j: 60.0 * (j == 333),
    "far below zero": lambda j: -3000.0 + 0 * j,
    "far above zero": lambda j: 3000.0 + 0 * j,
    "equal": None,
}
OPTIONS = {
    "none": {},
    "causal": dict(is_causal=True, causal_offset="bottom_right"),
    # Most rows see no key of the tiles that are first, from either end.
    "window": dict(local_window_size=(9, 5), causal_offset="bottom_right"),
    "short": dict(key_value_seq_lengths=np.array([3], np.int32)),
    "dropout": dict(dropout_rate=0.3),
}
BANDS = np.ones((1, HEADS, -(-SEQ_Q // 16), -(-SEQ_K // 256)), bool)
BANDS[:, 0, ::2, :-1] = False  # half of the bands see the last columns only
BANDS[:, 1, 1::3] = False  # a third see none at all
OPTIONS["bands"] = dict(block_mask=BANDS, block_size=(16, 256))


def scores_as_tensors(slope, dtype, head_dim: int, seed: int, batch=1, seq_q=SEQ_Q, seq_k=SEQ_K):
    """q, k whose products, times the scale, are noise plus the slope.

    The slope takes two elements of the head dim, as a 16-bit type has too few bits for it in one.
    """
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, seq_q, HEADS, head_dim))
    k = rng.standard_normal((batch, seq_k, HEADS, head_dim))
    scale = head_dim**-0.5
    if slope is None:
        k[:] = k[:, :1]
    else:
        target = np.asarray(slope(np.arange(seq_k)), np.float64) / scale / 64
        high = target.astype(jnp.dtype(dtype)).astype(np.float64)
        q[..., :2] = 64
        k[..., 0], k[..., 1] = high[:, None], (target - high)[:, None]
    return (x.astype(jnp.dtype(dtype)) for x in (q, k))


@functools.cache
def compiled(implementation: str, option: str):
    call = functools.partial(helpers.attend_packed, "separate", implementation, OPTIONS[option])
    return jax.jit(call)


def check_forward(implementation, q, k, v, option):
    options, call = OPTIONS[option], compiled(implementation, option)
    sizes = (q.shape[0], HEADS, q.shape[1], k.shape[1])
    ok = reference.allowed(*sizes, **helpers.mask_options(options))
    rate = options.get("dropout_rate", 0.0)
    keep = None
    if rate:
        keep = reference.dropout_keep(rate, np.asarray(helpers.KEY), *sizes)
    scale = q.shape[-1] ** -0.5
    exact = reference.forward(q, k, v, ok, scale=scale, keep=keep, rate=rate)
    with jax.default_device(helpers.device(implementation)):
        out, lse = call(q, k, v)
        again = call(q, k, v)
        zeros = np.zeros((*q.shape[:-1], v.shape[-1]), q.dtype), np.zeros(exact.lse.shape, "f")
        with helpers.plain_device():
            (plain, _), _ = helpers.plain_attention(
                (q, k, v), zeros, ok, keep, scale=scale, rate=rate
            )
    helpers.assert_lse(lse, exact.lse)
    helpers.assert_close("out", out, exact.out, plain)
    for a, b in zip((out, lse), again, strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), "other bits the second time"


# Few tiles and options where nothing is at stake but the definition itself.
IMPLEMENTATIONS = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def forms(implementation):
    """(head dim, options) to run."""
    if implementation == "cpu":
        return [(64, "none"), (64, "window")]
    return [(64, "none"), (256, "none"), *((128, option) for option in OPTIONS)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("slope", SLOPES)
def test_scores(implementation, dtype, slope):
    for head_dim, option in forms(implementation):
        q, k = scores_as_tensors(SLOPES[slope], dtype, head_dim, seed=head_dim)
        v = helpers.random(3, dtype, (1, SEQ_K, HEADS, head_dim))[0]
        check_forward(implementation, q, k, v, option)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("slope", ["growing", "falling", "spike last", "far below zero", "equal"])
def test_many_jobs(slope, head_dim):
    """More tiles than a GPU takes at once: what a kernel that goes on to the next tile begins with.

    32 keys more than queries: of the tile of keys that is first, half of a warpgroup sees nothing.
    """
    sizes = dict(batch=100, seq_q=256, seq_k=288)
    for option in ("none", "causal"):
        q, k = scores_as_tensors(SLOPES[slope], "bfloat16", head_dim, seed=head_dim, **sizes)
        v = helpers.random(3, "bfloat16", k.shape)[0]
        check_forward("cuda", q, k, v, option)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("slope", ["growing", "falling", "saw", "equal"])
def test_values_near_overflow(implementation, dtype, slope):
    """No overflow before that of the sum of a row's values: O is normalised at its end.

    In float16 that is beyond the type's own range.
    """
    top = min(float(jnp.finfo(dtype).max), float(jnp.finfo(np.float32).max) / SEQ_K)
    for head_dim, option in forms(implementation):
        q, k = scores_as_tensors(SLOPES[slope], dtype, head_dim, seed=1)
        rng = np.random.default_rng(2)
        v = rng.uniform(0.7, 0.98, (1, SEQ_K, HEADS, head_dim)) * top
        v *= rng.choice([-1, 1], (1, 1, HEADS, head_dim))  # a column's values do not cancel
        if OPTIONS[option].get("dropout_rate"):
            v *= 0.5  # what is kept is scaled up
        check_forward(implementation, q, k, v.astype(jnp.dtype(dtype)), option)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("slope", ["growing", "saw", "far below zero", "far above zero"])
@pytest.mark.parametrize("dout_scale", [2.0**-12, 1.0, 2.0**9])
def test_gradients(implementation, dtype, slope, dout_scale):
    """lse and delta far from 1: the Hopper backward adds them up from 16-bit parts."""
    options = dict(is_causal=True, causal_offset="bottom_right")
    ok = reference.allowed(1, HEADS, SEQ_Q, SEQ_K, **helpers.mask_options(options))
    for head_dim in (64,) if implementation == "cpu" else (64, 128, 256):
        q, k = scores_as_tensors(SLOPES[slope], dtype, head_dim, seed=head_dim)
        v = helpers.random(3, dtype, (1, SEQ_K, HEADS, head_dim))[0]
        helpers.check_call(
            implementation,
            functools.partial(helpers.attend_packed, "separate", implementation, options),
            (q, k, v),
            ok=ok,
            scale=head_dim**-0.5,
            dout_scale=dout_scale,
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**-14])
def test_tiny_scale(implementation, dtype, scale):
    """Probabilities that are nearly equal; lse / scale is beyond float16 with the first."""
    q, k, v = helpers.random(
        7, dtype, (1, SEQ_Q, HEADS, 64), (1, SEQ_K, HEADS, 64), (1, SEQ_K, HEADS, 64)
    )
    options = dict(scale=scale)
    helpers.check_call(
        implementation,
        functools.partial(helpers.attend_packed, "separate", implementation, options),
        (q, k, v),
        ok=np.ones((1, HEADS, SEQ_Q, SEQ_K), bool),
        scale=scale,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nan_stays_in_its_row(implementation, dtype):
    """A NaN in one query makes that row NaN, and no other; the row beside it is not disturbed."""
    q, k, v = helpers.random(
        6, dtype, (1, SEQ_Q, HEADS, 64), (1, SEQ_K, HEADS, 64), (1, SEQ_K, HEADS, 64)
    )
    call = jax.jit(functools.partial(jax_flash.attention, implementation=implementation))
    with jax.default_device(helpers.device(implementation)):
        clean = np.asarray(call(q, k, v), np.float32)
        q[0, 77, 1, 5] = np.nan
        got = np.asarray(call(q, k, v), np.float32)
    assert np.isnan(got[0, 77, 1]).all()
    got[0, 77, 1] = clean[0, 77, 1]
    np.testing.assert_allclose(got, clean, rtol=2e-2, atol=2e-3)
