"""Dense operators: numbers, what they keep, gradients, transformations, devices, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_flash
from jax_flash._ops.dense import ACTIVATIONS, GATED
from jax_flash.reference import dense as reference
from tests import programs
from tests.helpers import assert_close

quick_compilation = programs.quick_compilation

BATCH, ROWS, INPUTS, HIDDEN, OUTPUTS = 2, 7, 11, 13, 5  # all differ, none a multiple of 8


@pytest.fixture(autouse=True)
def on_cpu():
    with jax.default_device(jax.devices("cpu")[0]):
        yield


def draw(seed, dtype, *shape):
    x = np.random.default_rng(seed).standard_normal(shape)
    return np.asarray(jnp.asarray(x, dtype).astype(jnp.float32))  # as the type holds it


def operands(dtype, activation, has_bias=True):
    width = 2 * HIDDEN if activation in GATED else HIDDEN
    return dict(
        x=draw(0, dtype, BATCH, ROWS, INPUTS),
        weight1=draw(1, dtype, INPUTS, width) / np.float32(2),
        bias1=draw(2, dtype, width) if has_bias else None,
        weight2=draw(3, dtype, HIDDEN, OUTPUTS) / np.float32(2),
        bias2=draw(4, dtype, OUTPUTS) if has_bias else None,
    )


PLAIN = {
    "identity": lambda x: x,
    "gelu_tanh": jax.nn.gelu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "squared_relu": lambda x: jax.nn.relu(x) ** 2,
    "swiglu": lambda x: jax.nn.silu(x[..., :HIDDEN]) * x[..., HIDDEN:],
    "geglu": lambda x: jax.nn.gelu(x[..., :HIDDEN]) * x[..., HIDDEN:],
}


def plain_mlp(activation, x, weight1, bias1, weight2, bias2):
    pre = x @ weight1 + (0 if bias1 is None else bias1)
    return PLAIN[activation](pre) @ weight2 + (0 if bias2 is None else bias2)


def in_type(dtype, tensors):
    return {k: None if v is None else jnp.asarray(v, dtype) for k, v in tensors.items()}


def with_gradients(function, tensors, cotangent):
    out, pullback = jax.vjp(lambda t: function(**t), tensors)
    gradients = pullback(jnp.asarray(cotangent, out.dtype))[0]
    return {"out": out} | {f"d{k}": v for k, v in gradients.items() if v is not None}


def check(function, plain, tensors, dtype, exact_out=None):
    """ours, the same function in float64, and the plain form in `dtype`, with all gradients."""
    shape = jax.eval_shape(lambda t: plain(**t), in_type(dtype, tensors)).shape
    cotangent = draw(9, dtype, *shape)
    ours = jax.jit(functools.partial(with_gradients, function))(in_type(dtype, tensors), cotangent)
    with jax.default_device(jax.devices("cpu")[0]):
        rounded = with_gradients(plain, in_type(dtype, tensors), cotangent)
        with jax.enable_x64(True):
            exact = with_gradients(plain, in_type(jnp.float64, tensors), cotangent)
            exact = {k: np.asarray(v) for k, v in exact.items()}
    if exact_out is not None:
        np.testing.assert_allclose(exact["out"], exact_out, rtol=1e-12, atol=1e-12)
    for name, value in ours.items():
        assert value.dtype == dtype, name
        assert_close(name, value, exact[name], rounded[name])


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp(activation, dtype):
    tensors = operands(dtype, activation)
    check(
        functools.partial(jax_flash.mlp, activation=activation),
        functools.partial(plain_mlp, activation),
        tensors,
        dtype,
        reference.mlp(**tensors, activation=activation),
    )


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("activation", ["gelu_tanh", "relu", "swiglu"])
def test_what_is_computed_again_is_the_same(activation, level):
    tensors = in_type(jnp.bfloat16, operands(jnp.bfloat16, activation))
    cotangent = draw(9, jnp.bfloat16, BATCH, ROWS, OUTPUTS)
    results = [
        with_gradients(
            functools.partial(jax_flash.mlp, activation=activation, checkpoint_level=at),
            tensors,
            cotangent,
        )
        for at in (0, level)
    ]
    for name, value in results[0].items():
        np.testing.assert_array_equal(value, results[1][name], err_msg=name)


@pytest.mark.parametrize(
    "activation, level, kept",
    [
        ("gelu_tanh", 0, {(BATCH, ROWS, HIDDEN): 2}),
        ("gelu_tanh", 1, {(BATCH, ROWS, HIDDEN): 1}),
        ("gelu_tanh", 2, {}),
        ("relu", 0, {(BATCH, ROWS, HIDDEN): 1, (BATCH, ROWS, (HIDDEN + 7) // 8): 1}),
        ("relu", 2, {}),
    ],
)
def test_what_is_kept(activation, level, kept):
    """The residuals of a call, beside its own operands."""
    tensors = in_type(jnp.bfloat16, operands(jnp.bfloat16, activation))
    function = functools.partial(jax_flash.mlp, activation=activation, checkpoint_level=level)
    _, pullback = jax.vjp(lambda t: function(**t), tensors)
    own = {v.shape for v in tensors.values()}
    found = {}
    for leaf in jax.tree.leaves(pullback):
        if leaf.shape not in own and leaf.ndim == 3:
            found[leaf.shape] = found.get(leaf.shape, 0) + 1
    assert found == kept


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", ["identity", "relu", "geglu"])
def test_dense(activation, has_bias):
    dtype = jnp.bfloat16
    t = operands(dtype, activation, has_bias)
    tensors = {"x": t["x"], "weight": t["weight1"], "bias": t["bias1"]}
    check(
        functools.partial(jax_flash.dense, activation=activation, checkpoint_level=2),
        lambda x, weight, bias: PLAIN[activation](x @ weight + (0 if bias is None else bias)),
        tensors,
        dtype,
        reference.dense(**tensors, activation=activation),
    )


@pytest.mark.parametrize(
    "shape", [(BATCH, ROWS, INPUTS), (ROWS, INPUTS), (INPUTS,), (2, 0, INPUTS)]
)
def test_one_device_has_one_axis_of_rows(shape, monkeypatch):
    """The same numbers, by a product of two axes that its bias follows at once."""
    t = in_type(jnp.bfloat16, operands(jnp.bfloat16, "relu"))
    x = jnp.asarray(draw(5, jnp.bfloat16, *shape), jnp.bfloat16)
    call = functools.partial(jax_flash.dense, weight=t["weight1"], bias=t["bias1"])
    want = call(x)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    np.testing.assert_array_equal(call(x), want)
    ranks = {len(v.aval.shape) for v in jax.make_jaxpr(call)(x).jaxpr.outvars}
    assert ranks == {len(shape)}
    text = str(jax.make_jaxpr(call)(x))
    if len(shape) == 3 and 0 not in shape:
        assert f"bf16[{BATCH * ROWS},{HIDDEN}] = dot_general" in text


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu", "relu", "squared_relu"])
def test_one_device_sums_a_bias_gradient_where_it_is_made(activation, monkeypatch):
    """In bfloat16, so that XLA makes one pass of both; the numbers are those of the plain form."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    tensors = operands(jnp.bfloat16, activation)
    call = functools.partial(jax_flash.mlp, activation=activation, implementation="xla")
    check(call, functools.partial(plain_mlp, activation), tensors, jnp.bfloat16)
    arrays = in_type(jnp.bfloat16, tensors)
    cotangent = draw(9, jnp.bfloat16, BATCH, ROWS, OUTPUTS)
    jaxpr = jax.make_jaxpr(functools.partial(with_gradients, call))(arrays, cotangent)
    sums = [e for e in programs.equations(jaxpr) if e.primitive.name == "reduce_sum"]
    found = {(e.outvars[0].aval.shape, e.invars[0].aval.dtype.name) for e in sums}
    assert {s for s in found if len(s[0]) == 1} == {
        ((HIDDEN,), "bfloat16"),
        ((OUTPUTS,), "float32"),
    }


