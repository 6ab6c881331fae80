"""Softmax over scores in memory: against its definition, and under JAX's transformations."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash
from jax_flash.reference import softmax as reference
from tests import helpers, programs
from tests.programs import (
    assert_close,
    assert_equal,
    collectives,
    custom_calls,
    equations,
    installed,
    normal,
)

quick_compilation = programs.quick_compilation

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
B, N, T, S = 2, 3, 5, 7
on_each = pytest.mark.parametrize(
    "implementation", ["xla", pytest.param("cuda", marks=pytest.mark.gpu)]
)


def hidden_of(*shape, seed=0):
    """bool: about a third is masked, and the first row of each block altogether."""
    hidden = np.random.default_rng(seed).random(shape) < 0.35
    hidden[..., 0, :] = True
    return hidden


def plain(scores, hidden, scale):
    """What one writes in jnp, in the operands' type."""
    s = jnp.where(hidden, -jnp.inf, scores * jnp.asarray(scale, scores.dtype))
    empty = jnp.all(s == -jnp.inf, -1, keepdims=True)
    return jnp.where(empty, 0, jax.nn.softmax(jnp.where(empty, 0, s), axis=-1))


def with_gradient(f, scores, dprobs):
    probs, pullback = jax.vjp(f, scores)
    return probs, *pullback(dprobs)


def check(f, scores, hidden, scale):
    """Probabilities and gradient of f(scores) against the definition."""
    dprobs = helpers.random(7, scores.dtype, scores.shape)[0]
    exact = reference.forward(scores, hidden, scale)
    exact_grad = reference.backward(exact, dprobs, scale)
    by_formula = functools.partial(plain, hidden=hidden, scale=scale)
    plain_probs, plain_grad = jax.jit(functools.partial(with_gradient, by_formula))(scores, dprobs)
    probs, grad = jax.jit(functools.partial(with_gradient, f))(scores, dprobs)
    assert probs.dtype == grad.dtype == scores.dtype
    helpers.assert_close("probs", probs, exact, plain_probs)
    helpers.assert_close("dscores", grad, exact_grad, plain_grad)
    assert not np.asarray(probs)[np.broadcast_to(hidden, probs.shape)].any()
    return probs


# The numbers --------------------------------------------------------------------------------------

# scores, mask, scale, the mask's type: rows of 1, primes, 8 mod 16, rows that start anywhere; a
# width of each of the kernels, with and without a rest: part of a warp, a warp, blocks, too long
MASKED = {
    "batched_mask": ((2, 3, 5, 37), (2, 1, 5, 37), 0.7, np.bool_),
    "shared_mask": ((2, 3, 7, 261), (1, 1, 7, 261), 2.0, np.uint8),
    "one_key": ((3, 2, 5, 1), (3, 1, 5, 1), 1.0, np.bool_),
    "key_padding": ((2, 3, 4, 24), (2, 1, 1, 24), -1.5, np.int32),
    "mask_of_heads": ((2, 3, 5, 40), (1, 3, 5, 40), 1.0, np.bool_),
    "a_warp": ((2, 2, 3, 1021), (2, 1, 3, 1021), 1.0, np.bool_),
    "a_full_warp": ((2, 2, 9, 2048), (2, 1, 9, 2048), 0.125, np.bool_),
    "a_block": ((2, 2, 3, 2056), (2, 1, 3, 2056), 1.0, np.bool_),
    "a_large_block": ((1, 2, 3, 8197), (1, 1, 3, 8197), 2.0, np.bool_),
    "a_full_block": ((1, 2, 2, 16384), (1, 1, 2, 16384), 1.0, np.uint8),
    "long_rows": ((1, 2, 3, 16411), (1, 1, 3, 16411), 3.0, np.bool_),
    "longer_rows": ((1, 2, 2, 40_004), (1, 2, 1, 40_004), 3.0, np.bool_),
}


@on_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", MASKED)
def test_masked(case, dtype, implementation):
    shape, mask_shape, scale, mask_dtype = MASKED[case]
    scores = helpers.random(1, dtype, shape)[0] * 3
    hidden = hidden_of(*mask_shape)
    mask = hidden.astype(mask_dtype)
    options = dict(mask=mask, scale=scale, implementation=implementation)
    f = functools.partial(jax_flash.scaled_masked_softmax, **options)
    probs = np.asarray(check(f, scores, hidden, scale), np.float64)
    seen = ~np.broadcast_to(hidden, shape).all(-1)
    np.testing.assert_allclose(probs.sum(-1)[seen], 1, atol=40 * float(jnp.finfo(dtype).eps))


