"""Products with GELU in their epilogue: the primitives, and `dense` and `mlp` that use them.

Widths are multiples of 8, without which tests/test_dense.py's plain products run.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jax_flash
from jax_flash._ops import dense_gelu as ops
from jax_flash.reference import dense as reference
from tests import programs
from tests.test_dense import check, draw, in_type, plain_mlp, with_gradients

quick_compilation = programs.quick_compilation
BATCH, ROWS, INPUTS, HIDDEN, OUTPUTS = 2, 7, 24, 40, 16
TARGETS = ("jax_flash.dense_gelu_forward", "jax_flash.dense_gelu_backward")


@pytest.fixture(
    params=["xla", pytest.param("cuda", marks=[pytest.mark.gpu, programs.installed("cuda")])]
)
def implementation(request):
    """As one asks for it: None takes the primitives' own form on the CPU."""
    on = jax.devices("cpu" if request.param == "xla" else "gpu")[0]
    with jax.default_device(on):
        yield None if request.param == "xla" else "cuda"


def operands(dtype, has_bias=True, lead=(BATCH, ROWS), widths=(INPUTS, HIDDEN, OUTPUTS)):
    inputs, hidden, outputs = widths
    scale = np.float32(inputs**-0.5), np.float32(hidden**-0.5)
    return dict(
        x=draw(0, dtype, *lead, inputs),
        weight1=draw(1, dtype, inputs, hidden) * scale[0],
        bias1=draw(2, dtype, hidden) if has_bias else None,
        weight2=draw(3, dtype, hidden, outputs) * scale[1],
        bias2=draw(4, dtype, outputs) if has_bias else None,
    )


def rounded(dtype, tensors):
    """As the type holds them, so that every form begins with the same numbers."""
    return {
        k: None if v is None else np.asarray(jnp.asarray(v, dtype).astype(jnp.float32))
        for k, v in tensors.items()
    }


plain = functools.partial(plain_mlp, "gelu_tanh")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("level", [0, 1, 2])
def test_mlp(implementation, dtype, has_bias, level):
    tensors = rounded(dtype, operands(dtype, has_bias))
    call = functools.partial(jax_flash.mlp, checkpoint_level=level, implementation=implementation)
    check(call, plain, tensors, dtype, reference.mlp(**tensors, activation="gelu_tanh"))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize(
    "lead, widths",
    [
        ((1,), (8, 8, 8)),
        ((197,), (1000, 264, 40)),
        ((3, 1, 5), (8, 2056, 24)),
        ((613,), (136, 8, 520)),
        ((2, 512), (256, 1024, 256)),
    ],
)
def test_sizes(implementation, dtype, lead, widths):
    tensors = rounded(dtype, operands(dtype, True, lead, widths))
    call = functools.partial(jax_flash.mlp, implementation=implementation)
    check(call, plain, tensors, dtype)


@pytest.mark.parametrize("level", [0, 2])
def test_dense(implementation, level):
    t = rounded(jnp.bfloat16, operands(jnp.bfloat16))
    tensors = {"x": t["x"], "weight": t["weight1"], "bias": t["bias1"]}
    call = functools.partial(
        jax_flash.dense_gelu, checkpoint_level=level, implementation=implementation
    )
    exact = reference.dense(**tensors, activation="gelu_tanh")
    form = lambda x, weight, bias: jax.nn.gelu(x @ weight + bias)  # noqa: E731
    check(call, form, tensors, jnp.bfloat16, exact)
    # Without a gradient nothing is kept, by another epilogue.
    out = jax.jit(call)(**in_type(jnp.bfloat16, tensors))
    kept = jax.jit(lambda t: jax.vjp(lambda t: call(**t), t)[0])(in_type(jnp.bfloat16, tensors))
    np.testing.assert_allclose(
        out.astype(jnp.float32), kept.astype(jnp.float32), rtol=1e-2, atol=1e-2
    )


