"""Cross-entropy of hidden states: its numbers, its chunks, the memory it takes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash
from jax_flash._ops import cross_entropy as ops
from jax_flash._ops import cross_entropy_linear as linear_ops
from jax_flash.reference import cross_entropy as reference
from tests import cross_entropy_cases as cases
from tests import helpers, programs
from tests.cross_entropy_cases import (
    IGNORED,
    OPTIONS,
    linear_rows,
    plain_linear,
    some_labels,
    with_gradients,
)
from tests.programs import assert_close, equations, normal

quick_compilation = programs.quick_compilation
on_the_cpu = cases.on_the_cpu
implementation = cases.implementation


# tokens, D, V, chunk, bias, options: chunks that divide the tokens, that do not, of one token, one
LINEAR = {
    "divides": ((2, 6), 24, 37, 3, True, OPTIONS["plain"]),
    "remainder": ((2, 7), 9, 64, 4, False, OPTIONS["all"]),
    "one_token_each": ((5,), 1, 2, 1, True, OPTIONS["smoothing"]),
    "one_chunk": ((3, 1, 5), 32, 131, None, True, OPTIONS["z_loss"]),
    "long_rows": ((19,), 8, 9001, 8, True, OPTIONS["smoothing"]),  # one kernel in both directions
    "longer_rows": ((7,), 8, 25003, None, False, OPTIONS["z_loss"]),
}


TYPED_LINEAR = [("float32", case) for case in LINEAR]
TYPED_LINEAR += [("bfloat16", "remainder"), ("bfloat16", "one_chunk"), ("float16", "divides")]


def error_in_sequence(a: np.ndarray, b: np.ndarray) -> float:
    """What a @ b loses where float32 terms are added one after the other, as XLA's products of few
    rows do: 25003 of them, five times as much as in the plain form's product. A lost column would
    not show in dhidden then; it does in dweight, which sums over tokens."""
    terms = np.asarray(a, np.float64).reshape(-1, a.shape[-1], 1) * np.asarray(b, np.float64)
    in_sequence = np.cumsum(terms.astype(np.float32), axis=1, dtype=np.float32)[:, -1]
    return float(np.abs(in_sequence - terms.sum(1)).max())


@pytest.mark.parametrize("dtype,case", TYPED_LINEAR)
def test_linear(implementation, dtype, case):
    shape, width, vocabulary, chunk, has_bias, options = LINEAR[case]
    labels = some_labels(0, shape, vocabulary, options.get("ignore_index", IGNORED))
    hidden, weight, bias = helpers.random(
        1, dtype, (*shape, width), (width, vocabulary), (vocabulary,)
    )
    cotangents = helpers.random(2, "float32", shape, shape)
    fixed = reference.Options(**options)
    logits = reference.linear_logits(hidden, weight, bias if has_bias else None)
    exact = reference.forward(logits, labels, fixed)
    dlogits = reference.backward(logits, labels, *cotangents, fixed)
    exact_gradients = reference.linear_backward(hidden, weight, dlogits)
    tensors = (hidden, weight, bias) if has_bias else (hidden, weight)
    arrays = tensors, labels, tuple(cotangents)

    def of(f, **options):
        def call(hidden, weight, *rest):
            bias, labels = rest if has_bias else (None, *rest)
            return f(hidden, weight, bias, labels, **options)

        return jax.jit(functools.partial(with_gradients, call))(*arrays)

    (plain_loss_, _), plain_gradients = of(plain_linear, **options)
    (loss, lse), gradients = of(
        linear_rows, chunk_size=chunk, implementation=implementation, **options
    )
    np.testing.assert_allclose(lse, exact.lse, rtol=1e-5, atol=1e-5)
    helpers.assert_close("loss", loss, exact.loss, plain_loss_)
    names = ("dhidden", "dweight", "dbias")[: len(tensors)]
    for name, *values in zip(names, gradients, exact_gradients, plain_gradients, strict=False):
        assert values[0].dtype == jnp.dtype(dtype)
        sums_a_long_row = case == "longer_rows" and name == "dhidden"
        inherent = error_in_sequence(dlogits, weight.T) if sums_a_long_row else 0.0
        helpers.assert_close(name, *values, inherent)


MEANS = [("float32", case, r) for case, r in zip(LINEAR, ("mean", "sum") * 3, strict=True)]
MEANS += [("bfloat16", "remainder", "mean"), ("float16", "one_chunk", "sum")]


@pytest.mark.parametrize("dtype,case,reduction", MEANS)
@pytest.mark.parametrize("of_lse", [False, True])
def test_linear_means_and_sums(implementation, dtype, case, reduction, of_lse):
    """The forward makes their gradients; a cotangent of the lse adds its own."""
    shape, width, vocabulary, chunk, has_bias, options = LINEAR[case]
    labels = some_labels(0, shape, vocabulary, options.get("ignore_index", IGNORED))
    tensors = helpers.random(1, dtype, (*shape, width), (width, vocabulary), (vocabulary,))
    tensors = tensors[: 2 + has_bias]
    dlse = helpers.random(2, "float32", shape)[0] * of_lse
    counted = (labels != options.get("ignore_index", IGNORED)).sum() if reduction == "mean" else 1
    fixed = reference.Options(**options)
    weight = tensors[1]
    logits = reference.linear_logits(*tensors)
    exact = reference.forward(logits, labels, fixed)
    dlogits = reference.backward(logits, labels, 3 / counted, dlse, fixed)
    exact_gradients = reference.linear_backward(*tensors[:2], dlogits)

    def of(f):
        def weighted(*tensors):
            loss, lse = f(*tensors)
            return 3 * loss + jnp.sum(dlse * lse) * of_lse, (loss, lse)

        call = jax.grad(weighted, tuple(range(len(tensors))), has_aux=True)
        return jax.jit(call)(*tensors)

    def plain(hidden, weight, bias=None):
        loss, lse = plain_linear(hidden, weight, bias, labels, **options)
        return loss.sum() / counted, lse

    def ours(hidden, weight, bias=None):
        call = functools.partial(jax_flash.linear_softmax_cross_entropy, **options)
        by = dict(reduction=reduction, chunk_size=chunk, implementation=implementation)
        return call(hidden, weight, labels, bias, return_lse=True, **by)

    plain_gradients, (plain_value, _) = of(plain)
    gradients, (loss, lse) = of(ours)
    np.testing.assert_allclose(lse, exact.lse, rtol=1e-5, atol=1e-5)
    helpers.assert_close("loss", loss, exact.loss.sum() / counted, plain_value)
    names = ("dhidden", "dweight", "dbias")[: len(tensors)]
    for name, *values in zip(names, gradients, exact_gradients, plain_gradients, strict=False):
        assert values[0].dtype == jnp.dtype(dtype)
        sums_a_long_row = case == "longer_rows" and name == "dhidden"
        inherent = error_in_sequence(dlogits, weight.T) if sums_a_long_row else 0.0
        helpers.assert_close(name, *values, inherent)


@pytest.mark.parametrize("limit", [(5, 1), (8, 8)])
def test_groups_of_chunks(implementation, limit, monkeypatch):
    """Some groups, and one, of some chunks, by limits that do not divide the tokens."""
    monkeypatch.setattr(linear_ops, "_limit", lambda config, weight: limit)
    monkeypatch.setattr(linear_ops, "_GROUP_BYTES", 16 * 4 * 31)
    (hidden, weight), labels = (normal(0, 83, 18), normal(1, 18, 31)), some_labels(2, (83,), 31)
    config = ops.CrossEntropyConfig(1.0, False)
    assert linear_ops.groups(config, weight, 83) == ((6, 3, 5) if limit[1] == 1 else (6, 2, 8))
    assert linear_ops.groups(config, weight, 15) == ((1, 3, 5) if limit[1] == 1 else (1, 2, 8))
    call = functools.partial(jax_flash.linear_softmax_cross_entropy, implementation=implementation)

    def ours(hidden, weight):
        return call(hidden, weight, labels, label_smoothing=0.1, z_loss=0.1)

    def plain(hidden, weight):
        rows, _ = plain_linear(hidden, weight, None, labels, label_smoothing=0.1, z_loss=0.1)
        return rows.sum() / (labels != IGNORED).sum()

    for tokens in (83, 15):
        of = functools.partial(jax.value_and_grad, argnums=(0, 1))
        labels = labels[:tokens]
        got = jax.jit(of(ours))(hidden[:tokens], weight)
        assert_close(got, jax.jit(of(plain))(hidden[:tokens], weight))


def test_a_scaled_loss_saves_float16_gradients(implementation):
    """Whose parts, 1 / (tokens * classes) = 2**-24, are as small as a float16 can be."""
    tokens, classes, scale = 4096, 4096, 2.0**16
    hidden, weight, labels = (
        normal(0, tokens, 4),
        normal(1, 4, classes),
        some_labels(2, (tokens,), 9),
    )

    def gradients(dtype):
        call = functools.partial(jax_flash.linear_softmax_cross_entropy, label_smoothing=0.5)
        run = functools.partial(call, labels=labels, implementation=implementation)
        scaled = jax.grad(lambda *x: scale * run(*x), (0, 1))
        return jax.jit(scaled)(hidden.astype(dtype), weight.astype(dtype))

    for got, want in zip(gradients(jnp.float16), gradients(jnp.float32), strict=True):
        error = got.astype(jnp.float32) - want
        assert jnp.linalg.norm(error) < 5e-3 * jnp.linalg.norm(want)


def test_a_float16_mean_of_many_tokens_is_finite(implementation):
    """Its sum is not: 8192 tokens with one label, hidden states of 30."""
    hidden, weight = jnp.full((8192, 8), 30, jnp.float16), jnp.zeros((8, 4), jnp.float16)
    call = functools.partial(jax_flash.linear_softmax_cross_entropy, implementation=implementation)
    labels = jnp.ones(8192, jnp.int32)
    gradient = jax.jit(jax.grad(lambda weight: call(hidden, weight, labels)))(weight)
    want = 30 * (jnp.full((8, 4), 0.25) - (jnp.arange(4) == 1))
    np.testing.assert_allclose(gradient, want, rtol=1e-3)


def test_a_mean_makes_its_logits_once():
    arrays = normal(0, 6, 4), normal(1, 4, 9)

    def primitives(**options):
        def loss(hidden, weight):
            call = functools.partial(jax_flash.linear_softmax_cross_entropy, **options)
            loss, lse = call(hidden, weight, jnp.arange(6), return_lse=True)
            return loss.sum(), lse

        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1), has_aux=True))(*arrays)
        names = [e.primitive.name for e in equations(jaxpr)]
        return [n.removeprefix("linear_cross_entropy_") for n in names if n.startswith("linear_")]

    assert primitives() == ["gradients"]
    assert primitives(reduction="sum") == ["gradients"]
    assert primitives(reduction="none") == ["forward", "backward"]
    without = jax.make_jaxpr(jax_flash.linear_softmax_cross_entropy)(*arrays, jnp.arange(6))
    assert "linear_cross_entropy_gradients" not in str(without)


def test_the_chunk_changes_no_more_than_orders_of_sums():
    hidden, weight, labels = normal(0, 300, 8), normal(1, 8, 50), some_labels(2, (300,), 50)

    def of(chunk):
        call = functools.partial(jax_flash.linear_softmax_cross_entropy, chunk_size=chunk)
        return jax.jit(jax.value_and_grad(call, (0, 1)))(hidden, weight, labels)

    want = of(300)
    for chunk in (None, 7):
        assert_close(of(chunk), want)


# Memory -------------------------------------------------------------------------------------------


def optimised(f, *args, **jit):
    jax.config.update("jax_disable_most_optimizations", False)
    return jax.jit(f, **jit).lower(*args).compile()


def test_the_linear_form_never_holds_all_logits():
    """Forward, backward and second derivative: no array of tokens x V, memory of some chunks."""
    tokens, width, vocabulary, chunk = 2048, 8, 1536, 32
    hidden, weight = normal(0, tokens, width), normal(1, width, vocabulary)
    labels = some_labels(2, (tokens,), vocabulary)
    loss = functools.partial(
        jax_flash.linear_softmax_cross_entropy, label_smoothing=0.1, chunk_size=chunk
    )

    def product(*x):
        gradient = jax.grad(loss)
        return jax.grad(lambda hidden: jnp.sum(gradient(hidden, *x[1:]) ** 2))(x[0])

    logits_bytes = 4 * tokens * vocabulary
    for f in (loss, jax.value_and_grad(loss, (0, 1)), product):
        compiled = optimised(f, hidden, weight, labels)
        elements, shape = programs.largest_array(compiled.as_text())
        assert elements <= chunk * vocabulary, shape
        assert compiled.memory_analysis().temp_size_in_bytes < logits_bytes / 2
    # The same question asked of what does hold them.
    compiled = optimised(lambda *x: plain_linear(*x, None, labels)[0].sum(), hidden, weight)
    assert programs.largest_array(compiled.as_text())[0] >= tokens * vocabulary


def test_chunks_and_groups_are_bounded():
    """Logits of a chunk: 256 MiB or what the weight has; their gradients: 1 GiB or its sum."""
    for chunk in (0, 1, 100, 5000):
        config = ops.CrossEntropyConfig(1.0, False, row_axes=1, chunk=chunk)
        for width, vocabulary in ((1, 1), (7, 997), (64, 1 << 24), (4096, 50257), (4096, 128256)):
            weight = jax.ShapeDtypeStruct((width, vocabulary), jnp.bfloat16)
            limit = chunk or max(linear_ops._CHUNK_LOGITS // vocabulary, width // 2, 128)
            for tokens in (1, 127, 128, 4097, 8192, 1 << 20):
                count, size = linear_ops.chunks(config, weight, tokens)
                assert (count - 1) * size < tokens <= count * size
                assert size <= limit
                count, each, size = linear_ops.groups(config, weight, tokens)
                assert (count - 1) * each * size < tokens <= count * each * size
                assert size <= limit
                kept = max(limit, 2 * width, linear_ops._GROUP_BYTES // 2 // vocabulary)
                assert each * size <= (chunk or kept + 128 * each)
