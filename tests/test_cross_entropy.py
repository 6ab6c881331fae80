"""Softmax cross-entropy, of logits and of hidden states: numbers, transformations, devices."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash
from jax_flash.reference import cross_entropy as reference
from tests import helpers, programs
from tests.programs import (
    assert_close,
    assert_equal,
    collectives,
    custom_calls,
    equations,
    normal,
)

quick_compilation = programs.quick_compilation

IGNORED = -100
OPTIONS = {
    "plain": {},
    "smoothing": dict(label_smoothing=0.1),
    "z_loss": dict(z_loss=1e-2),
    "scale": dict(logit_scale=1.7),
    "all": dict(label_smoothing=0.3, z_loss=1e-3, logit_scale=-0.4, ignore_index=2),
}
DTYPES = ["float32", "bfloat16", "float16"]
ONCE = ("smoothing", "z_loss", "scale")  # in one type; the others in each


@pytest.fixture(autouse=True)
def on_the_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture(
    params=["xla", pytest.param("cuda", marks=[pytest.mark.gpu, programs.installed("cuda")])]
)
def implementation(request, on_the_cpu):
    with jax.default_device(jax.devices("cpu" if request.param == "xla" else "gpu")[0]):
        yield request.param


def some_labels(seed, shape, vocabulary, ignore=IGNORED):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, vocabulary, shape).astype(np.int32)
    return np.where(rng.random(shape) < 0.2, ignore, labels).astype(np.int32)


@functools.partial(
    jax.jit, static_argnames=("label_smoothing", "ignore_index", "z_loss", "logit_scale")
)
def plain_loss(
    logits, labels, *, label_smoothing=0.0, ignore_index=IGNORED, z_loss=0.0, logit_scale=1.0
):
    """(loss, lse) of each row as one writes them in jnp, in float32; every label a class."""
    z = logits.astype(jnp.float32) * logit_scale
    ignored = labels == ignore_index
    lse = jax.nn.logsumexp(z, -1)
    target = jax.nn.one_hot(jnp.where(ignored, 0, labels), z.shape[-1])
    target = (1 - label_smoothing) * target + label_smoothing / z.shape[-1]
    loss = lse - jnp.sum(target * z, -1) + z_loss * lse**2
    return jnp.where(ignored, 0, loss), jnp.where(ignored, 0, lse)


def plain_linear(hidden, weight, bias, labels, **options):
    logits = hidden @ weight
    return plain_loss(logits if bias is None else logits + bias, labels, **options)


def rows_of(call, **options):
    """`call` as the plain forms are: (loss, lse) of each row."""
    return functools.partial(call, reduction="none", return_lse=True, **options)


def linear_rows(hidden, weight, bias, labels, **options):
    call = rows_of(jax_flash.linear_softmax_cross_entropy, **options)
    return call(hidden, weight, labels, bias)


def with_gradients(f, tensors, labels, cotangents):
    results, pullback = jax.vjp(lambda *x: f(*x, labels), *tensors)
    return results, pullback(cotangents)


# Numbers ------------------------------------------------------------------------------------------


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


# tokens, D, V, chunk, bias, options: chunks that divide the tokens, that do not, of one token, one
LINEAR = {
    "divides": ((2, 6), 24, 37, 3, True, OPTIONS["plain"]),
    "remainder": ((2, 7), 9, 64, 4, False, OPTIONS["all"]),
    "one_token_each": ((5,), 1, 2, 1, True, OPTIONS["smoothing"]),
    "one_chunk": ((3, 1, 5), 32, 131, None, True, OPTIONS["z_loss"]),
}


TYPED_LINEAR = [("float32", case) for case in LINEAR]
TYPED_LINEAR += [("bfloat16", "remainder"), ("bfloat16", "one_chunk"), ("float16", "divides")]


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
        helpers.assert_close(name, *values)


MEANS = [("float32", case, r) for case, r in zip(LINEAR, ("mean", "sum") * 2, strict=True)]
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
        helpers.assert_close(name, *values)


@pytest.mark.parametrize("limit", [(5, 1), (8, 8)])
def test_groups_of_chunks(implementation, limit, monkeypatch):
    """Some groups, and one, of some chunks, by limits that do not divide the tokens."""
    from jax_flash._ops import cross_entropy_linear as ops

    monkeypatch.setattr(ops, "_limit", lambda config, weight: limit)
    (hidden, weight), labels = (normal(0, 83, 18), normal(1, 18, 31)), some_labels(2, (83,), 31)
    config = ops.of_logits.CrossEntropyConfig(1.0, False)
    assert ops.groups(config, weight, 83) == ((10, 3, 3) if limit[1] == 1 else (6, 2, 8))
    assert ops.groups(config, weight, 15) == ((1, 3, 5) if limit[1] == 1 else (1, 2, 8))
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


def test_the_chunk_changes_no_more_than_orders_of_sums():
    hidden, weight, labels = normal(0, 300, 8), normal(1, 8, 50), some_labels(2, (300,), 50)

    def of(chunk):
        call = functools.partial(jax_flash.linear_softmax_cross_entropy, chunk_size=chunk)
        return jax.jit(jax.value_and_grad(call, (0, 1)))(hidden, weight, labels)

    want = of(300)
    for chunk in (None, 7):
        assert_close(of(chunk), want)


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
    from jax_flash._ops import cross_entropy as ops

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


# Transformations ----------------------------------------------------------------------------------


def weighted(loss, lse):
    weights = jnp.cos(jnp.arange(loss.size, dtype=jnp.float32)).reshape(loss.shape)
    return jnp.sum(weights * loss**2) + jnp.sum(jnp.sin(lse) * weights)


def hessian_product(f, tensors):
    def slope(*x):
        gradients = jax.grad(f, tuple(range(len(x))))(*x)
        return sum(jnp.sum(jnp.sin(3 * g)) for g in gradients)

    return jax.jit(jax.grad(slope, tuple(range(len(tensors)))))(*tensors)


def test_second_derivatives(implementation):
    labels, options = some_labels(0, (6,), 9), dict(label_smoothing=0.2, z_loss=0.1)
    by = dict(implementation=implementation)
    logits = normal(1, 6, 9)
    call = rows_of(jax_flash.softmax_cross_entropy, **options, **by)
    assert_close(
        hessian_product(lambda x: weighted(*call(x, labels)), (logits,)),
        hessian_product(lambda x: weighted(*plain_loss(x, labels, **options)), (logits,)),
    )
    tensors = normal(2, 6, 4), normal(3, 4, 9), normal(4, 9)
    ours = functools.partial(linear_rows, chunk_size=4, **options, **by)
    plain = functools.partial(plain_linear, **options)
    assert_close(
        hessian_product(lambda *x: weighted(*ours(*x, labels)), tensors),
        hessian_product(lambda *x: weighted(*plain(*x, labels)), tensors),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_second_derivatives_of_the_linear_mean(implementation, reduction):
    """Through the gradients that the forward made, and through the lse beside them."""
    labels, options = some_labels(0, (6,), 9), dict(label_smoothing=0.2, z_loss=0.1)
    tensors = normal(2, 6, 4), normal(3, 4, 9), normal(4, 9)
    by = dict(reduction=reduction, chunk_size=4, implementation=implementation)

    def ours(hidden, weight, bias):
        call = functools.partial(jax_flash.linear_softmax_cross_entropy, return_lse=True)
        loss, lse = call(hidden, weight, labels, bias, **options, **by)
        return jnp.sin(loss) + jnp.sum(jnp.sin(lse))

    def plain(*tensors):
        loss, lse = plain_linear(*tensors, labels, **options)
        loss = loss.sum() / (1 if reduction == "sum" else (labels != IGNORED).sum())
        return jnp.sin(loss) + jnp.sum(jnp.sin(lse))

    assert_close(hessian_product(ours, tensors), hessian_product(plain, tensors))


def test_derivative_by_a_weight_that_is_zero(implementation):
    """A row with cotangent 0 has gradient 0, but the gradient's own derivative is not 0."""
    logits, labels = normal(0, 3, 5), jnp.array([1, 2, 4])

    def slope(f, weights):
        gradient = jax.grad(lambda x: jnp.sum(weights * f(x, labels)[0]))(logits)
        return jnp.sum(jnp.cos(jnp.arange(15.0)).reshape(3, 5) * gradient)

    weights = jnp.array([0.0, 1.0, 0.0])
    call = rows_of(jax_flash.softmax_cross_entropy, implementation=implementation)
    got = jax.jit(jax.grad(functools.partial(slope, call)))(weights)
    want = jax.jit(jax.grad(functools.partial(slope, plain_loss)))(weights)
    assert (abs(want) > 0.05).all()
    assert_close(got, want)