def test_extreme_rows(implementation):
    """NaN and inf stay in their rows; what GELU makes of large numbers is 0 or themselves."""
    t = in_type(jnp.bfloat16, operands(jnp.bfloat16, lead=(ROWS,)))
    x = t["x"].at[0, 0].set(jnp.nan).at[1, :].set(jnp.inf).at[2, :].multiply(1e4)
    call = functools.partial(jax_flash.dense_gelu, implementation=implementation)
    out, pullback = jax.vjp(lambda x: call(x, t["weight1"], t["bias1"]), x)
    (dx,) = pullback(jnp.ones_like(out))
    pre = (x @ t["weight1"] + t["bias1"]).astype(jnp.float32)
    assert jnp.isnan(out[0]).all()
    large = jnp.abs(pre[2]) > 10
    assert large.sum() > 20
    np.testing.assert_allclose(
        out[2].astype(jnp.float32)[large], jnp.where(pre[2] > 0, pre[2], 0)[large], rtol=1e-2
    )
    assert jnp.isfinite(out[2:]).all() and jnp.isfinite(dx[2:]).all()


def test_the_same_call_twice_is_the_same(implementation):
    tensors = in_type(jnp.bfloat16, operands(jnp.bfloat16, True, (613,), (264, 1032, 136)))
    cotangent = draw(9, jnp.bfloat16, 613, 136)
    call = functools.partial(jax_flash.mlp, implementation=implementation)
    function = jax.jit(functools.partial(with_gradients, call))
    first, second = function(tensors, cotangent), function(tensors, cotangent)
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.gpu
@programs.installed("cuda")
def test_it_is_recorded_in_a_graph():
    """Many products in a loop, which XLA records into a CUDA graph."""
    with jax.default_device(jax.devices("gpu")[0]):
        x = jnp.asarray(draw(0, jnp.bfloat16, 256, 64), jnp.bfloat16)
        weight = jnp.asarray(draw(1, jnp.bfloat16, 64, 64), jnp.bfloat16) / 8

        def several(x, implementation):
            for _ in range(8):
                x = jax_flash.dense_gelu(x, weight, implementation=implementation)
            return x

        options = {
            "xla_gpu_enable_command_buffer": "CUSTOM_CALL,FUSION,CUBLASLT",
            "xla_gpu_graph_min_graph_size": 1,
        }
        graph = jax.jit(functools.partial(several, implementation="cuda"), compiler_options=options)
        want = several(x, "cuda")
        for _ in range(3):
            np.testing.assert_array_equal(graph(x), want)


# Transformations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", ["x", "weight1", "bias1", "weight2"])
def test_vmap(mapped):
    tensors = in_type(jnp.bfloat16, operands(jnp.bfloat16))
    several = jnp.stack([tensors[mapped], 2 * tensors[mapped]])

    def gradient(value):
        def total(v):
            return jnp.sum(jax_flash.mlp(**(tensors | {mapped: v})).astype(jnp.float32) ** 2)

        return jax.grad(total)(value)

    ours = jax.vmap(gradient)(several)
    for one, value in zip(ours, several, strict=True):
        np.testing.assert_allclose(
            one.astype(jnp.float32), gradient(value).astype(jnp.float32), rtol=5e-2, atol=0.5
        )


def test_vmap_of_both_primitives_is_the_formula():
    """Every combination of what is mapped, twice."""
    config = ops.GeluConfig(row_axes=1)
    x = jnp.asarray(draw(0, jnp.bfloat16, 2, 3, 5, 16), jnp.bfloat16)
    weight = jnp.asarray(draw(1, jnp.bfloat16, 2, 16, 8), jnp.bfloat16)
    bias = jnp.asarray(draw(2, jnp.bfloat16, 3, 8), jnp.bfloat16)
    axes = ((0, 0, None), (0, None, 0))

    def nested(f):
        return jax.vmap(jax.vmap(f, axes[1]), axes[0])

    def agree(got, want):
        assert got.shape == want.shape
        error = jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32)).max()
        assert error <= 0.01 * jnp.abs(want.astype(jnp.float32)).max()

    got = nested(lambda *a: ops.product_gelu(config, *a))(x, weight, bias)
    want = nested(functools.partial(ops.forward, config))(x, weight, bias)
    jax.tree.map(agree, got, want)
    arrays = (x, jnp.swapaxes(weight, -1, -2), got[1])
    axes = ((0, 0, 0), (0, None, 0))
    got = nested(lambda *a: ops.product_gelu_gradient(config, *a))(*arrays)
    want = nested(functools.partial(ops.backward, config))(*arrays)
    jax.tree.map(agree, got, want)