CAUSAL = [(2, 3, 37, 37), (1, 1), (3, 41, 19), (2, 5, 130), (2, 517, 517), (2100, 2100)]
CAUSAL += [(2, 9, 20_011), (3, 40_000)]


@on_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CAUSAL, ids=str)
def test_causal(shape, dtype, implementation):
    scores = helpers.random(2, dtype, shape)[0] * 3
    options = dict(scale=0.5, implementation=implementation)
    f = functools.partial(jax_flash.scaled_causal_softmax, **options)
    check(f, scores, reference.upper_triangle(*shape[-2:]), 0.5)


@on_each
def test_without_a_mask(implementation):
    scores = helpers.random(3, np.float32, (B, N, T, S))[0]
    f = functools.partial(jax_flash.scaled_masked_softmax, implementation=implementation)
    check(f, scores, np.zeros((T, S), bool), 1.0)


@on_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [7, 2100, 20_001])
def test_bitwise_repeatable(size, dtype, implementation):
    scores, dprobs = helpers.random(4, dtype, (3, 67, size), (3, 67, size))
    f = functools.partial(jax_flash.scaled_causal_softmax, implementation=implementation)
    call = jax.jit(functools.partial(with_gradient, f))
    assert_equal(call(scores, dprobs), call(scores, dprobs))


@on_each
def test_what_is_written_over_may_be_needed_again(implementation):
    """The gradient takes dP's memory, unless somebody reads dP later or it is an argument."""
    scores, dprobs = normal(0, 2, 37, 41), normal(1, 2, 37, 41)
    f = functools.partial(jax_flash.scaled_causal_softmax, implementation=implementation)
    before = np.asarray(dprobs)

    def twice(scores, dprobs):
        doubled = 2 * dprobs
        _, pullback = jax.vjp(f, scores)
        return pullback(dprobs)[0], pullback(doubled)[0], doubled

    grad, doubled_grad, doubled = jax.jit(twice)(scores, dprobs)
    assert_equal(doubled, 2 * before)
    assert_equal(dprobs, before)
    assert_close(doubled_grad, 2 * grad, 1e-6)


@pytest.mark.gpu
def test_more_elements_than_int32_counts_cuda():
    """Offsets of 64 bits: the last rows of 2.2e9 scores are those of a small call."""
    scores = jax.random.normal(jax.random.key(0), (17, 8200, 16384), jnp.bfloat16)
    f = functools.partial(jax_flash.scaled_causal_softmax, scale=2.0, implementation="cuda")
    out, grad = jax.jit(functools.partial(with_gradient, f))(scores, scores)
    last = scores[-1:, -3:]
    ids = jnp.arange(8197, 8200)
    hidden = jnp.arange(16384)[None] > ids[:, None]
    small = functools.partial(jax_flash.scaled_masked_softmax, mask=hidden[None], scale=2.0)
    want = with_gradient(functools.partial(small, implementation="cuda"), last, last)
    assert_close((out[-1:, -3:], grad[-1:, -3:]), want, 1e-2)


def test_float64():
    with jax.enable_x64(True):
        scores = np.random.default_rng(0).standard_normal((2, T, S))
        hidden = hidden_of(1, T, S)
        f = functools.partial(jax_flash.scaled_masked_softmax, mask=hidden)
        probs, grad = with_gradient(f, scores, np.cos(scores))
        assert probs.dtype == grad.dtype == np.float64
        exact = reference.forward(scores, hidden)
        np.testing.assert_allclose(probs, exact, atol=1e-14)
        np.testing.assert_allclose(grad, reference.backward(exact, np.cos(scores)), atol=1e-14)