@pytest.mark.parametrize("approximate", [True, False])
def test_dense_gelu(approximate):
    t = operands(jnp.float32, "gelu")
    out = jax_flash.dense_gelu(t["x"], t["weight1"], t["bias1"], approximate=approximate)
    name = "gelu_tanh" if approximate else "gelu"
    exact = reference.dense(t["x"], t["weight1"], t["bias1"], name)
    np.testing.assert_allclose(out, exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("operator", ["dense", "mlp"])
def test_the_residual_s_gradient_is_added_before_rounding(operator):
    t = in_type(jnp.bfloat16, operands(jnp.bfloat16, "gelu_tanh"))
    rest = [t["weight1"], t["bias1"]] + ([t["weight2"], t["bias2"]] if operator == "mlp" else [])
    call = functools.partial(getattr(jax_flash, operator), activation="gelu_tanh")
    (out, x), pullback = jax.vjp(lambda x: call(x, *rest, return_residual=True), t["x"])
    np.testing.assert_array_equal(x, t["x"])
    dout, dres = (
        jnp.asarray(draw(s, jnp.bfloat16, *y.shape), y.dtype) for s, y in ((5, out), (6, x))
    )
    dx = pullback((dout, dres))[0]
    whole = call(t["x"].astype(jnp.float32), *rest)
    wide = jax.vjp(lambda x: call(x, *rest), t["x"].astype(jnp.float32))[1](
        dout.astype(whole.dtype)
    )[0]
    exact = wide + dres.astype(jnp.float32)
    plain = jax.vjp(lambda x: call(x, *rest), t["x"])[1](dout)[0] + dres
    assert_close("dx", dx, np.asarray(exact, np.float64), plain)


def test_weights_in_float32_have_their_gradients_in_float32():
    t = in_type(jnp.float32, operands(jnp.bfloat16, "gelu_tanh"))
    x = t.pop("x").astype(jnp.bfloat16)
    out, pullback = jax.vjp(lambda w: jax_flash.mlp(x, **w), t)
    assert out.dtype == jnp.bfloat16
    gradients = pullback(jnp.ones_like(out))[0]
    assert {g.dtype for g in gradients.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu", "squared_relu"])
def test_grad_of_grad(activation):
    tensors = in_type(jnp.float32, operands(jnp.float32, activation))

    def twice(function, t):
        def penalty(x):
            inner = jax.grad(lambda x: jnp.sum(jnp.sin(function(**(t | {"x": x})))))
            return jnp.sum(inner(x) ** 2)

        return jax.grad(penalty)(t["x"])

    ours = twice(functools.partial(jax_flash.mlp, activation=activation), tensors)
    plain = twice(functools.partial(plain_mlp, activation), tensors)
    np.testing.assert_allclose(ours, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mapped", ["x", "weight1", "bias2"])
def test_vmap(mapped):
    tensors = in_type(jnp.float32, operands(jnp.float32, "gelu_tanh"))
    several = jnp.stack([tensors[mapped], 2 * tensors[mapped]])

    def gradient(value):
        return jax.grad(lambda v: jnp.sum(jax_flash.mlp(**(tensors | {mapped: v})) ** 2))(value)

    ours = jax.vmap(gradient)(several)
    for one, value in zip(ours, several, strict=True):
        np.testing.assert_allclose(one, gradient(value), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize("shape", [(0, INPUTS), (INPUTS,), (3, 0, 2, INPUTS)])
def test_any_leading_axes(shape, activation):
    t = in_type(jnp.float32, operands(jnp.float32, activation))
    t["x"] = jnp.ones(shape)
    call = functools.partial(jax_flash.mlp, activation=activation)
    assert call(**t).shape == (*shape[:-1], OUTPUTS)
    gradients = jax.grad(lambda t: jnp.sum(call(**t)))(t)
    assert {k: g.shape for k, g in gradients.items()} == {k: v.shape for k, v in t.items()}


# Devices -----------------------------------------------------------------------------------------

DEVICES = 4
BIG = dict(x=(8, 6), weight1=(6, 16), bias1=(16,), weight2=(8, 5), bias2=(5,))


def mesh():
    return jax.sharding.Mesh(np.array(jax.devices("cpu")[:DEVICES]), ("m",))


def gate_and_up(weight):
    """[.., 2 F], gate first -> the same columns, each device's gate and up side by side."""
    gate, up = jnp.split(weight, 2, axis=-1)
    parts = zip(jnp.split(gate, DEVICES, -1), jnp.split(up, DEVICES, -1), strict=True)
    return jnp.concatenate([half for part in parts for half in part], axis=-1)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel(sequence_parallel):
    t = {k: jnp.asarray(draw(i, jnp.float32, *s)) for i, (k, s) in enumerate(BIG.items())}
    rows = P("m") if sequence_parallel else P()
    specs = dict(x=rows, weight1=P(None, "m"), bias1=P("m"), weight2=P("m"), bias2=P())

    options = dict(axis_name="m", sequence_parallel=sequence_parallel)

    def whole(t):
        return jax_flash.mlp(**t, activation="swiglu", **options)

    def in_two(t):
        hidden = jax_flash.column_parallel_dense(
            t["x"], t["weight1"], t["bias1"], activation="swiglu", **options
        )
        return jax_flash.row_parallel_dense(hidden, t["weight2"], t["bias2"], **options)

    def shared(layers):
        return jax.shard_map(layers, mesh=mesh(), in_specs=(specs,), out_specs=rows)

    def cut(t):
        return t | {k: gate_and_up(t[k]) for k in ("weight1", "bias1")}

    def gradients(function):
        return jax.jit(jax.value_and_grad(lambda t: jnp.sum(jnp.sin(function(t)))))(t)

    exact = gradients(lambda t: jax_flash.mlp(**t, activation="swiglu"))
    for layers in (whole, in_two):
        ours = gradients(lambda t, layers=layers: shared(layers)(cut(t)))
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-4), ours, exact
        )
    text = jax.jit(shared(whole)).lower(cut(t)).compile().as_text()
    expected = {"all-gather", "reduce-scatter"} if sequence_parallel else {"all-reduce"}
    assert set(programs.collectives(text)) == expected


def test_rows_over_devices_move_nothing():
    t = {k: jnp.asarray(draw(i, jnp.float32, *s)) for i, (k, s) in enumerate(BIG.items())}
    place = functools.partial(jax.sharding.NamedSharding, mesh())
    t = {k: jax.device_put(v, place(P("m") if k == "x" else P())) for k, v in t.items()}
    call = jax.jit(lambda t: jax_flash.mlp(**t, activation="swiglu"))
    assert not programs.collectives(call.lower(t).compile().as_text())


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=np.ones((2, 3), int)), TypeError, "x: expected a floating-point array, got int"),
        (dict(weight1=np.ones((4, 6))), ValueError, r"weight1: expected shape \[11, outputs\]"),
        (dict(bias1=np.ones(3)), ValueError, r"bias1: expected shape \(13,\), got shape \(3,\)"),
        (dict(weight2=np.ones((4, 6))), ValueError, r"weight2: expected shape \[13, outputs\]"),
        (dict(activation="elu"), ValueError, "activation: expected one of .*, got 'elu'"),
        (dict(activation="swiglu"), ValueError, "weight1: expected an even number of columns"),
        (dict(checkpoint_level=3), ValueError, "checkpoint_level: expected 0, 1 or 2, got 3"),
        (dict(return_residual=1), TypeError, "return_residual: expected a Python bool"),
        (dict(sequence_parallel=True), ValueError, "sequence_parallel: expected False without"),
        (dict(implementation="cuda"), NotImplementedError, "implementation='cuda': "),
        (dict(implementation="fast"), ValueError, "implementation: expected one of .*, got 'fast'"),
    ],
)
def test_bad_input(change, error, message):
    call = operands(jnp.float32, "gelu_tanh") | change
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda: jax_flash.mlp(**call))