def test_grad_of_grad():
    tensors = in_type(jnp.bfloat16, operands(jnp.bfloat16))

    def twice(function, t):
        def penalty(x):
            inner = jax.grad(lambda x: jnp.sum(function(**(t | {"x": x})).astype(jnp.float32)))
            return jnp.sum(inner(x).astype(jnp.float32) ** 2)

        return jax.grad(penalty)(t["x"]).astype(jnp.float32)

    exact = twice(plain, in_type(jnp.float32, tensors))
    ours = twice(jax_flash.mlp, tensors)
    assert np.abs(ours - exact).max() < 0.05 * np.abs(exact).max()


# Devices -----------------------------------------------------------------------------------------


def mesh():
    return jax.sharding.Mesh(np.array(jax.devices("cpu")[:4]).reshape(2, 2), ("rows", "hidden"))


SPECS = {
    "x": P("rows"),
    "weight1": P(None, "hidden"),
    "bias1": P("hidden"),
    "weight2": P("hidden"),
    "bias2": P(),
}


def test_rows_and_hidden_columns_shard_freely():
    """As Megatron cuts it: one all-reduce forward, of the second product."""
    with jax.default_device(jax.devices("cpu")[0]):
        tensors = in_type(jnp.bfloat16, operands(jnp.bfloat16, lead=(4, ROWS)))
        placed = {k: jax.device_put(v, NamedSharding(mesh(), SPECS[k])) for k, v in tensors.items()}
        call = jax.jit(lambda t: jax_flash.mlp(**t))
        compiled = call.lower(placed).compile()
        assert set(programs.collectives(compiled.as_text())) == {"all-reduce"}
        cotangent = draw(9, jnp.bfloat16, 4, ROWS, OUTPUTS)
        ours = jax.jit(functools.partial(with_gradients, jax_flash.mlp))(placed, cotangent)
        want = jax.jit(functools.partial(with_gradients, jax_flash.mlp))(tensors, cotangent)
        for name, value in want.items():
            limit = 0.02 * np.abs(value.astype(jnp.float32)).max()
            difference = ours[name].astype(jnp.float32) - np.asarray(value.astype(jnp.float32))
            assert np.abs(difference).max() <= limit, name


def test_a_sharded_input_width_is_gathered():
    with jax.default_device(jax.devices("cpu")[0]):
        t = in_type(jnp.bfloat16, operands(jnp.bfloat16))
        x = jax.device_put(t["x"], NamedSharding(mesh(), P(None, None, "hidden")))
        got = jax.jit(lambda x: jax_flash.dense_gelu(x, t["weight1"], t["bias1"]))(x)
        want = jax_flash.dense_gelu(t["x"], t["weight1"], t["bias1"])
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_under_shard_map(sequence_parallel):
    with jax.default_device(jax.devices("cpu")[0]):
        t = in_type(jnp.bfloat16, operands(jnp.bfloat16, lead=(8,)))
        rows = P("hidden") if sequence_parallel else P()
        specs = SPECS | {"x": rows}
        options = dict(axis_name="hidden", sequence_parallel=sequence_parallel)
        shared = jax.shard_map(
            lambda t: jax_flash.mlp(**t, **options),
            mesh=jax.sharding.Mesh(np.array(jax.devices("cpu")[:2]), ("hidden",)),
            in_specs=(specs,),
            out_specs=rows,
        )

        def gradients(function):
            def total(t):
                return jnp.sum(jnp.sin(function(t).astype(jnp.float32)))

            return jax.jit(jax.value_and_grad(total))(t)

        ours, want = gradients(shared), gradients(lambda t: jax_flash.mlp(**t))
        for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(want), strict=True):
            one, other = (np.asarray(a.astype(jnp.float32)) for a in (one, other))
            assert np.abs(one - other).max() <= 0.05 * np.abs(other).max() + 0.05