@pytest.mark.parametrize("mapped", ["logits", "labels", "both", "inner"])
def test_vmap(implementation, mapped):
    logits, labels = normal(0, 3, 4, 7), some_labels(1, (3, 4), 7)
    axes = {"logits": (0, None), "labels": (None, 0), "both": (0, 0), "inner": (1, 1)}[mapped]
    logits = logits if axes[0] is not None else logits[0]
    labels = labels if axes[1] is not None else labels[0]
    options = dict(label_smoothing=0.1)
    call = rows_of(jax_flash.softmax_cross_entropy, implementation=implementation, **options)

    def both(f):
        def of(logits, labels):
            results, pullback = jax.vjp(lambda x: f(x, labels), logits)
            return results, pullback((results[1], results[0]))

        return jax.jit(jax.vmap(of, axes))(logits, labels)

    assert_close(both(call), both(functools.partial(plain_loss, **options)))


@pytest.mark.parametrize("mapped", [0, 1, 2, 3, "all"])
def test_vmap_of_the_linear_form(implementation, mapped):
    """One operand mapped, the others shared: the gradient of what is shared is a sum."""
    full = normal(0, 3, 5, 4), normal(1, 3, 4, 7), normal(2, 3, 7), some_labels(3, (3, 5), 7)
    axes = tuple(0 if mapped in (i, "all") else None for i in range(4))
    operands = tuple(x if axis == 0 else x[0] for x, axis in zip(full, axes, strict=True))

    def gradients(f):
        def loss(hidden, weight, bias):
            mapped = jax.vmap(f, axes)(hidden, weight, bias, operands[3])
            return weighted(*mapped)

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*operands[:3])

    ours = functools.partial(linear_rows, chunk_size=2, implementation=implementation)
    assert_close(gradients(ours), gradients(plain_linear))


