"""Softmax cross-entropy of logits: its numbers, labels and values that are none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash
from jax_flash._ops import cross_entropy as ops
from jax_flash.reference import cross_entropy as reference
from tests import cross_entropy_cases as cases
from tests import helpers, programs
from tests.cross_entropy_cases import (
    DTYPES,
    IGNORED,
    OPTIONS,
    plain_loss,
    rows_of,
    some_labels,
    with_gradients,
)
from tests.programs import assert_close, assert_equal, normal

quick_compilation = programs.quick_compilation
on_the_cpu = cases.on_the_cpu
implementation = cases.implementation


ONCE = ("smoothing", "z_loss", "scale")  # in one type; the others in each
TYPED_OPTIONS = [(d, o) for o in OPTIONS for d in (DTYPES[:1] if o in ONCE else DTYPES)]


@pytest.mark.parametrize("dtype,option", TYPED_OPTIONS)
def test_options(implementation, dtype, option):
    check_logits(implementation, dtype, (3, 5), 67, OPTIONS[option])


@pytest.mark.parametrize("vocabulary", [1, 8, 997, 50257])
def test_vocabularies(implementation, vocabulary):
    options = dict(label_smoothing=0.2, z_loss=1e-3)
    check_logits(implementation, "bfloat16", (7,), vocabulary, options)


# Less than a vector, a row's threads, a tile and one more; primes, 8 mod 16, more than a block
# reads at once; rows that begin anywhere between two 16-byte boundaries.
WIDTHS = [2, 3, 7, 9, 15, 24, 33, 255, 257, 1032, 2047, 4099, 8200, 16384, 32003, 131071, 300007]


WIDE_CASES = [(d, v) for v in WIDTHS for d in DTYPES if d != "float16" or v in (257, 32003)]


@pytest.mark.gpu
@programs.installed("cuda")
@pytest.mark.parametrize("dtype,vocabulary", WIDE_CASES)
def test_widths_of_the_kernels(dtype, vocabulary):
    option = "all" if vocabulary % 4 == 3 else "plain"
    with jax.default_device(jax.devices("gpu")[0]):
        check_logits("cuda", dtype, (19 if vocabulary < 1e5 else 5,), vocabulary, OPTIONS[option])


def check_logits(implementation, dtype, shape, vocabulary, options):
    labels = some_labels(0, shape, vocabulary, options.get("ignore_index", IGNORED))
    (logits,) = helpers.random(1, dtype, (*shape, vocabulary))
    logits = (4 * logits).astype(logits.dtype)
    cotangents = helpers.random(2, "float32", shape, shape)
    fixed = reference.Options(**options)
    exact = reference.forward(logits, labels, fixed)
    exact_gradient = reference.backward(logits, labels, *cotangents, fixed)
    arrays = (logits,), labels, tuple(cotangents)

    plain = jax.jit(functools.partial(with_gradients, functools.partial(plain_loss, **options)))
    (plain_loss_, _), (plain_gradient,) = plain(*arrays)
    ours = rows_of(jax_flash.softmax_cross_entropy, implementation=implementation, **options)
    (loss, lse), (gradient,) = jax.jit(functools.partial(with_gradients, ours))(*arrays)

    assert loss.dtype == lse.dtype == jnp.float32 and gradient.dtype == logits.dtype
    helpers.assert_lse(lse, exact.lse)
    helpers.assert_close("loss", loss, exact.loss, plain_loss_)
    helpers.assert_close("dlogits", gradient, exact_gradient, plain_gradient)


def test_reductions(implementation):
    logits, labels = normal(0, 4, 5, 11), some_labels(1, (4, 5), 11)
    call = functools.partial(jax_flash.softmax_cross_entropy, implementation=implementation)

    @jax.jit
    def of_all(logits):
        with_lse = functools.partial(call, return_lse=True)
        return (
            rows_of(call)(logits, labels),
            jax.value_and_grad(with_lse, has_aux=True)(logits, labels),
            jax.value_and_grad(functools.partial(call, reduction="sum"))(logits, labels),
        )

    (rows, lse), ((mean, same_lse), of_mean), (total, of_total) = of_all(logits)
    counted = (labels != IGNORED).sum()
    assert 0 < counted < labels.size
    assert_close(total, rows.sum())
    assert_close(mean, rows.sum() / counted)
    assert_equal(same_lse, lse)
    assert_close(of_mean, of_total / counted)


def test_a_row_alone_and_float64():
    logits = normal(0, 13)
    loss, lse = jax.jit(rows_of(jax_flash.softmax_cross_entropy))(logits, 4)
    assert loss.shape == lse.shape == ()
    assert_close(loss, -jax.nn.log_softmax(logits)[4])
    weight = normal(1, 13, 6)
    assert_close(
        jax.jit(jax_flash.linear_softmax_cross_entropy)(logits, weight, 4),
        -jax.nn.log_softmax(logits @ weight)[4],
    )
    with jax.enable_x64(True):
        wide = np.random.default_rng(0).standard_normal((3, 7))
        call = functools.partial(jax_flash.softmax_cross_entropy, reduction="none")
        loss = jax.jit(call)(wide, np.arange(3))
        assert loss.dtype == jnp.float64
        exact = reference.forward(wide, np.arange(3)).loss
        np.testing.assert_allclose(loss, exact, rtol=1e-14)


# Labels and values that are none ------------------------------------------------------------------


def test_ignored_rows_count_for_nothing(implementation):
    """Whatever they hold: NaN, infinities; with the smoothing's sum and the z-loss's square."""
    labels = np.array([3, IGNORED, 1, IGNORED, IGNORED], np.int32)
    logits = np.array(normal(0, 5, 6))
    call = functools.partial(
        jax_flash.softmax_cross_entropy,
        label_smoothing=0.1,
        z_loss=1e-2,
        return_lse=True,
        implementation=implementation,
    )

    @jax.jit
    def run(logits, labels):
        (loss, lse), pullback = jax.vjp(lambda x: call(x, labels), logits)
        return loss, lse, *pullback((jnp.float32(1), jnp.ones_like(lse)))

    kept = [0, 2]
    want = run(logits[kept], labels[kept])
    logits[[1, 3, 4]] = [[np.nan], [np.inf], [-np.inf]]
    loss, lse, gradient = run(logits, labels)
    assert_close((loss, lse[np.array(kept)], gradient[np.array(kept)]), want)
    for array in (lse, gradient):
        assert not np.asarray(array)[[1, 3, 4]].any()


def test_all_ignored_and_no_rows_have_mean_zero():
    call = jax_flash.softmax_cross_entropy
    gradient = jax.jit(jax.value_and_grad(call))
    value, gradient = gradient(normal(0, 3, 4), jnp.full(3, IGNORED))
    assert value == 0 and not gradient.any()
    hidden, labels = jnp.zeros((2, 0, 4), jnp.bfloat16), jnp.zeros((2, 0), jnp.int32)
    linear = jax_flash.linear_softmax_cross_entropy
    value, gradients = jax.jit(jax.value_and_grad(linear, (0, 1)))(
        hidden, jnp.ones((4, 5), jnp.bfloat16), labels
    )
    assert value == 0 and value.dtype == jnp.float32
    assert gradients[0].shape == (2, 0, 4) and not gradients[1].any()
    loss, lse = rows_of(call)(hidden, labels)
    assert loss.shape == lse.shape == (2, 0)


def test_a_label_that_is_no_class_makes_its_row_nan(implementation):
    labels = np.array([5, 11, -1, -99, 2**31 - 1, -(2**31), IGNORED, 10])
    logits = normal(0, 8, 11)
    loss, gradient = jax.jit(
        lambda x: with_gradients(
            functools.partial(
                jax_flash.softmax_cross_entropy, reduction="none", implementation=implementation
            ),
            (x,),
            labels,
            jnp.ones(8),
        )
    )(logits)
    bad = np.array([False, True, True, True, True, True, False, False])
    np.testing.assert_array_equal(np.isnan(loss), bad)
    np.testing.assert_array_equal(np.isnan(gradient[0]).all(-1), bad)
    assert np.isfinite(gradient[0][~bad]).all()
    assert_close(loss[~bad], plain_loss(logits[~bad], labels[~bad])[0])
    assert np.isnan(jax.jit(jax_flash.softmax_cross_entropy)(logits, labels))


@pytest.mark.parametrize("dtype", ["int8", "uint32"])
def test_types_of_labels(dtype):
    """Also where ignore_index, or a class, is no number of the type."""
    logits = normal(0, 3, 300)
    labels = jnp.array([0, 99, 127], dtype)
    want = plain_loss(logits, labels.astype(jnp.int32))[0]

    @jax.jit
    def with_each(labels):
        call = functools.partial(jax_flash.softmax_cross_entropy, reduction="none")
        return [call(logits, labels, ignore_index=index) for index in (IGNORED, None, 127)]

    assert_close(with_each(labels), [want, want, want.at[2].set(0)])


def test_rows_of_infinities_and_nan(implementation):
    """As the definition has it, in the loss; a class of -inf alone is one that cannot be."""
    rows = np.array(normal(0, 6, 5))
    rows[0, 2] = -np.inf  # not the label's
    rows[1, 1] = -np.inf  # the label's
    rows[2] = -np.inf
    rows[3, 3] = np.inf
    rows[4, 0] = np.nan
    labels = np.full(6, 1, np.int32)
    exact = reference.forward(rows, labels)
    ours = rows_of(jax_flash.softmax_cross_entropy, implementation=implementation)
    call = functools.partial(with_gradients, ours)
    (loss, lse), (gradient,) = jax.jit(call)((rows,), labels, (jnp.ones(6), jnp.zeros(6)))
    np.testing.assert_allclose(loss, exact.loss, rtol=1e-6)
    np.testing.assert_allclose(lse, exact.lse, rtol=1e-6)
    exact_gradient = reference.backward(rows, labels, np.ones(6))
    np.testing.assert_allclose(gradient, exact_gradient, rtol=1e-5, atol=1e-6)
    assert np.isfinite(gradient[:2]).all() and gradient[0, 2] == 0


@pytest.mark.gpu
@programs.installed("cuda")
def test_kernels_do_not_read_ignored_rows_and_repeat_their_bits():
    """The kernels' own results; XLA's form reads what it ignores."""
    config = ops.CrossEntropyConfig(0.7, True)
    with jax.default_device(jax.devices("gpu")[0]):
        logits = normal(0, 6, 5003, dtype=jnp.bfloat16).at[1].set(jnp.nan)
        labels = jnp.array([5, ops.IGNORED, -1, 5002, 7000, 0])
        lse, label_logit, total = first = ops.kernel_forward(config, logits, labels)
        assert np.isposinf(lse[1]) and label_logit[1] == total[1] == 0
        assert not label_logit[np.array([2, 4])].any()  # no class, or another device's
        rows = lse, jnp.array([1.0, 0, 1, 1, 0, 2]), -jnp.ones(6).at[1].set(0), jnp.zeros(6)
        gradient = ops.kernel_backward(config, logits, labels, *rows)
        assert not gradient[0][1].any() and not gradient[0][4].any()
        assert_equal(ops.kernel_forward(config, logits, labels), first)
        assert_equal(ops.kernel_backward(config, logits, labels, *rows), gradient)


@pytest.mark.gpu
@programs.installed("cuda")
def test_more_elements_than_an_int32_counts():
    """The last rows of 2**31 + elements, and more rows than a grid's second axis may have."""
    rows, vocabulary = 70_000, 40_003
    with jax.default_device(jax.devices("gpu")[0]):
        call = functools.partial(jax_flash.softmax_cross_entropy, implementation="cuda")
        labels = jnp.arange(rows) % vocabulary
        column = jnp.arange(vocabulary, dtype=jnp.int32)

        def made():
            x = (jnp.arange(rows)[:, None] * 7 + column * 3) % 1009
            return x.astype(jnp.bfloat16) / 256

        logits = jax.jit(made)()
        last = np.asarray(logits[-5:])
        call = functools.partial(call, reduction="sum", return_lse=True)
        gradient = jax.jit(jax.grad(call, has_aux=True), donate_argnums=0)
        got, lse = gradient(logits, labels)
        got = np.asarray(got[-5:], np.float64)
    exact = reference.forward(last, labels[-5:])
    np.testing.assert_allclose(lse[-5:], exact.lse, rtol=1e-5)
    want = reference.backward(last, labels[-5:], np.ones(5))
    np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-6)
