"""The norms over a residual stream: numbers, gradients, masks, transformations, devices, refusals.

Rule of error as in tests/helpers.py, with what one writes in jnp in the same type as the plain
form.
"""

import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash
from jax_flash.reference import norm as reference
from tests import programs
from tests.helpers import KEY, assert_close, random
from tests.programs import collectives, equations, normal

quick_compilation = programs.quick_compilation

EPSILON = 1e-3


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, programs.installed("cuda")])


@pytest.fixture(params=["xla", CUDA])
def implementation(request):
    device = jax.devices("gpu" if request.param == "cuda" else "cpu")[0]
    with jax.default_device(device):
        yield request.param


def dropout_key():
    return jax.random.wrap_key_data(KEY)


def ours(is_rms: bool, arrays: dict, **options):
    arrays = dict(arrays)
    call = jax_flash.dropout_add_rms_norm if is_rms else jax_flash.dropout_add_layer_norm
    positional = (arrays.pop("x"), arrays.pop("residual", None), arrays.pop("weight"))
    return call(*positional, arrays.pop("bias", None), epsilon=EPSILON, **arrays, **options)


def plain(is_rms, arrays, *, keep=None, keep1=None, rate=0.0, stream=None, **options):
    """(z, z1 or nothing, stream) as one writes it in jnp, in the operands' types."""
    x, dtype, out_rows = arrays["x"], arrays["x"].dtype, options.get("out_rows")

    def rows(x, subset):
        return jnp.where((subset > 0)[..., None], x[subset - 1], 0)

    def dropped(x, keep):
        if keep is None:
            return x
        return x * jnp.asarray(keep.reshape(x.shape) * reference.keep_scale(rate), dtype)

    if "x_subset" in options:
        x = rows(x, options["x_subset"])
    if "rowscale" in options:
        x = x * options["rowscale"].astype(dtype)[..., None]
    s = dropped(x * arrays.get("layerscale", jnp.ones((), dtype)).astype(dtype), keep)
    if "x1" in arrays:
        s = s + dropped(arrays["x1"], keep1)
    s = s.astype(stream) + arrays.get("residual", jnp.zeros((), stream))
    wide = s.astype(jnp.float32)
    centred = wide if is_rms else wide - wide.mean(-1, keepdims=True)
    y = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + EPSILON)

    def scaled(weight, bias):
        z = (y * arrays[weight] + arrays.get(bias, 0)).astype(dtype)
        if "out_subset" not in options:
            return z
        at = options["out_subset"]
        return jnp.zeros((out_rows + 1, z.shape[-1]), dtype).at[at].set(z)[1:]

    z1 = (scaled("weight1", "bias1"),) if "weight1" in arrays else ()
    return scaled("weight", "bias"), *z1, s