@on_each
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [S, 300, 2500, 40_000])
def test_rows_that_are_no_numbers(width, dtype, implementation):
    """Row by row: all -inf; some -inf; NaN; +inf; NaN only where masked; the largest numbers."""
    scores = np.zeros((6, width), dtype)
    scores[0], scores[1, 1:3], scores[2, 4], scores[3, 4] = -np.inf, -np.inf, np.nan, np.inf
    scores[4, 0], scores[5, 3] = np.nan, jnp.finfo(dtype).max
    hidden = np.zeros((6, width), bool)
    hidden[:, 0] = True
    options = dict(mask=hidden, implementation=implementation)
    f = functools.partial(jax_flash.scaled_masked_softmax, **options)
    probs, grad = with_gradient(f, scores, np.where(hidden, np.nan, 1).astype(dtype))
    np.testing.assert_array_equal(
        np.isnan(np.asarray(probs, np.float32)), np.isnan(reference.forward(scores, hidden))
    )
    np.testing.assert_allclose(
        np.asarray(probs, np.float32),
        reference.forward(scores, hidden).astype(np.float32),
        rtol=float(jnp.finfo(dtype).eps),
        atol=float(jnp.finfo(dtype).smallest_subnormal),
    )
    grad = np.asarray(grad, np.float32)
    assert np.isnan(grad[2:4, 1:]).all() and not grad[:, 0].any()
    np.testing.assert_allclose(grad[[0, 1, 4, 5]], 0, atol=float(jnp.finfo(dtype).eps))


@on_each
@pytest.mark.parametrize("size", [T, 300, 2500])
def test_causal_rows_do_not_look_above_the_diagonal(size, implementation):
    scores = normal(0, size, size)
    ruined = jnp.where(reference.upper_triangle(size, size), jnp.nan, scores)
    f = functools.partial(jax_flash.scaled_causal_softmax, implementation=implementation)
    assert_equal(with_gradient(f, ruined, ruined), with_gradient(f, scores, scores))


@pytest.mark.parametrize("shape", [(0, N, T, S), (B, N, 0, S), (B, N, T, 0)])
def test_nothing(shape):
    f = functools.partial(jax_flash.scaled_masked_softmax, mask=jnp.ones((1, 1, *shape[-2:]), bool))
    for g in (f, jax_flash.scaled_causal_softmax):
        probs, grad = with_gradient(g, jnp.zeros(shape), jnp.zeros(shape))
        assert probs.shape == grad.shape == shape


def test_batch_per_block():
    """Two rows a warp up to 128 keys, one beyond; several rows a warp below 32."""
    sizes = {1: 256, 3: 64, 16: 16, 17: 8, 128: 8, 129: 4, 8192: 4, 100_000: 4}
    assert {s: jax_flash.softmax_batch_per_block(5, s, 2, 3) for s in sizes} == sizes
    for bad in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="seq_k: expected a positive int, got"):
            jax_flash.softmax_batch_per_block(1, bad, 1, 1)


# Transformations ----------------------------------------------------------------------------------


def masked(scores, mask, implementation=None):
    return jax_flash.scaled_masked_softmax(scores, mask, scale=0.7, implementation=implementation)


def causal(scores, _, implementation=None):
    return jax_flash.scaled_causal_softmax(scores, scale=0.7, implementation=implementation)


CALLS = {
    "masked": (masked, hidden_of(B, 1, T, S)),
    "causal": (causal, reference.upper_triangle(T, S)),
}


@pytest.mark.parametrize("call", CALLS)
def test_second_derivative(call):
    f, hidden = CALLS[call]
    scores, direction = normal(0, B, N, T, S), normal(1, B, N, T, S)

    def product(g):
        def slope(x):
            return jnp.vdot(jax.grad(lambda x: jnp.sum(jnp.sin(3 * g(x))))(x), direction)

        return jax.jit(jax.grad(slope))(scores)

    assert_close(product(lambda x: f(x, hidden)), product(lambda x: plain(x, hidden, 0.7)))


@pytest.mark.parametrize("call", CALLS)
def test_gradient_is_of_probabilities_alone(call):
    """Nothing else of the scores' size is saved, and recomputing it can be forbidden by name."""
    f, hidden = CALLS[call]
    scores, mask = normal(0, B, N, T, S), jnp.asarray(hidden)
    probs, pullback = jax.vjp(lambda x: f(x, mask), scores)
    saved = [x for x in jax.tree.leaves(pullback) if getattr(x, "shape", ()) == scores.shape]
    assert len(saved) == 1
    assert_equal(saved[0], probs)
    policy = checkpoint_policies.save_only_these_names("softmax_probs")
    for kept, runs in ((policy, 1), (checkpoint_policies.nothing_saveable, 2)):
        again = jax.checkpoint(lambda x: jnp.sin(f(x, mask)), policy=kept)
        gradient = jax.grad(lambda x, again=again: jnp.sum(again(x)))
        jaxpr = jax.make_jaxpr(gradient)(scores)
        assert len(equations(jaxpr, "softmax_forward")) == runs
        assert len(equations(jaxpr, "softmax_backward")) == 1


