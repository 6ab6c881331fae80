"""Block-sparse attention: the dense definition, with the blocks as one more mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_flash
from tests.helpers import IMPLEMENTATIONS, Shape, check_attention, device, random

SHAPE = Shape(2, 310, 530, 4, 2, 32)
BLOCKS = [(64, 64), (128, 128), (16, 256), (32, 16)]


def random_mask(lead, block_size, density=0.5, shape=SHAPE, seed=0):
    """Some rows of blocks stay empty, some are full, the rest is mixed."""
    rows, cols = block_size
    blocks = (-(-shape.seq_q // rows), -(-shape.seq_k // cols))
    mask = np.random.default_rng(seed).random((*lead, *blocks)) < density
    mask[..., 0, :] = False
    mask[..., blocks[0] // 2, :] = True
    return mask


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", BLOCKS)
@pytest.mark.parametrize("lead", [(1, 1), (2, 4)])
def test_blocks(implementation, dtype, block_size, lead):
    options = dict(block_mask=random_mask(lead, block_size), block_size=block_size)
    check_attention(implementation, dtype, SHAPE, options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block_size", [(128, 128), (16, 256)])
@pytest.mark.parametrize(
    "more",
    [
        dict(is_causal=True),
        dict(is_causal=True, causal_offset="bottom_right", dropout_rate=0.2),
        dict(
            query_seq_lengths=np.array([310, 17], np.int32),
            key_value_seq_lengths=np.array([129, 530], np.int32),
        ),
        dict(local_window_size=(100, 31)),
    ],
    ids=["causal", "dropout", "lengths", "window"],
)
def test_together_with(implementation, block_size, more):
    options = dict(more, block_mask=random_mask((1, 4), block_size), block_size=block_size)
    check_attention(implementation, "bfloat16", SHAPE, options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("value", [True, False])
def test_all_and_nothing(implementation, value):
    mask = np.full((1, 1, 3, 5), value)
    options = dict(block_mask=mask, block_size=(128, 128))
    check_attention(implementation, "float32", SHAPE, options)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_static_and_traced_masks_agree(implementation):
    q, k, v = random(1, "float32", SHAPE.query, SHAPE.key, SHAPE.value)
    mask = random_mask((1, 1), (64, 64))

    def attend(q, k, v, mask):
        return jax_flash.blocksparse_attention(
            q, k, v, mask, block_size=(64, 64), implementation=implementation
        )

    with jax.default_device(device(implementation)):
        q, k, v = map(jnp.asarray, (q, k, v))
        static = jax.jit(lambda q, k, v: attend(q, k, v, mask))(q, k, v)
        traced = jax.jit(attend)(q, k, v, jnp.asarray(mask))
        integer = jax.jit(attend)(q, k, v, jnp.asarray(mask, jnp.int32))
    np.testing.assert_array_equal(static, traced)
    np.testing.assert_array_equal(static, integer)
