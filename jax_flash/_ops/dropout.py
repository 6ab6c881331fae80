"""Counter-based dropout in XLA: the bits of csrc/common/philox.h, element by element.

Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11).
Each element of an attention matrix owns one 16-bit draw, addressed by its global (batch, head,
row, column), so that the mask depends on no tile size, layout, device or shard.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

_ROUNDS = 7
_M0, _M1 = np.uint32(0xD2511F53), np.uint32(0xCD9E8D57)
_W0, _W1 = np.uint32(0x9E3779B9), np.uint32(0xBB67AE85)
DRAWS = 1 << 16  # a draw is uniform on [0, DRAWS)


def threshold(rate: float) -> int:
    """The number of draws, of 65536, that drop: `rate` to the nearest 1/65536."""
    return min(round(rate * DRAWS), DRAWS - 1)


def keep_scale(threshold: int) -> float:
    """1 / (probability of being kept), for the rate that `threshold` really has."""
    return DRAWS / (DRAWS - threshold)


def key_words(key: jax.Array) -> jax.Array:
    """Two uint32 words of a JAX key: its own for Threefry, two draws for other generators."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    data = jax.random.key_data(key)
    return data if data.shape == (2,) else jax.random.bits(key, (2,), jnp.uint32)


def _multiply(a: np.uint32, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(high, low) words of a 32 x 32 bit product, from 16-bit halves: XLA has no wide multiply."""
    a_low, a_high = a & np.uint32(0xFFFF), a >> np.uint32(16)
    b_low, b_high = b & np.uint32(0xFFFF), b >> np.uint32(16)
    low, middle = a_low * b_low, a_high * b_low
    cross = (low >> np.uint32(16)) + (middle & np.uint32(0xFFFF)) + a_low * b_high
    high = a_high * b_high + (middle >> np.uint32(16)) + (cross >> np.uint32(16))
    return high, a * b


def philox(counter, key):
    """Four words for each counter (x, y, z, w) under `key` = (k0, k1); uint32, broadcastable."""
    x, y, z, w = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_M0, x)
        high1, low1 = _multiply(_M1, z)
        x, y, z, w = high1 ^ y ^ k0, low1, high0 ^ w ^ k1, low0
        k0, k1 = k0 + _W0, k1 + _W1
    return x, y, z, w


def draws(key, batch, head, row, col) -> jax.Array:
    """The 16-bit draw of each element (batch, head, row, col); uint32, broadcastable."""
    x, y, z, w = philox(
        ((col // 16) * 4 + (col % 8) // 2, (row // 16) * 8 + row % 8, head, batch), key
    )
    lower, right = (row & 8) != 0, (col & 8) != 0
    word = jnp.where(lower, jnp.where(right, w, z), jnp.where(right, y, x))
    return jnp.where((col & 1) != 0, word >> 16, word & 0xFFFF)


def draws_block(key, batch, head, row0, rows: int, cols: int) -> jax.Array:
    """`draws` for the block of rows row0 .. row0 + rows and columns 0 .. cols, an eighth of the
    work.

    Args:
      key: two uint32 arrays [...]; batch: uint32 [...]; head: uint32 [...]: the same leading axes.
      row0: uint32 scalar, a multiple of 16, as is `rows`.

    Returns:
      uint32 [..., rows, cols].
    """
    row_blocks, col_blocks = rows // 16, -(-cols // 16)
    y = (row0 // 16 + jnp.arange(row_blocks, dtype=jnp.uint32)) * 8
    y = (y[:, None] + jnp.arange(8, dtype=jnp.uint32))[:, :, None]  # [R, 8, 1]
    x = jnp.arange(col_blocks * 4, dtype=jnp.uint32)  # [C * 4]
    head, batch, *key = (a[..., None, None, None] for a in (head, batch, *key))
    words = philox((x, y, head, batch), key)
    words = jnp.stack(jnp.broadcast_arrays(*words), -1)  # [..., R, 8, C * 4, 4]
    halves = jnp.stack([words & 0xFFFF, words >> 16], -1)
    lead = halves.shape[:-5]
    halves = halves.reshape(
        *lead, row_blocks, 8, col_blocks, 4, 2, 2, 2
    )  # R r C q lower right half
    n = len(lead)
    order = (0, 4, 1, 2, 5, 3, 6)  # R lower r | C right q half
    halves = halves.transpose(*range(n), *(n + axis for axis in order))
    return halves.reshape(*lead, rows, col_blocks * 16)[..., :cols]


def draws_rows(key, batch, head, rows, cols: int) -> jax.Array:
    """`draws` for whole rows in any order, a quarter of the work; for columns 0 .. cols.

    Args:
      key: two uint32 arrays, batch, head, rows: uint32; all broadcast to [...].

    Returns:
      uint32 [..., cols].
    """
    col_blocks = -(-cols // 16)
    key, rows = [jnp.asarray(k)[..., None] for k in key], rows[..., None]
    batch, head = (jnp.asarray(a, jnp.uint32)[..., None] for a in (batch, head))
    x = jnp.arange(col_blocks * 4, dtype=jnp.uint32)  # [C * 4]
    x, y, z, w = philox((x, (rows // 16) * 8 + rows % 8, head, batch), key)
    lower = (rows & 8) != 0
    words = jnp.stack([jnp.where(lower, z, x), jnp.where(lower, w, y)], -1)  # [..., C * 4, right]
    halves = jnp.stack([words & 0xFFFF, words >> 16], -1)
    lead = halves.shape[:-3]
    halves = halves.reshape(*lead, col_blocks, 4, 2, 2)  # C q right half
    return halves.swapaxes(-3, -2).reshape(*lead, col_blocks * 16)[..., :cols]