@on_each
def test_vmap_of_any_operand(implementation):
    scores, mask = normal(0, 4, B, N, T, S), jnp.asarray(hidden_of(4, B, 1, T, S))

    def results(scores, mask):
        f = functools.partial(masked, mask=mask, implementation=implementation)
        return with_gradient(f, scores, jnp.cos(scores))

    want = [results(scores[i], mask[i]) for i in range(4)]
    want = jax.tree.map(lambda *x: jnp.stack(x), *want)
    assert_close(jax.jit(jax.vmap(results))(scores, mask), want)
    moved = jnp.moveaxis(scores, 0, 3), jnp.moveaxis(mask, 0, -1)
    assert_close(jax.jit(jax.vmap(results, (3, -1)))(*moved), want)
    for axes in ((0, None), (None, 0)):
        given = [x if axis == 0 else x[0] for x, axis in zip((scores, mask), axes, strict=True)]
        each = [
            results(*(x[i] if axis == 0 else x for x, axis in zip(given, axes, strict=True)))
            for i in range(4)
        ]
        want = jax.tree.map(lambda *x: jnp.stack(x), *each)
        assert_close(jax.jit(jax.vmap(results, axes))(*given), want)
    own = functools.partial(causal, _=None, implementation=implementation)
    twice = jax.vmap(jax.vmap(own))
    assert_equal(twice(scores), own(scores))


@pytest.mark.parametrize("call", CALLS)
@installed("cuda")
def test_lowers_for_cuda(call):
    """Two custom calls, and the gradient takes the memory of what comes."""
    f, hidden = CALLS[call]
    scores, mask = normal(0, B, N, T, S), jnp.asarray(hidden)
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(f(x, mask)))))
    text = gradient.trace(scores).lower(lowering_platforms=("cuda",)).as_text()
    flat = "1x1x6x5x7xf32"  # a mask that heads share keeps them apart from the batch
    whole = flat if call == "causal" else "1x2x3x5x7xf32"
    option, off = ("0xi1", "5xi32") if call == "causal" else ("1x2x1x5x7xi1", "0xi32")
    assert custom_calls(text) == [
        ("jax_flash.softmax_forward", [whole, option, off], [whole]),
        ("jax_flash.softmax_backward", [flat, flat, off], [flat]),
    ]
    assert "exponential" not in text and text.count("optimization_barrier") == 1
    alias = r"output_operand_alias<output_tuple_indices = \[\], operand_index = 1"
    assert len(re.findall(alias, text)) == 1


def test_refuses_what_no_kernel_serves():
    with jax.enable_x64(True):
        scores = np.zeros((T, S))
        f = jax.jit(lambda x: jax_flash.scaled_causal_softmax(x))
        with pytest.warns(UserWarning, match="no cuda kernel for this call"):
            text = f.trace(scores).lower(lowering_platforms=("cuda",)).as_text()
    assert "exponential" in text and "jax_flash.softmax" not in text


def test_scan_and_export():
    scores = normal(0, 3, B, T, S)
    _, got = jax.lax.scan(lambda carry, x: (carry, causal(x, None)), 0, scores)
    assert_equal(got, causal(scores, None))
    batch, length = jax.export.symbolic_shape("b, t")
    shape = jax.ShapeDtypeStruct((batch, length, S), jnp.float32)
    exported = jax.export.export(
        jax.jit(lambda x: causal(x, None)), disabled_checks=jax_flash.export_checks()
    )(shape)
    assert_close(jax.export.deserialize(exported.serialize()).call(scores[0]), causal(scores[0], 0))


# Sharding -----------------------------------------------------------------------------------------

