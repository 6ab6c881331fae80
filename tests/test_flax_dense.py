"""FusedDense and FusedMLP, Linen and NNX: Flax's weights and numbers, options, refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import linen as nn
from flax import nnx

import jax_flash
from jax_flash import linen
from jax_flash import nnx as flash_nnx

B, T, D, F, E = 2, 5, 12, 20, 7
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


class FlaxMLP(nn.Module):
    """What FusedMLP must equal, weight for weight."""

    @nn.compact
    def __call__(self, x):
        bias = nn.initializers.normal()
        x = nn.gelu(nn.Dense(F, name="fc1", bias_init=bias)(x))
        return nn.Dense(E, name="fc2", bias_init=bias)(x)


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_dense_is_flax_dense(use_bias, dtype):
    x = normal(0, B, T, D)
    options = dict(features=F, use_bias=use_bias, dtype=dtype, bias_init=nn.initializers.normal())
    theirs, ours = nn.Dense(**options), linen.FusedDense(**options)
    variables = theirs.init(jax.random.key(1), x)
    same = ours.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, variables, same)
    tolerance = dict(rtol=2e-2, atol=2e-2) if dtype else {}
    out = ours.apply(variables, x)
    want = theirs.apply(variables, x)
    assert out.dtype == want.dtype
    close(out.astype(jnp.float32), want.astype(jnp.float32), **tolerance)


def test_mlp_is_two_flax_layers():
    x = normal(0, B, T, D)
    theirs = FlaxMLP()
    ours = linen.FusedMLP(
        hidden_features=F, out_features=E, bias_init=nn.initializers.normal(), checkpoint_level=1
    )
    variables = theirs.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, variables, ours.init(jax.random.key(1), x))

    def gradient(layer):
        return jax.value_and_grad(lambda v: jnp.sum(jnp.sin(layer.apply(v, x))))(variables)

    jax.tree.map(close, gradient(ours), gradient(theirs))


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_linen_and_nnx_agree(activation):
    x = normal(0, B, T, D)
    layer = flash_nnx.FusedMLP(D, F, E, activation=activation, rngs=nnx.Rngs(0))
    parameters = {
        name: {
            "kernel": getattr(layer, name).kernel[...],
            "bias": getattr(layer, name).bias[...] + 0.5,
        }
        for name in ("fc1", "fc2")
    }
    layer.fc1.bias[...] = parameters["fc1"]["bias"]
    layer.fc2.bias[...] = parameters["fc2"]["bias"]
    same = linen.FusedMLP(hidden_features=F, out_features=E, activation=activation)
    want = same.apply({"params": parameters}, x)
    close(layer(x), want)
    assert jnp.abs(want).max() > 0.1
    gradients = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)
    reference = jax.grad(lambda p: jnp.sum(same.apply({"params": p}, x) ** 2))(parameters)
    for name in ("fc1", "fc2"):
        close(gradients[name]["kernel"][...], reference[name]["kernel"], rtol=2e-4, atol=2e-4)


def test_nnx_dense_is_nnx_linear():
    x = normal(0, B, T, D)
    ours = flash_nnx.FusedDense(D, F, rngs=nnx.Rngs(3))
    theirs = nnx.Linear(D, F, rngs=nnx.Rngs(3))
    np.testing.assert_array_equal(ours.kernel[...], theirs.kernel[...])
    close(ours(x), theirs(x))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_gates_and_residuals(kind):
    x = normal(0, B, T, D)
    if kind == "linen":
        layer = linen.FusedDense(features=F, activation="geglu", return_residual=True)
        variables = layer.init(jax.random.key(0), x)
        kernel, call = variables["params"]["kernel"], lambda x: layer.apply(variables, x)
    else:
        call = flash_nnx.FusedDense(
            D, F, activation="geglu", return_residual=True, rngs=nnx.Rngs(0)
        )
        kernel = call.kernel[...]
    assert kernel.shape == (D, 2 * F)
    out, residual = call(x)
    np.testing.assert_array_equal(residual, x)
    close(out, jax_flash.dense(x, kernel, activation="geglu"))


def test_default_widths():
    x = normal(0, B, T, D)
    shapes = jax.eval_shape(linen.FusedMLP().init, jax.random.key(0), x)["params"]
    assert shapes["fc1"]["kernel"].shape == (D, 4 * D)
    assert shapes["fc2"]["kernel"].shape == (4 * D, D)
    assert flash_nnx.FusedMLP(D, rngs=nnx.Rngs(0)).fc2.kernel.shape == (4 * D, D)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize(
    "option, message",
    [
        (dict(activation="elu"), "activation: expected one of"),
        (dict(checkpoint_level=5), "checkpoint_level: expected 0, 1 or 2"),
        (dict(implementation="cuda"), "implementation='cuda': "),
    ],
)
def test_refusals(kind, option, message):
    x = normal(0, B, T, D)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        if kind == "linen":
            linen.FusedMLP(**option).init(jax.random.key(0), x)
        else:
            flash_nnx.FusedMLP(D, rngs=nnx.Rngs(0), **option)(x)