@pytest.mark.parametrize("mapped", [0, 1, 3, "all"])
def test_vmap_of_the_linear_mean(implementation, mapped):
    full = normal(0, 3, 5, 4), normal(1, 3, 4, 7), normal(2, 3, 7), some_labels(3, (3, 5), 7)
    axes = tuple(0 if mapped in (i, "all") else None for i in range(4))
    operands = tuple(x if axis == 0 else x[0] for x, axis in zip(full, axes, strict=True))

    def gradients(f):
        call = jax.value_and_grad(f, (0, 1, 2))
        return jax.jit(jax.vmap(call, axes))(*operands)

    def ours(hidden, weight, bias, labels):
        by = dict(chunk_size=2, implementation=implementation)
        return jax_flash.linear_softmax_cross_entropy(hidden, weight, labels, bias, **by)

    def plain(*operands):
        return plain_linear(*operands)[0].sum() / (operands[3] != IGNORED).sum()

    assert_close(gradients(ours), gradients(plain))


def forwards(jaxpr):
    names = [e.primitive.name for e in equations(jaxpr)]
    ours = ("cross_entropy_forward", "cross_entropy_gradients")
    return sum(name.endswith(ours) for name in names)


def test_checkpoint_that_saves_the_lse_has_no_second_forward():
    hidden, weight, labels = normal(0, 6, 4), normal(1, 4, 9), some_labels(2, (6,), 9)

    def gradient(policy, reduction):
        @functools.partial(jax.checkpoint, policy=policy)
        def loss(hidden, weight):
            call = functools.partial(jax_flash.linear_softmax_cross_entropy, reduction=reduction)
            return call(hidden, weight, labels, z_loss=0.1).sum()

        return jax.make_jaxpr(jax.grad(loss, (0, 1)))(hidden, weight)

    named = checkpoint_policies.save_only_these_names
    assert forwards(gradient(checkpoint_policies.nothing_saveable, "none")) == 2
    assert forwards(gradient(named("cross_entropy_lse"), "none")) == 1
    # Of a mean or a sum the forward makes the gradients, and they are what can be saved.
    assert forwards(gradient(checkpoint_policies.nothing_saveable, "mean")) == 2
    assert forwards(gradient(named("cross_entropy_gradients"), "mean")) == 1


def test_scan(implementation):
    logits, labels = normal(0, 3, 4, 9, dtype=jnp.bfloat16), some_labels(1, (3, 4), 9)

    def step(sum_, x):
        return sum_ + jax_flash.softmax_cross_entropy(*x, implementation=implementation), None

    got, _ = jax.jit(lambda *x: jax.lax.scan(step, jnp.float32(0), x))(logits, labels)
    rows = plain_loss(logits, labels)[0]
    assert_close(got, sum(r.sum() / (n != IGNORED).sum() for r, n in zip(rows, labels)))


def lowered_for_cuda(f, *arrays):
    return jax.jit(f).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def shapes_of(*arrays):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in arrays]


@programs.installed("cuda")
@pytest.mark.parametrize("total", [False, True])
def test_on_cuda_it_is_two_custom_calls(total):
    """The backward writes over the logits; rows and columns reach the kernels as they are."""
    call = functools.partial(jax_flash.softmax_cross_entropy, label_smoothing=0.1 * total)
    arrays = shapes_of(((4, 6, 1001), jnp.bfloat16), ((4, 6), jnp.int32))
    text = lowered_for_cuda(jax.value_and_grad(call), *arrays)
    logits, labels, row = "24x1001xbf16", "24xi32", "24xf32"
    third = row if total else "0xf32"
    assert custom_calls(text) == [
        ("jax_flash.cross_entropy_forward", [logits, labels], [row, row, third]),
        ("jax_flash.cross_entropy_backward", [logits, labels, row, row, row, third], [logits]),
    ]
    assert text.count("output_operand_alias<") == 1
    xla = lowered_for_cuda(jax.grad(functools.partial(call, implementation="xla")), *arrays)
    assert custom_calls(xla) == [] and "exponential" in xla


@programs.installed("cuda")
@pytest.mark.parametrize(
    "classes,dtype,kernels",
    [
        (10, "bfloat16", []),
        (64, "bfloat16", ["forward"]),
        (128, "bfloat16", ["forward", "backward"]),
        (50257, "float32", ["forward", "backward"]),
        (128256, "float32", ["forward"]),
    ],
)
def test_xla_runs_where_it_is_faster(classes, dtype, kernels):
    """Unless the kernels are named (docs/kernels/cross_entropy.md)."""
    arrays = shapes_of(((5, classes), dtype), ((5,), jnp.int32))

    def found(**options):
        call = functools.partial(jax_flash.softmax_cross_entropy, **options)
        text = lowered_for_cuda(jax.value_and_grad(call), *arrays)
        return [
            target.removeprefix("jax_flash.cross_entropy_") for target, *_ in custom_calls(text)
        ]

    assert found() == kernels
    assert found(implementation="cuda") == ["forward", "backward"]