# Lowering ----------------------------------------------------------------------------------------


def lowered_for_cuda(function, *arrays):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


def gradient(**options):
    def total(t):
        return jnp.sum(jax_flash.mlp(**t, **options).astype(jnp.float32))

    return jax.value_and_grad(total)


@programs.installed("cuda")
def test_on_cuda_a_gradient_is_two_custom_calls():
    tensors = in_type(jnp.bfloat16, operands(jnp.bfloat16))
    text = lowered_for_cuda(gradient(), tensors)
    assert [text.count(f"@{target}(") for target in TARGETS] == [1, 1]
    text = lowered_for_cuda(gradient(checkpoint_level=2), tensors)
    assert [text.count(f"@{target}(") for target in TARGETS] == [2, 1]
    text = lowered_for_cuda(lambda t: jax_flash.mlp(**t), tensors)
    assert [text.count(f"@{target}(") for target in TARGETS] == [1, 0]
    assert "tensor<0xbf16>" in text  # the pre-activation is not written


@programs.installed("cuda")
@pytest.mark.parametrize(
    "dtype, options, change",
    [
        (jnp.float32, {}, {}),
        (jnp.bfloat16, dict(implementation="xla"), {}),
        (jnp.bfloat16, dict(activation="gelu"), {}),
        (jnp.bfloat16, dict(activation="relu"), {}),
        (jnp.bfloat16, {}, dict(widths=(INPUTS, HIDDEN + 4, OUTPUTS))),
        (jnp.bfloat16, {}, dict(widths=(INPUTS + 2, HIDDEN, OUTPUTS))),
    ],
)
def test_what_is_no_part_of_a_product_runs_in_xla(dtype, options, change, recwarn):
    tensors = in_type(dtype, operands(dtype, **change))
    text = lowered_for_cuda(gradient(**options), tensors)
    assert "custom_call @jax_flash" not in text
    assert not [w for w in recwarn if "jax_flash" in str(w.message)]


@programs.installed("cuda")
def test_a_mapped_weight_runs_in_xla_with_a_warning():
    tensors = in_type(jnp.bfloat16, operands(jnp.bfloat16))
    weights = jnp.stack([tensors["weight1"]] * 2)
    call = jax.vmap(lambda w: jax_flash.dense_gelu(tensors["x"], w))
    jax_flash._ops._op.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="no cuda kernel for this call: vmap over a weight"):
        assert "custom_call @jax_flash" not in lowered_for_cuda(call, weights)


# Bad input ---------------------------------------------------------------------------------------


@programs.installed("cuda")
@pytest.mark.parametrize(
    "options, change, message",
    [
        (dict(activation="swiglu"), dict(widths=(INPUTS, 2 * HIDDEN, OUTPUTS)), "'swiglu'"),
        ({}, dict(widths=(INPUTS, 12, OUTPUTS)), "multiples of 8"),
        ({}, dict(lead=()), "one row without an axis"),
    ],
)
def test_cuda_by_name_says_why_not(options, change, message):
    t = in_type(jnp.bfloat16, operands(jnp.bfloat16, **change))
    with pytest.raises(NotImplementedError, match=f"implementation='cuda': .*{message}"):
        jax_flash.dense(
            t["x"],
            t["weight1"],
            t["bias1"],
            implementation="cuda",
            **({"activation": "gelu_tanh"} | options),
        )


@programs.installed("cuda")
def test_cuda_by_name_does_not_run_on_the_cpu():
    t = in_type(jnp.bfloat16, operands(jnp.bfloat16))
    with jax.default_device(jax.devices("cpu")[0]), pytest.raises(NotImplementedError, match="cpu"):
        jax_flash.dense_gelu(t["x"], t["weight1"], implementation="cuda")
