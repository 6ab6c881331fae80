"""Cross-entropy on many devices: numbers, and what crosses between them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash
from tests import cross_entropy_cases as cases
from tests import programs
from tests.cross_entropy_cases import (
    CHOSEN,
    IGNORED,
    hessian_product,
    linear_rows,
    rows_of,
    some_labels,
    weighted,
)
from tests.programs import assert_close, collectives, normal

quick_compilation = programs.quick_compilation
on_the_cpu = cases.on_the_cpu


ROWS, WIDTH, CLASSES = (4, 6), 8, 16


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
