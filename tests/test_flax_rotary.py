"""RotaryEmbedding, Linen and NNX: the operator's numbers, its places, its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
from flax import linen as nn

import jax_flash
from jax_flash import linen
from jax_flash import nnx as flash_nnx

B, T, N, K, H, R = 2, 7, 4, 2, 16, 12


@pytest.fixture(params=["linen", "nnx"])
def make(request):
    """The layer as a function; Linen's is bound, since it has no parameters."""

    def layer(**options):
        if request.param == "nnx":
            return flash_nnx.RotaryEmbedding(options.pop("dim"), **options)
        return linen.RotaryEmbedding(**options).bind({})

    return layer


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("options", [{}, {"interleaved": True}, {"scale_base": 512.0, "base": 5e5}])
def test_queries_keys_and_packed(make, options):
    layer = make(dim=R, **options)
    query, key = normal(0, B, T, N, H), normal(1, B, T, K, H)
    table = jax_flash.RotaryTable.make(T, R, **options)
    turned = layer(query, key)
    np.testing.assert_array_equal(turned[0], jax_flash.apply_rotary(query, table))
    np.testing.assert_array_equal(turned[1], jax_flash.apply_rotary(key, table, is_key=True))
    np.testing.assert_array_equal(layer(query), turned[0])
    qkv = normal(2, B, T, 3, N, H)
    want = jax_flash.apply_rotary_qkvpacked(qkv, table)
    np.testing.assert_array_equal(layer.packed(qkv), want)
    assert not np.array_equal(turned[0], query)


def test_places(make):
    query = normal(0, B, T, N, H)
    layer = make(dim=R, max_length=64)
    offsets = jnp.array([3, 0])
    positions = offsets[:, None] + jnp.arange(T)
    shifted = layer(query, offsets=offsets)
    np.testing.assert_array_equal(shifted, layer(query, positions=positions))
    assert not np.array_equal(shifted[0], layer(query)[0])
    np.testing.assert_array_equal(shifted[1], layer(query)[1])


def test_refusals(make):
    query = normal(0, B, T, N, H)
    with pytest.raises(ValueError, match="max_length: expected a number together with"):
        make(dim=R)(query, offsets=3)
    with pytest.raises(ValueError, match="dim: expected an even number"):
        make(dim=5)(query)
    with pytest.raises(NotImplementedError, match="implementation='cpu'"):
        make(dim=R, implementation="cpu")(query)


def test_no_parameters():
    layer = linen.RotaryEmbedding(dim=R)
    assert isinstance(layer, nn.Module)
    assert layer.init(jax.random.key(0), normal(0, B, T, N, H)) == {}