@programs.installed("cuda")
def test_the_linear_form_on_cuda_is_kernels_between_products():
    """A chunk's logits are float32; its gradient goes into the group's, where the others' are."""
    tensors = shapes_of(((24, 18), jnp.bfloat16), ((18, 101), jnp.bfloat16))
    call = functools.partial(jax_flash.linear_softmax_cross_entropy, chunk_size=8)

    def calls(**options):
        f = functools.partial(call, **options)
        loss = lambda *x: jnp.sum(f(*x, jnp.arange(24)))  # noqa: E731
        return [lowered_for_cuda(g, *tensors) for g in (loss, jax.grad(loss, (0, 1)))]

    logits, dlogits, row = "8x101xf32", "8x101xbf16", "8xf32"
    for text in calls(reduction="mean")[1:] + calls(reduction="sum")[1:]:
        assert "exponential" not in text and "jax_flash.cross_entropy_forward" not in text
        for target, operands, results in custom_calls(text):
            assert target == "jax_flash.cross_entropy_gradients"
            assert operands == [logits, "8xi32", row, "1xi32", "0xbf16"]
            assert results == [row, row, "0xf32", dlogits]
    forward, backward = calls(reduction="none")
    assert {target for target, *_ in custom_calls(forward)} == {"jax_flash.cross_entropy_forward"}
    by_none = {
        (target, operands[0], results[-1]) for target, operands, results in custom_calls(backward)
    }
    assert ("jax_flash.cross_entropy_backward", logits, dlogits) in by_none
    # By default the group is all tokens, in one chunk; here of two.
    text = lowered_for_cuda(
        jax.grad(functools.partial(jax_flash.linear_softmax_cross_entropy), (0, 1)),
        *shapes_of(((256, 160), jnp.bfloat16), ((160, 1 << 19), jnp.bfloat16), ((256,), jnp.int32)),
    )
    first, others = custom_calls(text)
    assert first[1][-1] == "0xbf16" and others[1][-1] == others[2][-1] == "256x524288xbf16"
    assert text.count("output_operand_alias<") == 1


@programs.installed("cuda")
def test_float64_on_cuda_runs_in_xla_with_a_warning():
    programs.forget_warnings()
    with jax.enable_x64(True):
        arrays = shapes_of(((3, 5), jnp.float64), ((3,), jnp.int32))
        with pytest.warns(UserWarning, match="float64"):
            text = lowered_for_cuda(jax_flash.softmax_cross_entropy, *arrays)
    assert custom_calls(text) == []