@dataclasses.dataclass(frozen=True)
class Case:
    """`has`: which of the optional arrays; residual and weights float32 or x's own type."""

    rows: tuple[int, ...] = (3, 7)
    width: int = 37
    is_rms: bool = False
    has: str = "residual bias"
    residual: str | None = "float32"
    weights: str | None = "float32"
    rate: float = 0.0
    options: tuple[str, ...] = ()

    def make(self, dtype):
        """(arrays to differentiate, options) in numpy."""
        own = jnp.dtype(dtype)
        weights, residual = (jnp.dtype(t or own) for t in (self.weights, self.residual))
        full, vector = (*self.rows, self.width), (self.width,)
        count = int(np.prod(self.rows))
        compact = 4 if "x_subset" in self.options else None
        shapes = {
            "x": ((compact, self.width) if compact else full, own),
            "x1": (full, own),
            "residual": (full, residual),
            "weight": (vector, weights),
            "bias": (vector, weights),
            "weight1": (vector, weights),
            "bias1": (vector, weights),
            "layerscale": (vector, weights),
        }
        arrays = {
            name: random(i, kind, shape)[0]
            for i, (name, (shape, kind)) in enumerate(shapes.items())
            if name in f"x weight {self.has}".split()
        }
        order = np.random.default_rng(5).permutation(count).reshape(self.rows)
        made = {
            "rowscale": np.where(order % 3 == 0, 0, 1.5).astype(np.float32),
            "x_subset": np.where(order < 4, order + 1, 0).astype(np.int32),
            "out_subset": np.where(order % 4 == 1, order // 4 + 1, 0).astype(np.int32),
        }
        options = {name: made[name] for name in self.options}
        if "out_subset" in options:
            options["out_rows"] = count // 4 + 2  # rows that nobody names are 0
        return arrays, options


EVERYTHING = "residual bias layerscale"
CASES = {
    "layer": Case(has="bias"),
    "rms": Case(has="", is_rms=True, weights=None),
    "one_row_of_many": Case(rows=(1,), width=16392, has="", weights=None),
    "one_feature": Case(rows=(5,), width=1, residual=None),
    "no_row_axis": Case(rows=(), width=40, rate=0.3),
    "prime": Case(rows=(2, 3, 5), width=131, rate=0.1, residual=None, weights=None),
    "everything": Case(has=EVERYTHING, rate=0.3, options=("rowscale",)),
    "rms_everything": Case(
        has=EVERYTHING, is_rms=True, rate=0.3, options=("rowscale",), residual=None
    ),
    "near_one": Case(rows=(64,), width=72, rate=0.95, has="bias"),
    "two_norms": Case(has="residual bias x1 weight1 bias1", rate=0.3),
    "tied": Case(has="residual x1", residual=None, weights=None),
    "two_norms_rms": Case(has="x1 weight1", is_rms=True, rate=0.2),
    "subset": Case(has=EVERYTHING, rate=0.3, options=("x_subset", "out_subset")),
    "subset_rms": Case(has="", is_rms=True, options=("x_subset", "rowscale")),
    "out_subset": Case(has="residual", options=("out_subset",)),
}
# For the kernels: rows in pairs, blocks of 16 and several to a team; every number of vectors a
# thread; widths that are no multiples of 8, or of 16 alone; two norms of float32 rows.
CASES |= {
    "many_rows": Case(rows=(10007,), width=40, rate=0.1),
    "two_units_a_team": Case(rows=(600,), width=2056, has=EVERYTHING, rate=0.1, residual=None),
    "unaligned_rows": Case(rows=(35,), width=2051, rate=0.1, options=("rowscale",)),
    "wide": Case(rows=(2, 19), width=8192, rate=0.1, weights=None),
    "wider": Case(rows=(18,), width=12296, rate=0.1, weights=None),
    "widest": Case(rows=(5,), width=16384, residual=None, weights=None),
    "wide_two_norms": Case(rows=(21,), width=4104, has="residual bias x1 weight1 bias1"),
    "wide_subset": Case(
        rows=(70,), width=1032, has=EVERYTHING, rate=0.3, options=("x_subset", "out_subset")
    ),
}
KERNEL_WIDTH = 16384
HALF_TOO = ("layer", "rms", "one_feature", "prime", "everything", "two_norms", "subset")
HALF_TOO += ("two_units_a_team", "unaligned_rows", "wide", "wider", "widest", "wide_subset")
RUNS = [(name, "float32") for name in CASES if name not in ("wider",)] + [
    (name, dtype) for name in HALF_TOO for dtype in ("bfloat16", "float16")
]


@pytest.mark.parametrize("name,dtype", RUNS)
def test_definition(name, dtype, implementation):
    """Outputs and every gradient."""
    case = CASES[name]
    arrays, options = case.make(dtype)
    count = int(np.prod(case.rows))
    fp32 = jnp.dtype(case.residual or dtype) == jnp.float32
    stream = jnp.float32 if fp32 else jnp.dtype(dtype)
    keep, keep1 = (
        reference.dropout_keep(case.rate, KEY, count, case.width, branch) if case.rate else None
        for branch in (0, 1)
    )

    def both(arrays, cotangents):
        call = functools.partial(
            ours,
            case.is_rms,
            dropout_rate=case.rate,
            dropout_key=dropout_key() if case.rate else None,
            prenorm=True,
            residual_in_fp32=fp32,
            implementation=None if case.width > KERNEL_WIDTH else implementation,
            **options,
        )
        simple = functools.partial(
            plain, case.is_rms, keep=keep, keep1=keep1, rate=case.rate, stream=stream, **options
        )
        (a, pull_a), (b, pull_b) = jax.vjp(call, arrays), jax.vjp(simple, arrays)
        return a, pull_a(cotangents)[0], b, pull_b(cotangents)[0]

    z_shape = (*case.rows, case.width)
    if "out_subset" in options:
        z_shape = (options["out_rows"], case.width)
    norms = 1 + ("weight1" in arrays)
    cotangents = (
        *random(8, dtype, *[z_shape] * norms),
        *random(9, stream, (*case.rows, case.width)),
    )
    got, gradients, simple, simple_gradients = jax.jit(both)(arrays, cotangents)

    def flat(x):
        return np.asarray(x, np.float64).reshape(-1, case.width)

    definition = dict(
        {n: v for n, v in arrays.items() if n in ("layerscale", "weight1", "bias1")},
        **{n: v.reshape(-1) if isinstance(v, np.ndarray) else v for n, v in options.items()},
        is_rms=case.is_rms,
        epsilon=EPSILON,
        rate=case.rate,
        keep=keep,
        keep1=keep1,
        x1=flat(arrays["x1"]) if "x1" in arrays else None,
    )
    residual = flat(arrays["residual"]) if "residual" in arrays else None
    inputs = (flat(arrays["x"]), residual, arrays["weight"], arrays.get("bias"))
    exact = reference.forward(*inputs, **definition)
    outputs = [exact.z, exact.z1, exact.stream] if norms == 2 else [exact.z, exact.stream]
    for what, a, b, c in zip(("z", "z1 or stream", "stream"), got, outputs, simple):
        assert_close(what, a, b.reshape(a.shape), c)
    assert got[0].dtype == dtype and got[-1].dtype == stream

    definition |= dict(dz=flat(cotangents[0]), dstream=flat(cotangents[-1]))
    if norms == 2:
        definition["dz1"] = flat(cotangents[1])
    derivative = reference.backward(*inputs, **definition)
    # A stream kept in a half type: XLA may skip that rounding in the plain form, our backward reads
    # it (as every fused norm's).
    half_unit = float(jnp.finfo(stream).eps) / 2
    moved = half_unit * np.abs(exact.stream) * exact.rsigma
    rounding = {
        name: np.sqrt(((moved * dz) ** 2).sum(0)).max()
        for name, dz in (("weight", derivative.rows), ("weight1", derivative.rows1))
        if dz is not None and not fp32
    }
    assert gradients.keys() == arrays.keys()
    for what, gradient in gradients.items():
        assert gradient.dtype == arrays[what].dtype
        wanted = getattr(derivative, what).reshape(gradient.shape)
        inherent = rounding[what] if what in rounding else 0.0
        assert_close(f"d{what}", gradient, wanted, simple_gradients[what], inherent)


def test_the_reference_derivative_is_that_of_the_reference():
    """By central differences, in float64."""
    arrays, options = CASES["subset"].make("float64")
    arrays = {n: v.reshape(-1, v.shape[-1]) if v.ndim > 2 else v for n, v in arrays.items()}
    arrays = {n: v.astype(np.float64) for n, v in arrays.items()}
    fixed = {n: v.reshape(-1) if isinstance(v, np.ndarray) else v for n, v in options.items()}
    fixed |= dict(keep=reference.dropout_keep(0.3, KEY, 21, 37), rate=0.3)
    dz, ds = random(1, "float64", (fixed["out_rows"], 37), (21, 37))

    def value(arrays):
        out = reference.forward(**arrays, **fixed)
        return (out.z * dz).sum() + (out.stream * ds).sum()

    gradients = reference.backward(**arrays, **fixed, dz=dz, dstream=ds)
    for i, (name, array) in enumerate(arrays.items()):
        step = random(20 + i, "float64", array.shape)[0] * 1e-5
        sides = [value(arrays | {name: array + sign * step}) for sign in (1, -1)]
        expected = (getattr(gradients, name) * step).sum() * 2
        np.testing.assert_allclose(sides[0] - sides[1], expected, rtol=1e-6, err_msg=name)


# Dropout -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [37, 1032])
def test_mask_on_request_is_the_mask(implementation, width):
    """The bits of the definition, in the order of the rows of every axis; each branch its own."""
    x = jnp.ones((3, 7, width))
    z, s, mask, mask1 = ours(
        False,
        dict(x=x, x1=x * 100, weight=jnp.ones(width)),
        dropout_rate=0.4,
        dropout_key=dropout_key(),
        prenorm=True,
        return_mask=True,
        implementation=implementation,
    )
    for branch, m in enumerate((mask, mask1)):
        keep = reference.dropout_keep(0.4, KEY, 21, width, branch)
        np.testing.assert_array_equal(m.reshape(21, width), keep)
    assert 0.2 < (mask != mask1).mean()
    np.testing.assert_allclose(s, (mask + 100.0 * mask1) * reference.keep_scale(0.4), rtol=1e-6)
    compact = np.array([2, 0, 1], np.int32)
    arrays = dict(x=x[0, :2], weight=jnp.ones(width))
    options = dict(return_mask=True, implementation=implementation)
    _, mask = ours(True, arrays, x_subset=compact, **options)
    np.testing.assert_array_equal(mask, np.repeat(compact[:, None] > 0, width, 1))


def test_what_is_dropped_may_be_anything(implementation):
    """NaN and inf of x vanish where the mask drops them."""
    keep = reference.dropout_keep(0.5, KEY, 6, 24)
    x = np.where(keep, 1.0, np.array([np.nan, np.inf] * 12)).astype(np.float32)
    options = dict(dropout_rate=0.5, dropout_key=dropout_key(), implementation=implementation)
    f = functools.partial(ours, False, **options)
    z, gradient = jax.value_and_grad(lambda a: jnp.sum(f(a) ** 3))(
        dict(x=x, weight=np.ones(24, np.float32), layerscale=np.full(24, 0.5, np.float32))
    )
    assert np.isfinite(z) and all(np.isfinite(g).all() for g in gradient.values())
    np.testing.assert_array_equal(gradient["x"][~keep], 0)


# Transformations ---------------------------------------------------------------------------------


def whole_call(arrays, *, key=None, rowscale=None, subset=None, implementation=None):
    """A call with everything that can be differentiated, mapped or cut; x is compact if `subset`
    is."""
    z, s = ours(
        False,
        arrays,
        dropout_rate=0.25,
        dropout_key=KEY if key is None else key,
        rowscale=rowscale,
        x_subset=subset,
        prenorm=True,
        implementation=implementation,
    )
    return z, s


def whole_arrays(rows=(4, 6), width=24, **extra):
    shapes = dict(x=(*rows, width), residual=(*rows, width), weight=(width,), bias=(width,))
    shapes |= dict(layerscale=(width,)) | extra
    return {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def value(arrays, **options):
    z, s = whole_call(arrays, **options)
    return jnp.sum(jnp.sin(z)) + jnp.sum(s**2)


@pytest.mark.parametrize("name", ["everything", "two_norms_rms", "subset"])
def test_grad_of_grad(name):
    """Against the plain form differentiated twice."""
    case = CASES[name]
    arrays, options = case.make("float32")
    keep, keep1 = (
        reference.dropout_keep(case.rate, KEY, 21, case.width, branch) for branch in (0, 1)
    )
    own = dict(dropout_rate=case.rate, dropout_key=KEY, prenorm=True)
    simple = dict(keep=keep, keep1=keep1, rate=case.rate, stream=jnp.float32)

    def twice(f):
        def scalar(arrays):
            return sum(jnp.sum(jnp.sin(a)) for a in f(case.is_rms, arrays, **options))

        def squares(arrays):
            return sum(jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(jax.grad(scalar)(arrays)))

        return jax.jit(jax.grad(squares))(arrays)

    got = twice(functools.partial(ours, **own))
    want = twice(functools.partial(plain, **simple))
    programs.assert_close(got, want, 2e-5)


def test_vmap_of_grad_on_any_operand(implementation):
    """Each operand mapped alone, and all: as a loop gives; the mask is that of the entry's key."""
    arrays, rowscale = whole_arrays(), normal(9, 4, 6)
    key = jnp.asarray(KEY)
    single = dict(arrays, key=key, rowscale=rowscale)
    noise = jax.random.normal
    many = {
        name: jnp.stack([key, key + 1, key + 2])
        if name == "key"
        else v + noise(jax.random.key(3), (3, *v.shape))
        for name, v in single.items()
    }

    def gradient(operands):
        operands = dict(operands)
        key, rowscale = operands.pop("key"), operands.pop("rowscale")
        options = dict(key=key, rowscale=rowscale, implementation=implementation)
        return jax.value_and_grad(value)(operands, **options)

    one = jax.jit(gradient)
    for mapped in (("x",), ("residual",), ("weight",), ("layerscale", "rowscale"), ("key",), many):
        axes = {name: 0 if name in mapped else None for name in single}
        operands = {name: many[name] if name in mapped else v for name, v in single.items()}
        got = jax.jit(jax.vmap(gradient, (axes,)))(operands)
        entries = [one(operands | {n: many[n][i] for n in mapped}) for i in range(3)]
        want = jax.tree.map(lambda *x: jnp.stack(x), *entries)
        programs.assert_close(got, want, 1e-5)


def test_vmap_over_subsets_and_another_axis(implementation):
    arrays = whole_arrays(rows=(5,), x=(3, 24))
    subsets = jnp.asarray([[1, 0, 2, 3, 0], [0, 0, 3, 0, 1]])
    residuals = normal(11, 5, 2, 24)

    def gradient(subset, residual):
        options = dict(subset=subset, implementation=implementation)
        return jax.grad(value)(arrays | {"residual": residual}, **options)

    got = jax.vmap(gradient, (0, 1))(subsets, residuals)
    entries = [gradient(subsets[i], residuals[:, i]) for i in range(2)]
    programs.assert_close(got, jax.tree.map(lambda *x: jnp.stack(x), *entries), 1e-5)


def test_checkpoint_keeps_the_named_residuals():
    """With them saved the forward runs once, without them once more."""
    arrays = whole_arrays()
    policies = jax.checkpoint_policies
    for names, runs in ((("norm_out", "norm_stream", "norm_mean", "norm_rsigma"), 1), ((), 2)):
        policy = policies.save_only_these_names(*names)
        gradient = jax.grad(jax.checkpoint(value, policy=policy))
        jaxpr = jax.make_jaxpr(gradient)(arrays)
        assert len(equations(jaxpr, "norm_forward")) == runs, names
        programs.assert_close(gradient(arrays), jax.grad(value)(arrays), 1e-6)


def test_a_call_writes_no_more_than_it_needs():
    """Results that are off: the stream of an inference call, of a plain norm, and its gradient."""
    x, weight = jnp.ones((3, 8), jnp.bfloat16), jnp.ones(8)

    def results(f, primitive):
        (equation,) = equations(jax.make_jaxpr(f)(x), primitive)
        return [v.aval.shape != (0,) for v in equation.outvars]

    def norm(x):
        return jax_flash.rms_norm(x, weight).astype(jnp.float32).sum()

    def add(x):
        return jax_flash.dropout_add_layer_norm(x, x, weight).astype(jnp.float32).sum()

    z, stream, mean, rsigma = 0, 2, 3, 4
    for f in (norm, add):
        assert not results(f, "norm_forward")[stream]
    assert not results(jax.grad(norm), "norm_forward")[stream]
    written = results(jax.grad(add), "norm_forward")
    assert [i for i, on in enumerate(written) if on] == [z, stream, mean, rsigma]
    dx, dweight = 0, 3
    written = results(jax.grad(add), "norm_backward")
    assert [i for i, on in enumerate(written) if on] == [dx, dweight]


@pytest.mark.parametrize("has_scale", [False, True])
def test_sums_of_the_last_kernel(implementation, has_scale, monkeypatch):
    """On one device sums over rows come in the weights' type; that rounds them as XLA would."""
    x, dz = (jnp.asarray(normal(i, 37, 136), jnp.bfloat16) for i in (1, 2))
    weight, bias, layerscale = (jnp.asarray(normal(i, 136), jnp.bfloat16) for i in (3, 4, 5))
    scale = dict(layerscale=layerscale) if has_scale else {}

    def f(x, weight, bias, scale):
        call = functools.partial(jax_flash.dropout_add_layer_norm, implementation=implementation)
        return (call(x, x, weight, bias, **scale) * dz).astype(jnp.float32).sum()

    def gradients(devices):
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        gradient = jax.grad(f, (1, 2, 3))
        jaxpr = jax.make_jaxpr(gradient)(x, weight, bias, scale)
        (equation,) = equations(jaxpr, "norm_backward")
        types = {v.aval.dtype.name for v in equation.outvars[3:] if v.aval.shape != (0,)}
        return types, jax.jit(gradient)(x, weight, bias, scale)

    (wide, several), (own, alone) = gradients(8), gradients(1)
    assert (wide, own) == ({"float32"}, {"bfloat16"})
    for a, b in zip(jax.tree.leaves(several), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_exports_with_any_batch():
    arrays = whole_arrays()
    symbol = jax.export.symbolic_shape("n, 24")
    shape = jax.ShapeDtypeStruct(symbol, jnp.float32)

    def f(x, residual):
        return whole_call(arrays | dict(x=x, residual=residual))

    exported = jax.export.export(jax.jit(f))(shape, shape)
    x, residual = normal(1, 5, 24), normal(2, 5, 24)
    programs.assert_close(tuple(exported.call(x, residual)), f(x, residual), 1e-6)


def lowered_for_cuda(f, *arrays):
    return jax.jit(f).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@programs.installed("cuda")
def test_becomes_two_custom_calls_on_cuda():
    """Rows as they lie in memory, one axis of entries; nothing of the size of x beside them."""
    arrays = whole_arrays()
    text = lowered_for_cuda(jax.grad(value), arrays)
    (forward, inputs, outputs), (backward, inputs_back, outputs_back) = programs.custom_calls(text)
    assert (forward, backward) == ("jax_flash.norm_forward", "jax_flash.norm_backward")
    assert inputs[:3] == ["1x24x24xf32", "0xf32", "1x24x24xf32"]
    assert outputs[:5] == ["1x24x24xf32", "0xf32", "1x24x24xf32", "1x24xf32", "1x24xf32"]
    assert inputs_back[1:4] == outputs[2:5] and inputs_back[-5:] == inputs[-5:]
    assert outputs_back[3:5] == ["1x24xf32"] * 2 and outputs_back[9] == "3x1x24x24xf32"
    mapped = jax.vmap(jax.grad(value), ({name: 0 if name == "x" else None for name in arrays},))
    text = lowered_for_cuda(mapped, arrays | {"x": jnp.ones((5, *arrays["x"].shape))})
    (_, inputs, outputs), (_, _, outputs_back) = programs.custom_calls(text)
    assert inputs[:3] == ["5x24x24xf32", "0xf32", "1x24x24xf32"] and inputs[3] == "1x24xf32"
    assert outputs[0] == "5x24x24xf32" and outputs_back[3] == "5x24xf32"


@programs.installed("cuda")
def test_what_the_kernels_refuse_runs_in_xla_s_form():
    """With a warning; and without one where XLA's form is the faster one."""

    def f(x):
        return jax_flash.rms_norm(x, jnp.ones(x.shape[-1]))

    for x, reason in (
        (jax.ShapeDtypeStruct((2, 16392), jnp.float32), "16392 features"),
        (jax.ShapeDtypeStruct((1 << 30, 8), jnp.bfloat16), None),
        (jax.ShapeDtypeStruct(((1 << 30) + 1, 8), jnp.bfloat16), "rows"),
        (jax.ShapeDtypeStruct((4, 12), jnp.bfloat16), ""),
    ):
        programs.forget_warnings()
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            text = lowered_for_cuda(f, x)
        assert ("custom_call @jax_flash" in text) == (reason is None)
        assert bool(reason) == any(reason and reason in str(w.message) for w in given)


# Devices -----------------------------------------------------------------------------------------


def mesh_of(*sizes, kind=AxisType.Auto):
    devices = np.array(jax.devices("cpu")[: int(np.prod(sizes))]).reshape(sizes)
    return jax.sharding.Mesh(devices, ("a", "b")[: len(sizes)], axis_types=(kind,) * len(sizes))


def run(f, *args):
    """(results, collectives of the compiled program)."""
    compiled = jax.jit(f).lower(*args).compile()
    return compiled(*args), collectives(compiled.as_text())


def put(mesh, arrays, spec):
    """Arrays of rows cut so, vectors whole."""
    return {
        name: jax.device_put(x, NamedSharding(mesh, spec if x.ndim > 1 else P()))
        for name, x in arrays.items()
    }


ROWS = (8, 4)


@functools.cache
def on_one_device():
    arrays = whole_arrays(ROWS)
    return jax.device_get(jax.jit(jax.value_and_grad(value))(arrays)), whole_call(arrays)


@pytest.mark.parametrize(
    "sizes,spec",
    [((8,), P("a")), ((2, 4), P("a", "b")), ((4,), P(None, "a")), ((2, 4), P(("a", "b")))],
    ids=str,
)
def test_rows_are_shared_without_traffic(sizes, spec):
    """The forward moves nothing, the backward only sums of the vectors' gradients: dweight, dbias,
    dlayerscale; the dropout mask is that of one device."""
    mesh = mesh_of(*sizes)
    arrays = put(mesh, whole_arrays(ROWS), spec)
    (want_value, want), want_results = on_one_device()
    results, traffic = run(whole_call, arrays)
    assert traffic == {}
    programs.assert_close(results, want_results, 1e-6)
    assert results[0].sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)
    gradient, traffic = run(jax.grad(value), arrays)
    assert set(traffic) == {"all-reduce"}
    assert sorted(traffic["all-reduce"]) == [(24,)] * 3
    programs.assert_close(gradient, want, 2e-6)
    for name in ("x", "residual"):
        assert gradient[name].sharding.is_equivalent_to(NamedSharding(mesh, spec), 3)


@pytest.mark.parametrize("spec", [P(None, None, "a"), P("b", None, "a")], ids=str)
def test_sharded_features_are_gathered(spec):
    arrays = put(mesh_of(2, 4), whole_arrays(ROWS), spec)
    (_, want), want_results = on_one_device()
    results, traffic = run(whole_call, arrays)
    assert set(traffic) <= {"all-gather"} and traffic
    programs.assert_close(results, want_results, 1e-6)
    programs.assert_close(jax.jit(jax.grad(value))(arrays), want, 2e-6)


def test_explicit_mesh_and_shard_map():
    (_, want), _ = on_one_device()
    mesh = mesh_of(8, kind=AxisType.Explicit)
    with jax.set_mesh(mesh):
        arrays = put(mesh, whole_arrays(ROWS), P("a"))
        programs.assert_close(jax.jit(jax.grad(value))(arrays), want, 2e-6)

    arrays = whole_arrays(ROWS) | {"x1": normal(7, *ROWS, 24)}
    del arrays["layerscale"]

    def simple(arrays):
        return jnp.sum(jnp.sin(ours(True, arrays)))

    mesh = mesh_of(8)
    specs = {name: P("a") if x.ndim > 1 else P() for name, x in arrays.items()}
    shared = jax.shard_map(
        lambda a: jax.lax.psum(simple(a), "a"), mesh=mesh, in_specs=(specs,), out_specs=P()
    )
    got, traffic = run(jax.grad(shared), arrays)
    assert set(traffic) == {"all-reduce"}
    programs.assert_close(got, jax.jit(jax.grad(simple))(arrays), 2e-6)


def test_vmap_over_a_sharded_axis_and_pmap():
    """Each entry has its own sums: over the devices that share its rows, over none under pmap."""
    arrays = whole_arrays((4, 6))
    many = {name: jnp.stack([x + i / 8 for i in range(8)]) for name, x in arrays.items()}
    gradient = jax.grad(value)
    want = jax.jit(jax.vmap(gradient))(many)
    mesh = mesh_of(4, 2)
    cut = {
        name: jax.device_put(x, NamedSharding(mesh, P("a", "b") if x.ndim > 2 else P("a")))
        for name, x in many.items()
    }
    got, traffic = run(jax.vmap(gradient), cut)
    assert traffic == {"all-reduce": [(2, 24)] * 3}
    programs.assert_close(got, want, 2e-6)
    programs.assert_close(jax.pmap(gradient)(many), want, 2e-6)


def test_subsets_of_sharded_rows():
    """Each device takes what its rows name of a whole x, and gives its part of z and dx."""
    arrays = whole_arrays((16,), x=(5, 24))
    named = np.random.default_rng(0).permutation(16)
    x_subset, out_subset = (np.where(named < n, named + 1, 0).astype(np.int32) for n in (5, 11))

    def f(arrays, x_subset, out_subset):
        def scalar(arrays):
            options = dict(x_subset=x_subset, out_subset=out_subset, out_rows=11, prenorm=True)
            z, s = ours(False, arrays, dropout_rate=0.25, dropout_key=KEY, **options)
            return jnp.sum(jnp.sin(z)) + jnp.sum(s**2), z

        return jax.grad(scalar, has_aux=True)(arrays)

    want = jax.jit(f)(arrays, x_subset, out_subset)
    mesh = mesh_of(8)
    compact = {"x": arrays.pop("x")}
    cut = put(mesh, arrays, P("a")) | put(mesh, compact, P())
    subsets = (jax.device_put(i, NamedSharding(mesh, P("a"))) for i in (x_subset, out_subset))
    got, traffic = run(f, cut, *subsets)
    assert set(traffic) == {"all-reduce"}
    programs.assert_close(got, want, 2e-6)


# Edges -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_rms", [False, True])
def test_rows_that_are_not_finite_spoil_no_other(is_rms, implementation):
    x = np.array(normal(0, 6, 17))
    x[1], x[3, 5], x[4, 2] = -np.inf, np.nan, np.inf
    call = jax_flash.rms_norm if is_rms else jax_flash.layer_norm
    call = functools.partial(call, implementation=implementation)
    z = np.asarray(call(x, np.ones(17, np.float32)))
    good = [0, 2, 5]
    assert np.isfinite(z[good]).all() and np.isnan(z[[1, 3]]).all()
    if is_rms:
        assert np.isnan(z[4, 2]) and not np.delete(z[4], 2).any()
    else:
        assert np.isnan(z[4]).all()
    np.testing.assert_array_equal(z[good], call(x[good], np.ones(17, np.float32)))
    dx = jax.grad(lambda x: jnp.sum(jnp.nan_to_num(call(x, np.ones(17, np.float32)))))(x)
    assert np.isfinite(np.asarray(dx)[good]).all()


def test_no_rows_and_no_compact_rows(implementation):
    vector = jnp.ones(24)
    arrays = dict(x=jnp.ones((0, 3, 24)), residual=jnp.ones((0, 3, 24)), weight=vector)
    options = dict(dropout_rate=0.5, dropout_key=KEY, prenorm=True, return_mask=True)
    options["implementation"] = implementation
    gradient = jax.grad(lambda a: sum(jnp.sum(x) for x in ours(False, a, **options)))(arrays)
    assert gradient["x"].shape == (0, 3, 24)
    np.testing.assert_array_equal(gradient["weight"], 0)
    z = ours(True, dict(x=jnp.ones((0, 24)), residual=jnp.ones((3, 24)), weight=vector),
             x_subset=jnp.zeros(3, jnp.int32), implementation=implementation)  # fmt: skip
    np.testing.assert_allclose(z, 1, rtol=1e-3)
    batched = jax.vmap(lambda x: jax_flash.layer_norm(x, vector, implementation=implementation))
    assert batched(jnp.ones((2, 0, 24))).shape == (2, 0, 24)
    assert batched(jnp.ones((0, 3, 24))).shape == (0, 3, 24)


def test_traced_subsets_that_are_refused_elsewhere(implementation):
    """Out of range is none; rows named twice are summed."""
    x, weight = normal(0, 3, 24), jnp.ones(24)

    @jax.jit
    def f(x_subset, out_subset):
        def call(x):
            options = dict(x_subset=x_subset, out_subset=out_subset, out_rows=3, prenorm=True)
            options["implementation"] = implementation
            return jax_flash.dropout_add_rms_norm(x, None, weight, **options)

        results, pull = jax.vjp(call, x)
        return *results, *pull(results)

    wild = f(jnp.array([1, 7, -4, 3]), jnp.array([-1, 2, 99, 1]))
    tame = f(jnp.array([1, 0, 0, 3]), jnp.array([0, 2, 0, 1]))
    programs.assert_equal(wild, tame)
    assert np.isfinite(wild[0]).all()
    twice = f(jnp.array([1, 1, 2, 3]), jnp.array([2, 0, 2, 0]))
    apart = f(jnp.array([1, 1, 2, 3]), jnp.array([1, 0, 2, 0]))
    np.testing.assert_allclose(twice[0][1], apart[0][0] + apart[0][1], rtol=1e-6)
    np.testing.assert_array_equal(twice[0][0], 0)
    named_once = f(jnp.array([1, 0, 2, 3]), jnp.array([1, 0, 2, 0]))
    assert np.abs(apart[2][0] - named_once[2][0]).max() > 0.1
    np.testing.assert_allclose(apart[2][1:], named_once[2][1:], rtol=1e-6)


def test_the_same_call_has_the_same_bits(implementation):
    arrays = whole_arrays(rows=(40, 61), width=520)
    f = jax.jit(jax.value_and_grad(functools.partial(value, implementation=implementation)))
    first = f(arrays)
    for _ in range(3):
        programs.assert_equal(f(arrays), first)


# Refusals ----------------------------------------------------------------------------------------

X, W = np.ones((3, 8), np.float32), np.ones(8, np.float32)
HALF = jnp.ones((3, 8), jnp.bfloat16)


def add(*args, **options):
    return lambda: jax_flash.dropout_add_layer_norm(*args, **options)


REFUSED = {
    "x_type": (add(X.astype(int), None, W), TypeError, "x: expected a floating-point array"),
    "x_rank": (add(W[0], None, W), ValueError, "x: expected at least 1 axes"),
    "x_features": (add(X[:, :0], None, W[:0]), ValueError, "x: expected at least one feature"),
    "residual_shape": (
        add(X, X[:2], W), ValueError, r"residual: expected shape \(3, 8\), got shape \(2, 8\)"),
    "residual_type": (
        add(X, HALF, W), TypeError, "residual: expected x's dtype float32, got bfloat16"),
    "residual_half": (
        add(HALF, X.astype(np.float16), W),
        TypeError, "residual: expected x's dtype bfloat16 or float32, got float16"),
    "weight_none": (add(X, X, None), TypeError, r"weight: expected an array of shape \(8,\), got"),
    "weight_shape": (add(X, X, W[:7]), ValueError, r"weight: expected shape \(8,\), got shape"),
    "weight_type": (add(X, X, W.astype(np.float16)), TypeError, "weight: expected x's dtype"),
    "bias_type": (
        add(HALF, None, W, jnp.ones(8, jnp.bfloat16)),
        TypeError, "bias: expected weight's dtype float32, got bfloat16"),
    "layerscale": (add(X, X, W, layerscale=X), ValueError, r"layerscale: expected shape \(8,\)"),
    "rowscale": (
        add(X, X, W, rowscale=np.ones(4, np.float32)),
        ValueError, r"rowscale: expected a scalar or shape \(3,\), got shape \(4,\)"),
    "x1_shape": (add(X, X, W, x1=X[:1]), ValueError, r"x1: expected x's shape \(3, 8\)"),
    "x1_type": (add(X, X, W, x1=HALF), TypeError, "x1: expected x's dtype float32, got bfloat16"),
    "x1_rowscale": (
        add(X, X, W, x1=X, rowscale=2.0), ValueError, "rowscale: expected None together with x1"),
    "bias1": (add(X, X, W, bias1=W), ValueError, "bias1: expected weight1 with it, got None"),
    "epsilon": (add(X, X, W, epsilon=-1.0), ValueError, "epsilon: expected a number >= 0, got"),
    "epsilon_nan": (add(X, X, W, epsilon=float("nan")), ValueError, "epsilon: .* got nan"),
    "epsilon_array": (add(X, X, W, epsilon=X), TypeError, "epsilon: expected a Python float"),
    "prenorm": (add(X, X, W, prenorm=1), TypeError, "prenorm: expected a Python bool"),
    "rate": (add(X, X, W, dropout_rate=1.0), ValueError, r"dropout_rate: expected a rate in \[0"),
    "key": (add(X, X, W, dropout_rate=0.1), ValueError, "dropout_key: expected a JAX PRNG key"),
    "subset_rank": (
        add(X[None], None, W, x_subset=np.array([1])),
        ValueError, r"x: expected shape \[M, D\] with x_subset, got shape \(1, 3, 8\)"),
    "subset_type": (
        add(X, None, W, x_subset=W), TypeError, "x_subset: expected an int32 array, got float32"),
    "subset_range": (
        add(X, None, W, x_subset=np.array([1, 4])),
        ValueError, r"x_subset: expected rows in \[1, 3\], or 0 for none, got 1..4"),
    "subset_twice": (
        add(X, None, W, x_subset=np.array([2, 0, 2])),
        ValueError, "x_subset: expected each row at most once, got row 2 several times"),
    "out_shape": (
        add(X, None, W, out_subset=np.array([1]), out_rows=1),
        ValueError, r"out_subset: expected shape \(3,\), got shape \(1,\)"),
    "out_rows": (
        add(X, None, W, out_subset=np.array([1, 0, 0])),
        ValueError, "out_rows: expected out_rows and out_subset together, got None"),
    "out_rows_type": (
        add(X, None, W, out_subset=np.array([1, 0, 0]), out_rows=1.0),
        TypeError, "out_rows: expected a Python int"),
    "cuda": (
        add(jnp.ones((1, 16392)), None, jnp.ones(16392), implementation="cuda"),
        NotImplementedError, "implementation='cuda'"),
    "cpu": (
        add(X, X, W, implementation="cpu"),
        NotImplementedError, "implementation='cpu': norm has no cpu kernels"),
    "tpu": (add(X, X, W, implementation="tpu"), ValueError, "implementation: expected one of"),
    "layer_norm": (lambda: jax_flash.layer_norm(X, W[:3]), ValueError, "weight: expected shape"),
    "rms_norm": (lambda: jax_flash.rms_norm(X, W, X), ValueError, "bias: expected shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_words(case):
    call, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        call()
