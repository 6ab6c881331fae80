"""RMSNorm, DropoutAddLayerNorm, DropoutAddRMSNorm, Linen and NNX: Flax's weights and numbers."""

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

B, T, D = 2, 5, 12
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize("input_dtype", [jnp.float32, jnp.bfloat16])
def test_rms_norm_is_flax_s(dtype, input_dtype):
    x = normal(0, B, T, D, dtype=input_dtype)
    options = dict(dtype=dtype, scale_init=nn.initializers.normal())
    theirs, ours = nn.RMSNorm(**options), linen.RMSNorm(**options)
    variables = theirs.init(jax.random.key(1), x)
    jax.tree.map(np.testing.assert_array_equal, variables, ours.init(jax.random.key(1), x))
    out, want = ours.apply(variables, x), theirs.apply(variables, x)
    assert out.dtype == want.dtype
    tolerance = dict(rtol=2e-2, atol=2e-2) if want.dtype == jnp.bfloat16 else {}
    close(out.astype(jnp.float32), want.astype(jnp.float32), **tolerance)
    layer = flash_nnx.RMSNorm(D, dtype=dtype, rngs=nnx.Rngs(0))
    layer.scale[...] = variables["params"]["scale"]
    np.testing.assert_array_equal(layer(x), out)


@pytest.mark.parametrize("name, flax_norm", [("Layer", nn.LayerNorm), ("RMS", nn.RMSNorm)])
def test_a_residual_block_is_flax_s(name, flax_norm):
    """z and the stream, with layer scale, against Flax's norm of the sum."""
    x, residual = normal(0, B, T, D), normal(1, B, T, D)
    ours = getattr(linen, f"DropoutAdd{name}Norm")(
        prenorm=True, layerscale_init=0.5, scale_init=nn.initializers.normal()
    )
    parameters = ours.init(jax.random.key(2), x, residual)["params"]
    factor = parameters["layerscale"]
    assert set(parameters) == {"scale", "layerscale"} | ({"bias"} if name == "Layer" else set())
    own = {"params": {k: v for k, v in parameters.items() if k != "layerscale"}}
    assert jax.tree.structure(own) == jax.tree.structure(flax_norm().init(jax.random.key(2), x))

    def block(x, residual, factor):
        s = residual + x * factor
        return flax_norm().apply(own, s), s

    def both(function):
        out, pullback = jax.vjp(function, x, residual, factor)
        return out, pullback((normal(3, B, T, D), normal(4, B, T, D)))

    def layer(x, residual, factor):
        return ours.apply({"params": parameters | {"layerscale": factor}}, x, residual)

    jax.tree.map(functools.partial(close, rtol=1e-4, atol=1e-4), both(layer), both(block))
    other = getattr(flash_nnx, f"DropoutAdd{name}Norm")(
        D, prenorm=True, layerscale_init=0.5, rngs=nnx.Rngs(0)
    )
    other.scale[...] = parameters["scale"]
    jax.tree.map(np.testing.assert_array_equal, other(x, residual), layer(x, residual, factor))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_dropout(kind):
    """The operator's own mask from the layer's key; none where deterministic."""
    x, residual, rate = normal(0, B, T, D), normal(1, B, T, D), 0.5
    key = jax.random.key(5)
    if kind == "linen":
        layer = linen.DropoutAddRMSNorm(dropout_rate=rate, prenorm=True)
        variables = layer.init(key, x, residual, deterministic=True)
        call = functools.partial(layer.apply, variables, x, residual)
        dropped = call(deterministic=False, dropout_rng=key)
        kept = call(deterministic=True)
        again = call(deterministic=False, rngs={"dropout": key})
        other = call(deterministic=False, rngs={"dropout": jax.random.key(6)})
    else:
        layer = flash_nnx.DropoutAddRMSNorm(D, dropout_rate=rate, prenorm=True, rngs=nnx.Rngs(0))
        call = functools.partial(layer, x, residual)
        dropped = call(deterministic=False, rngs=nnx.Rngs(dropout=key))
        kept = nnx.view(layer, deterministic=True)(x, residual)
        again, other = call(deterministic=False), call(deterministic=False)
        key = nnx.Rngs(dropout=key).dropout()
    close(kept[1], residual + x)
    assert not np.array_equal(again[1], other[1])
    want = jax_flash.dropout_add_rms_norm(
        x,
        residual,
        jnp.ones(D),
        epsilon=1e-6,
        dropout_rate=rate,
        dropout_key=key,
        prenorm=True,
    )
    jax.tree.map(np.testing.assert_array_equal, dropped, want)


def test_drop_path_and_a_float32_stream():
    x = normal(0, B, T, D, dtype=jnp.bfloat16)
    rowscale = jnp.array([[0.0] * T, [2.0] * T])
    layer = linen.DropoutAddLayerNorm(prenorm=True, residual_in_fp32=True)
    variables = layer.init(jax.random.key(0), x)
    z, stream = layer.apply(variables, x, rowscale=rowscale)
    assert (z.dtype, stream.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(stream, x.astype(jnp.float32) * rowscale[..., None])
    layer = flash_nnx.DropoutAddLayerNorm(D, prenorm=True, residual_in_fp32=True, rngs=nnx.Rngs(0))
    jax.tree.map(np.testing.assert_array_equal, layer(x, rowscale=rowscale), (z, stream))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_refusals(kind):
    x = normal(0, B, T, D)
    with pytest.raises(ValueError, match="dropout_rate: expected"):
        if kind == "linen":
            linen.DropoutAddLayerNorm(dropout_rate=1.5).init(jax.random.key(0), x)
        else:
            flash_nnx.DropoutAddLayerNorm(D, dropout_rate=1.5, rngs=nnx.Rngs(0))
    with pytest.raises((ValueError, NotImplementedError), match="implementation"):
        if kind == "linen":
            linen.RMSNorm(implementation="cuda").init(jax.random.key(0), x)
        else:
            flash_nnx.RMSNorm(D, implementation="cuda", rngs=nnx.Rngs(0))(x)
