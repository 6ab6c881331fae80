"""Rotary position embedding: pairs of a head's elements, turned by an angle of the row's position.

    out1 = x1 * cos - x2 * sin,  out2 = x1 * sin + x2 * cos

Su et al., "RoFormer", arXiv:2104.09864; xPos: Sun et al., "A length-extrapolatable transformer",
arXiv:2212.10554. The gradient is the rotation back, by the conjugate: nothing but positions and
tables is kept for it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash import _attention as shared
from jax_flash._ops import rotary as ops
from jax_flash._ops._op import vary_together
from jax_flash._ops.attention_xla import _varlen_positions
from jax_flash._ops.rotary import RotaryConfig
from jax_flash.attention import Implementation, _documented
from jax_flash.varlen import _cu_seqlens

_NOWHERE = -1  # the position of rows that stay as they are
_ROTARY_OPTIONS = """positions: int [T] or [*B, T] (or 1 on any batch axis): the position of each
        row. Default: 0, 1, ..., T - 1.
      offsets: an int, or int [*B]: the position of row 0, instead of `positions`; the number of
        tokens that a cache holds already, say.
      cu_seqlens: int32 [sequences + 1] or [*B, sequences + 1]: T is the total of concatenated
        sequences, as in `varlen_attention`, and positions count within each; `offsets` is then an
        int, int [sequences] or [*B, sequences]. Wrong values are clamped as there.
      conjugate: turn back: the inverse, where the table has no xPos scale, and always the
        transpose.
      implementation: None picks by platform when the program is lowered: "cuda", kernels for NVIDIA
        GPUs, or else "xla", compiled from jnp. Naming one that is not there raises.

    Rows at negative positions, and rows that no sequence owns, are copied. Where a position is
    known to be beyond the table, the call raises; where only the device knows, what would be turned
    is NaN. Devices may share batch axes, rows and heads without a collective; a head dim that is
    cut over devices is gathered."""


# Tables -------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RotaryTable:
    """Cosines and sines of every position: a pytree of arrays, to be passed to jitted functions.

        table = jax.device_put(RotaryTable.make(4096, 128))  # once

        @jax.jit
        def layer(query, key, table):
            return apply_rotary(query, table), apply_rotary(key, table, is_key=True)

    Made by `make`, or of any arrays of these shapes (other frequencies). The tables are constants:
    no gradient flows to them.

    Attributes:
      cos, sin: [length, R / 2], of any floating type; the first R elements of a head are turned.
      cos_k, sin_k: the same for keys, where those differ (xPos); None: keys turn as queries do.
      interleaved: pairs are (2 j, 2 j + 1) (GPT-J), not (j, j + R / 2) (GPT-NeoX). Static.
    """

    cos: Any
    sin: Any
    cos_k: Any = None
    sin_k: Any = None
    interleaved: bool = dataclasses.field(default=False, metadata=dict(static=True))

    @classmethod
    def make(
        cls,
        length: int,
        dim: int,
        *,
        base: float = 10000.0,
        scale_base: float | None = None,
        interleaved: bool = False,
        dtype: Any = jnp.float32,
    ) -> RotaryTable:
        """The table of position p and pair j: angle p * base^(-2 j / dim).

        The same arguments give the same object: tables are made once, with numpy, in float64, and
        then rounded to `dtype`.

        Args:
          length: number of positions.
          dim: R, how many elements of a head are turned: even.
          base: of the frequencies.
          scale_base: xPos: queries are scaled by z^((p - length // 2) / scale_base), keys by the
            inverse, with z = (2 j + 0.4 dim) / (1.4 dim); 512 is usual. None: no scale.
          interleaved: pairs are (2 j, 2 j + 1), not (j, j + R / 2).
          dtype: of the arrays. Products are taken in float32 (float64 for float64 operands)
            whatever it is, so that a float32 table serves bfloat16 and float16 best.

        Raises:
          TypeError, ValueError: an argument is of the wrong type, or not possible.
        """
        for name, size in (("length", length), ("dim", dim)):
            if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
                shared.refuse(name, "a positive int", repr(size))
        if dim % 2:
            shared.refuse("dim", "an even number", dim)
        for name, number in (("base", base), ("scale_base", scale_base)):
            if number is None and name == "scale_base":
                continue
            if not isinstance(number, (int, float, np.number)) or not 0 < number < np.inf:
                shared.refuse(name, "a positive number", repr(number))
        interleaved = shared.static_flag("interleaved", interleaved)
        dtype = jnp.dtype(dtype)
        if not jnp.issubdtype(dtype, jnp.floating):
            shared.refuse("dtype", "a floating-point type", dtype, TypeError)
        scale_base = None if scale_base is None else float(scale_base)
        return _make_table(int(length), int(dim), float(base), scale_base, interleaved, dtype)


@functools.lru_cache(maxsize=16)
def _make_table(length, dim, base, scale_base, interleaved, dtype) -> RotaryTable:
    pairs, position = np.arange(0, dim, 2), np.arange(length)
    angle = np.outer(position, base ** (-pairs / dim))
    cos, sin = np.cos(angle), np.sin(angle)

    def rounded(array):
        array = array.astype(dtype)
        array.flags.writeable = False
        return array

    if scale_base is None:
        return RotaryTable(rounded(cos), rounded(sin), interleaved=interleaved)
    power = (position - length // 2) / scale_base
    scale = ((pairs + 0.4 * dim) / (1.4 * dim)) ** power[:, None]
    queries, keys = (cos * scale, sin * scale), (cos / scale, sin / scale)
    return RotaryTable(*map(rounded, (*queries, *keys)), interleaved=interleaved)


# The custom VJP -----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate(config: RotaryConfig, x, tables, positions):
    return ops.rotary(config, x, *tables, positions)[0]


def _rotate_forward(config, x, tables, positions):
    return _rotate(config, x, tables, positions), (tables, positions)


def _rotate_backward(config, residuals, dout):
    back = dataclasses.replace(config, conjugate=not config.conjugate)
    return _rotate(back, dout, *residuals), None, None


_rotate.defvjp(_rotate_forward, _rotate_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate_pair(config: RotaryConfig, pair, tables, positions):
    return ops.rotary_pair(config, *pair, *tables, positions)


def _rotate_pair_forward(config, pair, tables, positions):
    return _rotate_pair(config, pair, tables, positions), (tables, positions)


def _rotate_pair_backward(config, residuals, cotangents):
    back = dataclasses.replace(config, conjugate=not config.conjugate)
    return _rotate_pair(back, tuple(cotangents), *residuals), None, None


_rotate_pair.defvjp(_rotate_pair_forward, _rotate_pair_backward)


# Options -> operands ------------------------------------------------------------------------------


def _check_table(table: Any, head_dim: int) -> None:
    if not isinstance(table, RotaryTable):
        shared.refuse("table", "a RotaryTable", type(table).__name__, TypeError)
    if (table.cos_k is None) != (table.sin_k is None):
        shared.refuse("table", "both of cos_k and sin_k, or neither", "one of them")
    arrays = {"cos": table.cos, "sin": table.sin}
    if table.cos_k is not None:
        arrays |= {"cos_k": table.cos_k, "sin_k": table.sin_k}
    for name, array in arrays.items():
        dtype, shape = jnp.result_type(array), jnp.shape(array)
        if not jnp.issubdtype(dtype, jnp.floating):
            shared.refuse(f"table.{name}", "a floating-point array", dtype, TypeError)
        if shape != jnp.shape(table.cos) or len(shape) != 2 or shape[0] == 0:
            expected = "the same shape [length, R / 2] as table.cos, length > 0"
            shared.refuse(f"table.{name}", expected, f"shape {shape}")
    if 2 * jnp.shape(table.cos)[1] > head_dim:
        expected = f"tables of at most {head_dim // 2} pairs, for a head dim of {head_dim}"
        shared.refuse("table.cos", expected, f"shape {jnp.shape(table.cos)}")


def _integers(name: str, value: Any) -> jax.Array:
    """int32; what does not fit is clamped, far beyond every table."""
    array = jnp.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        shared.refuse(name, "integers", array.dtype, TypeError)
    info = jnp.iinfo(array.dtype)
    return jnp.clip(array, max(info.min, -(1 << 30)), min(info.max, 1 << 30)).astype(jnp.int32)


def _check_range(name: str, first, last, length: int) -> None:
    """Of positions that Python knows."""
    if np.size(last) and (np.min(first) < 0 or np.max(last) >= length):
        got = f"positions {np.min(first)} to {np.max(last)}"
        shared.refuse(name, f"positions in [0, {length}), which the table has", got)


def _given_positions(positions: Any, batch, rows: int, length: int) -> jax.Array:
    known = shared.concrete(positions)
    array = _integers("positions", positions)
    fits = array.ndim in (1, len(batch) + 1) and array.shape[-1] == rows
    lead = array.shape[:-1] or (1,) * len(batch)
    if not fits or any(n not in (1, b) for n, b in zip(lead, batch, strict=True)):
        expected = f"shape {(rows,)} or {(*batch, rows)}"
        shared.refuse("positions", expected, f"shape {array.shape}")
    if known is not None:
        _check_range("positions", 0, known, length)  # negative ones are allowed
    return array.reshape(*lead, rows)


def _counted_positions(offsets: Any, batch, rows: int, length: int) -> jax.Array:
    known = shared.concrete(offsets)
    array = _integers("offsets", offsets)
    if array.shape not in ((), batch):
        shared.refuse("offsets", f"an int or shape {batch}", f"shape {array.shape}")
    if known is not None and isinstance(rows, int) and rows:
        _check_range("offsets", known, known.astype(np.int64) + rows - 1, length)
    if known is not None and not known.any() and jax.device_count() == 1:
        return jnp.zeros((0,), jnp.int32)  # a kernel counts for itself
    array = array[..., None] if array.ndim else array.reshape((1,) * (len(batch) + 1))
    return array + jnp.arange(rows, dtype=jnp.int32)


def _varlen_rows(cu_seqlens: Any, offsets: Any, batch, rows: int, length: int) -> jax.Array:
    known_cu, known = shared.concrete(cu_seqlens), shared.concrete(offsets)
    cu = _cu_seqlens("cu_seqlens", cu_seqlens, batch, rows)  # [*B or 1, sequences + 1]
    sequences = cu.shape[-1] - 1
    array = _integers("offsets", offsets)
    if array.shape not in ((), (sequences,), (*batch, sequences)):
        expected = f"an int, shape {(sequences,)} or {(*batch, sequences)}"
        shared.refuse("offsets", expected, f"shape {array.shape}")
    if known_cu is not None and known is not None:
        lengths = np.diff(known_cu)
        last = known.astype(np.int64) + lengths - 1
        last = last[np.broadcast_to(lengths > 0, last.shape)]
        _check_range("offsets", known, last, length)
    where = _varlen_positions(rows, cu, _NOWHERE)
    lead = jnp.broadcast_shapes(cu.shape[:-1], array.shape[:-1])
    array = jnp.broadcast_to(array, (*lead, sequences))
    at = jnp.broadcast_to(jnp.clip(where.sequence, 0, sequences - 1), (*lead, rows))
    positions = where.index + jnp.take_along_axis(array, at, -1)
    return jnp.where(where.sequence == _NOWHERE, _NOWHERE, positions)


def _positions(positions, offsets, cu_seqlens, batch, rows, length) -> jax.Array:
    """int32 [*B or 1, T], or off: see _ops/rotary.py."""
    if positions is not None:
        if cu_seqlens is not None or offsets is not None:
            other = "offsets" if cu_seqlens is None else "cu_seqlens"
            shared.refuse(other, "None, as positions says where each row stands", "both")
        return _given_positions(positions, batch, rows, length)
    offsets = 0 if offsets is None else offsets
    if cu_seqlens is not None:
        return _varlen_rows(cu_seqlens, offsets, batch, rows, length)
    return _counted_positions(offsets, batch, rows, length)


def _places(table, x_shape, both_kinds, is_key, positions, offsets, cu_seqlens, *, packed=False):
    """(cos, sin, cos_k, sin_k) and the positions, with the batch axes of x."""
    *batch, rows = x_shape[: -3 if packed else -2]
    _check_table(table, x_shape[-1])
    shared.check_sizes(rows, rows)
    length = jnp.shape(table.cos)[0]
    at = _positions(positions, offsets, cu_seqlens, tuple(batch), rows, length)
    nothing = jnp.zeros((0,), jnp.asarray(table.cos).dtype)
    by, by_key = (table.cos, table.sin), (table.cos_k, table.sin_k)
    if is_key and table.cos_k is not None:
        by = by_key
    if not both_kinds or table.cos_k is None:
        by_key = (nothing, nothing)
    tables = tuple(jnp.asarray(t) for t in (*by, *by_key))
    return [t.reshape((1,) * len(batch) + t.shape) if t.ndim == 2 else t for t in tables], at


def _run(config, x, table, is_key, positions, offsets, cu_seqlens):
    places = (positions, offsets, cu_seqlens)
    tables, at = _places(table, x.shape, config.packed, is_key, *places, packed=config.packed)
    if 0 in x.shape:
        return x
    x, at, *tables = vary_together(x, at, *tables)
    return _rotate(config, x, tuple(tables), at)


def rotate_pair(query, key, table: RotaryTable, *, implementation: Implementation = None, **places):
    """`apply_rotary` of queries and keys, in one launch where both have the same rows.

    Args:
      places: positions, offsets, cu_seqlens.
    """
    alike = query.shape[:-2] + query.shape[-1:] == key.shape[:-2] + key.shape[-1:]
    alike = alike and query.dtype == key.dtype and 0 not in query.shape + key.shape
    if not alike or jax.device_count() > 1 or not isinstance(table, RotaryTable):
        options = dict(places, implementation=implementation)
        return apply_rotary(query, table, **options), apply_rotary(
            key, table, is_key=True, **options
        )
    shared.check_implementation(implementation, "rotary", ("cuda",))
    query, key = shared.as_tensor("query", query, 3), shared.as_tensor("key", key, 3)
    config = RotaryConfig(table.interleaved, False, False, implementation)
    options = dict(positions=None, offsets=None, cu_seqlens=None) | places
    tables, at = _places(table, query.shape, True, False, **options)
    query, key, at, *tables = vary_together(query, key, at, *tables)
    return _rotate_pair(config, (query, key), tuple(tables), at)


# The public calls ---------------------------------------------------------------------------------


@_documented
def apply_rotary(
    x: jax.Array,
    table: RotaryTable,
    *,
    is_key: bool = False,
    positions: jax.Array | None = None,
    offsets: int | jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    conjugate: bool = False,
    implementation: Implementation = None,
) -> jax.Array:
    """Turns the first R elements of each head of queries or keys; the others are copied.

    Products are taken in float32 (float64 for float64) and rounded once.

    Args:
      x: [*B, T, N, H], R <= H; float32, bfloat16 or float16.
      table: see `RotaryTable`.
      is_key: x are keys: matters for tables that differ for them (xPos).
      {rotary_options}

    Returns:
      [*B, T, N, H] of x's type.

    {raises}
    """
    shared.check_implementation(implementation, "rotary", ("cuda",))
    x = shared.as_tensor("x", x, 3)
    is_key = shared.static_flag("is_key", is_key)
    conjugate = shared.static_flag("conjugate", conjugate)
    interleaved = isinstance(table, RotaryTable) and table.interleaved
    config = RotaryConfig(interleaved, conjugate, False, implementation)
    return _run(config, x, table, is_key, positions, offsets, cu_seqlens)


@_documented
def apply_rotary_qkvpacked(
    qkv: jax.Array,
    table: RotaryTable,
    *,
    positions: jax.Array | None = None,
    offsets: int | jax.Array | None = None,
    cu_seqlens: jax.Array | None = None,
    conjugate: bool = False,
    implementation: Implementation = None,
) -> jax.Array:
    """`apply_rotary` of the queries and keys inside packed `qkv`; the values are copied.

    One array comes and one goes, also backward: the CUDA kernel writes over `qkv`, where the
    program does not need it again (XLA copies it first otherwise), and leaves the values alone.

    Args:
      qkv: [*B, T, 3, N, H]: queries, keys, values; R <= H.
      table: see `RotaryTable`; keys are turned by its cos_k and sin_k where it has them.
      {rotary_options}

    Returns:
      [*B, T, 3, N, H] of qkv's type.

    {raises}
    """
    shared.check_implementation(implementation, "rotary", ("cuda",))
    qkv = shared.as_tensor("qkv", qkv, 4)
    if qkv.shape[-3] != 3:
        shared.refuse("qkv", "[*B, T, 3, N, H]", f"shape {qkv.shape}")
    conjugate = shared.static_flag("conjugate", conjugate)
    interleaved = isinstance(table, RotaryTable) and table.interleaved
    config = RotaryConfig(interleaved, conjugate, True, implementation)
    return _run(config, qkv, table, False, positions, offsets, cu_seqlens)


for _function in (apply_rotary, apply_rotary_qkvpacked):
    _function.__doc__ = _function.__doc__.replace("{rotary_options}", _ROTARY_OPTIONS)
