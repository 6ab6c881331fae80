"""Cross-entropy as a program: transformations, lowering for CUDA, bad input."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.ad_checkpoint import checkpoint_policies

import jax_flash
from tests import cross_entropy_cases as cases
from tests import programs
from tests.cross_entropy_cases import (
    IGNORED,
    hessian_product,
    linear_rows,
    plain_linear,
    plain_loss,
    rows_of,
    some_labels,
    weighted,
)
from tests.programs import assert_close, custom_calls, equations, normal

quick_compilation = programs.quick_compilation
on_the_cpu = cases.on_the_cpu
implementation = cases.implementation


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
        (128256, "float32", ["forward", "backward"]),
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
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    (rows,) = export.symbolic_shape("rows")
    shapes = jax.ShapeDtypeStruct((rows, 9), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)
    gradient = jax.grad(functools.partial(jax_flash.softmax_cross_entropy, z_loss=0.1))
    exported = export.export(
        jax.jit(gradient), platforms=("cpu", "cuda"), disabled_checks=jax_flash.export_checks()
    )(*shapes)
    logits, labels = normal(0, 5, 9), some_labels(1, (5,), 9)
    loaded = export.deserialize(exported.serialize())
    assert_close(loaded.call(logits, labels), jax.jit(gradient)(logits, labels))


def optimised(f, *args, **jit):
    jax.config.update("jax_disable_most_optimizations", False)
    return jax.jit(f, **jit).lower(*args).compile()


def test_the_gradient_takes_the_place_of_donated_logits():
    logits, labels = normal(0, 64, 1000), some_labels(1, (64,), 1000)
    gradient = jax.grad(functools.partial(jax_flash.softmax_cross_entropy, z_loss=0.1))
    memory = optimised(gradient, logits, labels, donate_argnums=0).memory_analysis()
    assert memory.alias_size_in_bytes == logits.nbytes
    assert memory.temp_size_in_bytes < logits.nbytes / 2


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