def test_export_for_any_number_of_rows():
    (rows,) = export.symbolic_shape("rows")
    shapes = jax.ShapeDtypeStruct((rows, 9), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    gradient = jax.grad(functools.partial(jax_flash.softmax_cross_entropy, z_loss=0.1))
    exported = export.export(
        jax.jit(gradient), platforms=("cpu", "cuda"), disabled_checks=jax_flash.export_checks()
    )(*shapes)
    logits, labels = normal(0, 5, 9), some_labels(1, (5,), 9)
    loaded = export.deserialize(exported.serialize())
    assert_close(loaded.call(logits, labels), jax.jit(gradient)(logits, labels))


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
    """Logits of a chunk: 256 MiB or what the weight has; their gradients: its gradient's sum."""
    from jax_flash._ops import cross_entropy_linear as ops
    from jax_flash._ops.cross_entropy import CrossEntropyConfig

    for chunk in (0, 1, 100, 5000):
        config = CrossEntropyConfig(1.0, False, row_axes=1, chunk=chunk)
        for width, vocabulary in ((1, 1), (7, 997), (64, 1 << 24), (4096, 50257), (4096, 128256)):
            weight = jax.ShapeDtypeStruct((width, vocabulary), jnp.bfloat16)
            limit = chunk or max(ops._CHUNK_LOGITS // vocabulary, width // 2, 128)
            for tokens in (1, 127, 128, 4097, 8192, 1 << 20):
                count, size = ops.chunks(config, weight, tokens)
                assert (count - 1) * size < tokens <= count * size
                assert size <= limit
                count, each, size = ops.groups(config, weight, tokens)
                assert (count - 1) * each * size < tokens <= count * each * size
                assert size <= limit
                assert each * size <= (chunk or max(limit, 2 * width) + 128 * each)
                assert chunk or count > 1 or each * size < max(limit, 2 * width) + 128 * each


def test_the_gradient_takes_the_place_of_donated_logits():
    logits, labels = normal(0, 64, 1000), some_labels(1, (64,), 1000)
    gradient = jax.grad(functools.partial(jax_flash.softmax_cross_entropy, z_loss=0.1))
    memory = optimised(gradient, logits, labels, donate_argnums=0).memory_analysis()
    assert memory.alias_size_in_bytes == logits.nbytes
    assert memory.temp_size_in_bytes < logits.nbytes / 2


# Devices ------------------------------------------------------------------------------------------

ROWS, WIDTH, CLASSES = (4, 6), 8, 16
CHOSEN = dict(label_smoothing=0.2, z_loss=0.1)


def mesh_of(*sizes, kind=AxisType.Auto):
    names = ("a", "b")[: len(sizes)]
    devices = np.array(jax.devices("cpu")[: int(np.prod(sizes))]).reshape(sizes)
    return jax.sharding.Mesh(devices, names, axis_types=(kind,) * len(sizes))


def put(mesh, arrays, specs):
    return [
        jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(arrays, specs, strict=True)
    ]


def run(f, *args):
    compiled = jax.jit(f).lower(*args).compile()
    return compiled(*args), collectives(compiled.as_text())


def logits_and_labels():
    labels = some_labels(1, ROWS, CLASSES)
    labels[1, 2] = CLASSES  # no class
    return normal(0, *ROWS, CLASSES), labels


def linear_operands():
    hidden, weight, bias = normal(0, *ROWS, WIDTH), normal(1, WIDTH, CLASSES), normal(2, CLASSES)
    return hidden, weight, bias, some_labels(1, ROWS, CLASSES)


def logits_program(logits, labels):
    call = rows_of(jax_flash.softmax_cross_entropy, **CHOSEN)
    results, pullback = jax.vjp(lambda x: call(x, labels), logits)
    return results, pullback((jnp.cos(results[1]), jnp.sin(results[1])))


def linear_program(hidden, weight, bias, labels):
    call = functools.partial(linear_rows, chunk_size=3, **CHOSEN)
    results, pullback = jax.vjp(lambda *x: call(*x, labels), hidden, weight, bias)
    return results, pullback((jnp.cos(results[1]), jnp.sin(results[1])))


@functools.cache
def logits_want():
    return jax.device_get(jax.jit(logits_program)(*logits_and_labels()))


@functools.cache
def linear_want():
    return jax.device_get(jax.jit(linear_program)(*linear_operands()))


def local_rows(traffic, shape):
    """What crosses: of each row max, sum of exponentials, label's logit, sum; no logits."""
    assert set(traffic) == {"all-reduce"}
    assert len(traffic["all-reduce"]) == 4 and set(traffic["all-reduce"]) == {shape}


# mesh, spec of the logits, shape of the statistics that devices add up (None: no collective)
LOGITS = {
    "rows": ((4,), P("a"), None),
    "inner_rows": ((2,), P(None, "a"), None),
    "rows_both": ((4, 2), P("a", "b"), None),
    "vocabulary": ((8,), P(None, None, "a"), ROWS),
    "rows_and_vocabulary": ((2, 4), P("a", None, "b"), (2, 6)),
    "vocabulary_over_two": ((2, 4), P(None, None, ("a", "b")), ROWS),
}


KINDS = [(case, AxisType.Auto) for case in LOGITS]
KINDS += [(case, AxisType.Explicit) for case in ("rows_both", "rows_and_vocabulary")]


@pytest.mark.parametrize("case,kind", KINDS)
def test_jit_of_sharded_logits(case, kind):
    sizes, spec, shape = LOGITS[case]
    mesh = mesh_of(*sizes, kind=kind)
    logits, labels = logits_and_labels()
    with jax.set_mesh(mesh):
        arrays = put(mesh, (logits, labels), (spec, P(*spec[:2])))
        results, traffic = run(logits_program, *arrays)
    if shape is None:
        assert traffic == {}
    else:
        local_rows(traffic, shape)
    assert_equal_nan(results, logits_want())
    assert results[1][0].sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)


def assert_equal_nan(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


# mesh, specs of hidden, weight, bias; kinds of collective and the shapes that may cross
LINEAR_CUTS = {
    "rows": ((4,), P("a"), P(), P(), {(WIDTH, CLASSES), (CLASSES,)}),
    "vocabulary": ((4,), P(), P(None, "a"), P("a"), {ROWS, (*ROWS, WIDTH)}),
    "both": (
        (2, 4),
        P("a"),
        P(None, "b"),
        P("b"),
        {(2, 6), (2, 6, WIDTH), (WIDTH, CLASSES // 4), (CLASSES // 4,)},
    ),
}


@pytest.mark.parametrize("case", LINEAR_CUTS)
def test_jit_of_the_sharded_linear_form(case):
    sizes, rows, weight, bias, crossing = LINEAR_CUTS[case]
    mesh = mesh_of(*sizes)
    arrays = put(mesh, linear_operands(), (rows, weight, bias, rows))
    results, traffic = run(linear_program, *arrays)
    assert set(traffic) == {"all-reduce"} and set(traffic["all-reduce"]) == crossing
    assert_close(jax.device_get(results), linear_want(), 2e-6)
    for gradient, spec in zip(results[1], (rows, weight, bias), strict=True):
        assert gradient.sharding.is_equivalent_to(NamedSharding(mesh, spec), gradient.ndim)
    if case == "rows":
        forward = functools.partial(linear_rows, chunk_size=3)
        assert run(forward, *arrays)[1] == {}


def linear_mean_program(hidden, weight, bias, labels):
    def loss(hidden, weight, bias):
        call = functools.partial(jax_flash.linear_softmax_cross_entropy, chunk_size=3, **CHOSEN)
        return call(hidden, weight, labels, bias)

    return jax.value_and_grad(loss, (0, 1, 2))(hidden, weight, bias)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("case", LINEAR_CUTS)
def test_jit_of_the_sharded_linear_mean(case, kind):
    """Where devices share the vocabulary they agree on the lse before they make gradients."""
    sizes, rows, weight, bias, crossing = LINEAR_CUTS[case]
    mesh, operands = mesh_of(*sizes, kind=kind), linear_operands()
    want = jax.device_get(jax.jit(linear_mean_program)(*operands))
    with jax.set_mesh(mesh):
        results, traffic = run(
            linear_mean_program, *put(mesh, operands, (rows, weight, bias, rows))
        )
    assert set(traffic) == {"all-reduce"} and set(traffic["all-reduce"]) <= {*crossing, ()}
    assert_close(jax.device_get(results), want, 2e-6)
    for gradient, spec in zip(results[1], (rows, weight, bias), strict=True):
        assert gradient.sharding.is_equivalent_to(NamedSharding(mesh, spec), gradient.ndim)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_of_the_linear_mean(check_vma):
    """Tokens of its own on each device, one weight."""
    mesh, (hidden, weight, bias, labels) = mesh_of(4), linear_operands()

    def body(hidden, weight, bias, labels):
        loss = linear_mean_program(hidden, weight, bias, labels)[0]
        return jax.lax.pmean(loss, "a")

    mapped = jax.shard_map(
        body, mesh=mesh, in_specs=(P("a"), P(), P(), P("a")), out_specs=P(), check_vma=check_vma
    )

    def whole(hidden, weight, bias):
        call = functools.partial(jax_flash.linear_softmax_cross_entropy, **CHOSEN)
        return jnp.mean(jax.vmap(call, (0, None, 0, None))(hidden, weight, labels, bias))

    def sharded(hidden, weight, bias):
        return mapped(hidden, weight, bias, labels)

    got = jax.jit(jax.value_and_grad(sharded, (0, 1, 2)))(hidden, weight, bias)
    want = jax.jit(jax.value_and_grad(whole, (0, 1, 2)))(hidden, weight, bias)
    assert_close(jax.device_get(got), jax.device_get(want), 2e-6)


# Specs of hidden, weight, bias where something must be gathered, or cut, before devices can begin.
MOVED = {
    "width": (P(None, None, "a"), P("a"), P(), P()),
    "width_of_the_weight_alone": (P("a"), P("a"), P(), P("a")),
    "one_axis_for_rows_and_vocabulary": (P("a"), P(None, "a"), P("a"), P("a")),
    "bias_alone": (P(), P(), P("a"), P()),
}


@pytest.mark.parametrize("case", MOVED)
def test_operands_that_disagree(case):
    """With explicit axes the gradients have the sharding of their operands all the same."""
    kind = AxisType.Auto if case == "width" else AxisType.Explicit
    mesh, specs = mesh_of(4, kind=kind), MOVED[case]
    with jax.set_mesh(mesh):
        results, traffic = run(linear_program, *put(mesh, linear_operands(), specs))
    assert "all-gather" in traffic
    assert_close(jax.device_get(results), linear_want(), 2e-6)
    if kind == AxisType.Explicit:
        for gradient, spec in zip(results[1], specs, strict=False):
            assert gradient.sharding.is_equivalent_to(NamedSharding(mesh, spec), gradient.ndim)


def test_a_vocabulary_that_devices_cannot_share_equally():
    """Where an axis is sharded in unequal parts, by XLA itself, the vocabulary is gathered."""
    mesh = mesh_of(4)
    logits, labels = normal(0, 6, 10), some_labels(1, (6,), 10)

    def f(logits):
        cut = jax.lax.with_sharding_constraint(logits * 2, NamedSharding(mesh, P(None, "a")))
        return jax_flash.softmax_cross_entropy(cut, labels)

    got, _ = run(jax.value_and_grad(f), logits)
    by_one = jax.value_and_grad(lambda x: jax_flash.softmax_cross_entropy(2 * x, labels))
    want = jax.jit(by_one)(logits)
    assert_close(jax.device_get(got), jax.device_get(want))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("axis", ["a", ("a", "b")])
def test_shard_map_with_a_part_of_the_vocabulary(axis, check_vma):
    mesh = mesh_of(4) if axis == "a" else mesh_of(2, 4)
    logits, labels = logits_and_labels()
    spec = P(None, None, axis)
    mapped = jax.shard_map(
        rows_of(functools.partial(jax_flash.softmax_cross_entropy, axis_name=axis), **CHOSEN),
        mesh=mesh,
        in_specs=(spec, P()),
        out_specs=(P(), P()),
        check_vma=check_vma,
    )

    def program(logits, labels):
        results, pullback = jax.vjp(lambda x: mapped(x, labels), logits)
        return results, pullback((jnp.cos(results[1]), jnp.sin(results[1])))

    results, traffic = run(program, *put(mesh, (logits, labels), (spec, P())))
    assert set(traffic) == {"all-reduce"}
    assert all(CLASSES not in s and len(s) <= 2 for s in traffic["all-reduce"])
    assert_equal_nan(results, logits_want())


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_of_the_linear_form(check_vma):
    """Tokens on one axis, the vocabulary on the other; hidden's gradient is added up by JAX."""
    mesh = mesh_of(2, 4)
    specs = (P("a"), P(None, "b"), P("b"), P("a"))
    mapped = jax.shard_map(
        functools.partial(linear_rows, axis_name="b", chunk_size=3, **CHOSEN),
        mesh=mesh,
        in_specs=specs,
        out_specs=(P("a"), P("a")),
        check_vma=check_vma,
    )

    def program(*operands):
        results, pullback = jax.vjp(lambda *x: mapped(*x, operands[3]), *operands[:3])
        return results, pullback((jnp.cos(results[1]), jnp.sin(results[1])))

    results, _ = run(program, *put(mesh, linear_operands(), specs))
    assert_close(jax.device_get(results), linear_want(), 2e-6)


def test_the_gradient_inside_shard_map_and_a_mean():
    mesh = mesh_of(4)
    logits, labels = normal(0, 6, 12), some_labels(1, (6,), 12)

    def body(logits, labels):
        call = functools.partial(jax_flash.softmax_cross_entropy, axis_name="a", **CHOSEN)
        return jax.value_and_grad(call)(logits, labels)

    spec = P(None, "a")
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(spec, P()), out_specs=(P(), spec))
    call = functools.partial(jax_flash.softmax_cross_entropy, **CHOSEN)
    assert_close(
        jax.device_get(jax.jit(mapped)(logits, labels)),
        jax.device_get(jax.jit(jax.value_and_grad(call))(logits, labels)),
    )


def test_second_derivatives_of_a_shared_vocabulary():
    logits, labels = normal(0, 6, 12), some_labels(1, (6,), 12)
    call = rows_of(jax_flash.softmax_cross_entropy, **CHOSEN)
    want = hessian_product(lambda x: weighted(*call(x, labels)), (logits,))
    spec = P(None, "a")
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = mesh_of(4, kind=kind)
        with jax.set_mesh(mesh):
            got = hessian_product(
                lambda x: weighted(*call(x, labels)), tuple(put(mesh, (logits,), (spec,)))
            )
        assert_close(jax.device_get(got), jax.device_get(want))
    mapped = jax.shard_map(
        lambda x: call(x, labels, axis_name="a"),
        mesh=mesh_of(4),
        in_specs=spec,
        out_specs=(P(), P()),
    )
    got = hessian_product(lambda x: weighted(*mapped(x)), (logits,))
    assert_close(jax.device_get(got), jax.device_get(want))


def test_shares_of_the_vocabulary_that_hold_nothing_or_nan():
    """A part that is -inf all over counts for nothing; an ignored row's NaN stays where it is."""
    logits = np.array(normal(0, 4, 12))
    logits[0, 3:6] = -np.inf
    logits[1] = -np.inf
    logits[2, 4] = np.nan
    logits[3, 4] = np.nan
    labels = jnp.array([1, 1, IGNORED, 1])

    @functools.partial(jax.jit, static_argnums=0)
    def of(call, logits):
        results, pullback = jax.vjp(call, logits)
        return results, pullback((jnp.ones(4), jnp.ones(4)))

    call = rows_of(jax_flash.softmax_cross_entropy, z_loss=0.1)
    want = of(lambda x: call(x, labels), logits)
    assert np.isfinite(np.asarray(want[1][0])[[0, 2]]).all()
    parts = jax.vmap(functools.partial(call, labels=labels, axis_name="v"), 1, None, axis_name="v")
    results, (gradient,) = of(parts, logits.reshape(4, 4, 3))
    assert_equal_nan((results, gradient.reshape(4, 12)), (want[0], want[1][0]))


def test_pmap_and_devices_with_rows_of_their_own():
    logits, labels = normal(0, 4, 6, 9), some_labels(1, (4, 6), 9)
    call = functools.partial(jax_flash.softmax_cross_entropy, **CHOSEN)
    devices = jax.devices("cpu")[:4]
    got = jax.pmap(jax.value_and_grad(call), devices=devices)(logits, labels)
    want = jax.jit(jax.vmap(jax.value_and_grad(call)))(logits, labels)
    assert_close(jax.device_get(got), jax.device_get(want))


# Bad input ----------------------------------------------------------------------------------------

LOGITS_3_5, LABELS_3 = np.ones((3, 5), np.float32), np.zeros(3, np.int32)

REFUSED = {
    "logits_type": ((np.ones((3, 5), int), LABELS_3), {}, TypeError, "logits: .*floating-point"),
    "logits_rank": ((np.float32(1), 0), {}, ValueError, "logits: expected at least 1 axes"),
    "no_class": (
        (np.ones((3, 0), np.float32), LABELS_3),
        {},
        ValueError,
        "logits: expected at least 1 class, got shape (3, 0)",
    ),
    "labels_type": (
        (LOGITS_3_5, np.zeros(3, np.float32)),
        {},
        TypeError,
        "labels: expected an integer array, got float32",
    ),
    "labels_bool": ((LOGITS_3_5, np.zeros(3, bool)), {}, TypeError, "labels: .* got bool"),
    "labels_shape": (
        (LOGITS_3_5, np.zeros((3, 1), np.int32)),
        {},
        ValueError,
        "labels: expected logits's leading axes (3,), got shape (3, 1)",
    ),
    "smoothing": (
        (LOGITS_3_5, LABELS_3),
        dict(label_smoothing=1.0),
        ValueError,
        "label_smoothing: expected a number in [0, 1), got 1.0",
    ),
    "smoothing_array": (
        (LOGITS_3_5, LABELS_3),
        dict(label_smoothing=jnp.float32(0.1)),
        TypeError,
        "label_smoothing: expected a Python float (static)",
    ),
    "z_loss": (
        (LOGITS_3_5, LABELS_3),
        dict(z_loss=-1e-4),
        ValueError,
        "z_loss: expected a finite number >= 0, got -0.0001",
    ),
    "scale": (
        (LOGITS_3_5, LABELS_3),
        dict(logit_scale=float("nan")),
        ValueError,
        "logit_scale: expected a finite number, got nan",
    ),
    "reduction": (
        (LOGITS_3_5, LABELS_3),
        dict(reduction="avg"),
        ValueError,
        "reduction: expected one of ('none', 'mean', 'sum'), got 'avg'",
    ),
    "ignore_index": (
        (LOGITS_3_5, LABELS_3),
        dict(ignore_index=0.0),
        TypeError,
        "ignore_index: expected a Python int (static) or None, got float",
    ),
    "return_lse": (
        (LOGITS_3_5, LABELS_3),
        dict(return_lse=1),
        TypeError,
        "return_lse: expected a Python bool (static), got int",
    ),
    "axis_name": (
        (LOGITS_3_5, LABELS_3),
        dict(axis_name="nowhere"),
        ValueError,
        "axis_name: expected an axis of shard_map, pmap or vmap, got 'nowhere'",
    ),
    "implementation": (
        (LOGITS_3_5, LABELS_3),
        dict(implementation="triton"),
        ValueError,
        "implementation: expected one of (None, 'cuda', 'cpu', 'xla'), got 'triton'",
    ),
    "cpu": (
        (LOGITS_3_5, LABELS_3),
        dict(implementation="cpu"),
        NotImplementedError,
        "implementation='cpu': cross-entropy has no cpu kernels",
    ),
}
HIDDEN_3_4, WEIGHT_4_5 = np.ones((3, 4), np.float32), np.ones((4, 5), np.float32)
REFUSED_LINEAR = {
    "weight_shape": (
        (HIDDEN_3_4, WEIGHT_4_5.T, LABELS_3),
        {},
        ValueError,
        "weight: expected shape (4, V), got shape (5, 4)",
    ),
    "weight_rank": (
        (HIDDEN_3_4, WEIGHT_4_5[None], LABELS_3),
        {},
        ValueError,
        "weight: expected shape (4, V), got shape (1, 4, 5)",
    ),
    "weight_empty": (
        (HIDDEN_3_4, WEIGHT_4_5[:, :0], LABELS_3),
        {},
        ValueError,
        "weight: expected D and V of at least 1, got shape (4, 0)",
    ),
    "weight_type": (
        (HIDDEN_3_4, jnp.ones((4, 5), jnp.bfloat16), LABELS_3),
        {},
        TypeError,
        "weight: expected hidden's dtype float32, got bfloat16",
    ),
    "bias_shape": (
        (HIDDEN_3_4, WEIGHT_4_5, LABELS_3, np.ones(4, np.float32)),
        {},
        ValueError,
        "bias: expected shape (5,), got shape (4,)",
    ),
    "bias_type": (
        (HIDDEN_3_4, WEIGHT_4_5, LABELS_3, np.ones(5, np.float16)),
        {},
        TypeError,
        "bias: expected hidden's dtype float32, got float16",
    ),
    "labels": (
        (HIDDEN_3_4, WEIGHT_4_5, LABELS_3[:2]),
        {},
        ValueError,
        "labels: expected hidden's leading axes (3,), got shape (2,)",
    ),
    "chunk": (
        (HIDDEN_3_4, WEIGHT_4_5, LABELS_3),
        dict(chunk_size=0),
        ValueError,
        "chunk_size: expected at least 1 token, got 0",
    ),
    "chunk_type": (
        (HIDDEN_3_4, WEIGHT_4_5, LABELS_3),
        dict(chunk_size=2.0),
        TypeError,
        "chunk_size: expected a Python int (static) or None, got float",
    ),
    "cpu": (
        (HIDDEN_3_4, WEIGHT_4_5, LABELS_3),
        dict(implementation="cpu"),
        NotImplementedError,
        "implementation='cpu': cross-entropy has no cpu kernels",
    ),
}
CALLS = [
    (call, case)
    for call, cases in (
        (jax_flash.softmax_cross_entropy, REFUSED),
        (jax_flash.linear_softmax_cross_entropy, REFUSED_LINEAR),
    )
    for case in cases.values()
]
NAMES = [*REFUSED, *(f"linear_{name}" for name in REFUSED_LINEAR)]


@pytest.mark.parametrize("call,case", CALLS, ids=NAMES)
def test_bad_input_is_refused(call, case):
    args, options, error, text = case
    pattern = text if ".*" in text else re.escape(text)
    with pytest.raises(error, match=pattern):
        call(*args, **options)
