"""Dropout: the very bits, whatever computes them, and the statistics one expects of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash
from jax_flash._ops import dropout
from jax_flash.reference import attention as reference
from tests import host
from tests.helpers import IMPLEMENTATIONS, KEY, Shape, check_attention, device, random


def test_philox_known_answers():
    """Counter and key of zeros, of ones and of digits of pi, 7 rounds (Random123's kat_vectors)."""
    ones = 0xFFFFFFFF
    vectors = [
        ((0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        ((ones,) * 4, (ones,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A),
        ),
    ]
    for counter, key, expected in vectors:
        ours = dropout.philox(
            tuple(jnp.asarray(c, jnp.uint32) for c in counter),
            tuple(jnp.asarray(k, jnp.uint32) for k in key),
        )
        assert tuple(int(word) for word in ours) == tuple(
            int(word) for word in reference.philox(counter, key)
        )
        assert tuple(int(word) for word in ours) == expected


def test_philox_in_parts(tmp_path):
    """What the kernels compute once a row or once a column of calls."""
    host.run("philox_test", tmp_path)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "dtype,rate",
    [("bfloat16", rate) for rate in (0.1, 0.5, 0.5001, 0.9)]
    + [("float16", rate) for rate in (0.1, 0.9)],
)
def test_gradients(dtype, head_dim, rate):
    """Each kernel, with thresholds below, at and above half of all draws."""
    causal = dict(is_causal=True, causal_offset="bottom_right") if rate < 0.5 else {}
    options = dict(dropout_rate=rate, **causal)
    check_attention("cuda", dtype, Shape(2, 200, 333, 6, 2, head_dim), options)


def mask_of(implementation, rate, key, shape, **options):
    """The kernel's own dropout mask, by attention on the unit vectors: V = identity, uniform P."""
    batch, seq_q, seq_k, heads = shape
    q = jnp.zeros((batch, seq_q, heads, 8))
    k = jnp.zeros((batch, seq_k, heads, 8))
    columns = []
    for first in range(0, seq_k, 256):
        size = -(-min(256, seq_k - first) // 8) * 8
        v = jnp.eye(seq_k, size, k=-first)
        v = jnp.broadcast_to(v[None, :, None], (batch, seq_k, heads, size))
        out = jax_flash.attention(
            q, k, v, dropout_rate=rate, dropout_key=key, implementation=implementation, **options
        )
        columns.append(out[..., : seq_k - first])
    return np.moveaxis(np.concatenate(columns, -1), 2, 1) != 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rate", [1e-4, 0.1, 0.5, 0.999])
def test_bits(implementation, rate):
    shape = (2, 75, 300, 3)
    with jax.default_device(device(implementation)):
        mask = mask_of(implementation, rate, jax.random.wrap_key_data(KEY), shape)
    batch, seq_q, seq_k, heads = shape
    expected = reference.dropout_keep(rate, np.asarray(KEY), batch, heads, seq_q, seq_k)
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_every_generator(implementation, name):
    """Keys of any JAX generator, old-style and new; another key gives another mask."""
    shape = (1, 64, 128, 2)
    with jax.default_device(device(implementation)):
        first = mask_of(implementation, 0.5, jax.random.key(0, impl=name), shape)
        again = mask_of(implementation, 0.5, jax.random.key(0, impl=name), shape)
        other = mask_of(implementation, 0.5, jax.random.key(1, impl=name), shape)
        old_style = mask_of(implementation, 0.5, jax.random.PRNGKey(0), shape)
    np.testing.assert_array_equal(first, again)
    assert 0.45 < (first == other).mean() < 0.55
    if name == "threefry2x32":
        np.testing.assert_array_equal(first, old_style)


def test_statistics():
    """Rate, and independence along each axis, within five standard deviations."""
    keep = reference.dropout_keep(0.3, np.asarray(KEY), 2, 3, 256, 512)
    n = keep.size
    assert abs(keep.mean() - 0.7) < 5 * np.sqrt(0.21 / n)
    centred = keep - keep.mean()
    for axis in range(4):
        neighbours = (centred * np.roll(centred, 1, axis)).mean() / 0.21
        assert abs(neighbours) < 5 / np.sqrt(n), f"axis {axis}"


@pytest.mark.parametrize("rate,threshold", [(0.0, 0), (1e-7, 0), (0.5, 32768), (0.9999999, 65535)])
def test_threshold(rate, threshold):
    assert dropout.threshold(rate) == threshold


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_mean_is_unbiased(implementation):
    """The mean over many keys is the output without dropout."""
    with jax.default_device(device(implementation)):
        q, k, v = map(jnp.asarray, random(0, "float32", *[(1, 16, 2, 8)] * 3))
        keys = jax.random.split(jax.random.key(7), 4000)

        def attend(key):
            return jax_flash.attention(
                q, k, v, dropout_rate=0.25, dropout_key=key, implementation=implementation
            )

        outs = jax.jit(jax.vmap(attend))(keys)
        plain = jax_flash.attention(q, k, v, implementation=implementation)
    error = np.abs(outs.mean(0) - plain)
    spread = np.asarray(outs.std(0)) / np.sqrt(4000)
    assert (error < 6 * spread).all()