CUT = {
    "batch_and_heads": (P("a", "b"), P("a"), False),
    "rows": (P(None, None, ("a", "b")), P(None, None, ("a", "b")), False),
    "batch_and_rows_mask_whole": (P("a", None, "b"), P(), False),
    "columns": (P("a", None, None, "b"), P("a"), True),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("case", CUT)
def test_sharded(case, call):
    """Batch, heads and rows move nothing; a row that is cut is gathered."""
    spec, mask_spec, gathers = CUT[case]
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:8]).reshape(2, 4), ("a", "b"))
    scores, mask = normal(0, 4, 4, 8, 12), jnp.asarray(hidden_of(4, 1, 8, 12))

    def f(scores, mask):
        return with_gradient(lambda x: CALLS[call][0](x, mask), scores, jnp.cos(scores))

    want = jax.jit(f)(scores, mask)
    placed = [
        jax.device_put(x, NamedSharding(mesh, s)) for x, s in ((scores, spec), (mask, mask_spec))
    ]
    compiled = jax.jit(f).lower(*placed).compile()
    traffic = collectives(compiled.as_text())
    got = compiled(*placed)
    assert set(traffic) == ({"all-gather"} if gathers else set())
    assert_close(jax.device_get(got), jax.device_get(want), 1e-6)
    if not gathers:
        assert all(x.sharding.is_equivalent_to(placed[0].sharding, 4) for x in got)


def test_shard_map_of_rows_by_batch():
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:4]), ("a",))
    scores = normal(0, 4, N, T, S)
    f = jax.shard_map(lambda x: causal(x, None), mesh=mesh, in_specs=P("a"), out_specs=P("a"))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(f(x)))))
    want = jax.grad(lambda x: jnp.sum(jnp.sin(causal(x, None))))(scores)
    assert_close(jax.device_get(gradient(scores)), jax.device_get(want), 1e-6)


# Bad input ----------------------------------------------------------------------------------------

SCORES = np.zeros((B, N, T, S), np.float32)
MASKED_CALL, CAUSAL_CALL = jax_flash.scaled_masked_softmax, jax_flash.scaled_causal_softmax

# the call, its arrays and options, the exception, and what its text must say
REFUSED = {
    "integers": (
        MASKED_CALL,
        (SCORES.astype(int),),
        {},
        TypeError,
        "scores: expected a floating-point array, got int",
    ),
    "rank": (CAUSAL_CALL, (SCORES[0, 0, 0],), {}, ValueError, "scores: expected at least 2 axes"),
    "mask_type": (
        MASKED_CALL,
        (SCORES, SCORES),
        {},
        TypeError,
        r"mask: expected a boolean \(or 0/1 integer\) array, got float32",
    ),
    "mask_rank": (
        MASKED_CALL,
        (SCORES, np.zeros((T, S), bool)),
        {},
        ValueError,
        r"mask: expected shape \(2, 3, 5, 7\), with 1 on any axis but the last, "
        r"got shape \(5, 7\)",
    ),
    "mask_batch": (
        MASKED_CALL,
        (SCORES, np.zeros((3, 1, T, S), bool)),
        {},
        ValueError,
        r"mask: expected .* got shape \(3, 1, 5, 7\)",
    ),
    "mask_keys": (
        MASKED_CALL,
        (SCORES, np.zeros((B, 1, T, 1), bool)),
        {},
        ValueError,
        r"mask: expected .* got shape \(2, 1, 5, 1\)",
    ),
    "scale_array": (
        CAUSAL_CALL,
        (SCORES,),
        dict(scale=jnp.ones(())),
        TypeError,
        "scale: expected a Python float",
    ),
    "unknown": (
        CAUSAL_CALL,
        (SCORES,),
        dict(implementation="triton"),
        ValueError,
        "implementation: expected one of .* got 'triton'",
    ),
    "cpu": (
        CAUSAL_CALL,
        (SCORES,),
        dict(implementation="cpu"),
        NotImplementedError,
        "implementation='cpu': softmax has no cpu kernels",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    call, arrays, options, error, text = REFUSED[case]
    with pytest.raises(error) as caught:
        jax.eval_shape(functools.partial(call, **options), *arrays)
    assert re.search(text, str(caught.value)), str(caught.value)


def test_static_scale_refuses_a_traced_value():
    with pytest.raises(TypeError, match="scale: expected a Python float"):
        jax.jit(lambda x, scale: jax_flash.scaled_causal_softmax(x, scale=scale))(SCORES, 1.0)


def test_xla_by_name():
    scores = normal(0, T, S)
    named = jax_flash.scaled_causal_softmax(scores, implementation="xla")
    assert_equal(named, jax_flash.scaled_causal_softmax(scores))
