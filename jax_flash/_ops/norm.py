"""The two primitives of LayerNorm and RMSNorm over a residual stream: operands, shapes, sharding.

    norm_forward (x, x1, residual, weight, bias, weight1, bias1, layerscale, *options)
        -> z, z1, stream, mean, rsigma, mask, mask1
    norm_backward(x, stream, mean, rsigma, weight, weight1, layerscale, dz, dz1, dstream, *options)
        -> dx, dx1, dresidual, dweight, dbias, dweight1, dbias1, dlayerscale

    options = rowscale, x_subset, out_subset, dropout_state, row_ids

z is normalised before the stream is rounded to its type; mean and rsigma, for the backward, are
those of the rounded stream. Sums over rows (dweight and its like) are float32, or of the weights'
type where no sum over devices follows. An operand of shape (0,) is off, and so is a result that the
call has no use for: stream where it is x itself, dresidual and dx1 where they equal dx.

The names R0, R1, ... are the axes of rows, along which devices share a call; sums over rows
(dweight and its like) are then sums over the devices. The axis of features is always whole.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash._ops import _register, norm_xla
from jax_flash._ops._op import Implementation, Op, ffi_call
from jax_flash._ops._partition import BATCH, Signature, is_off


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """What is static in a call.

    Attributes:
      epsilon: added to the variance (mean square), inside the root.
      is_rms: RMSNorm, without mean.
      row_axes: number of axes of rows.
      stream_dtype: of the residual stream, "float32" or x's.
      write_stream: the forward returns the stream.
      return_mask: the forward returns the dropout mask.
      has_residual, has_x1, has_bias, has_bias1: which gradients the backward gives.
      x_rows, out_rows: rows of a compact x and of a compact z, where subsets are given.
      dropout_threshold: 16-bit draws below it drop; 0: no dropout.
      sums_are_last: nothing is added to the backward's sums over rows: they get the weights' type.
      implementation: None (by platform), "cuda" or "xla".
    """

    epsilon: float
    is_rms: bool
    row_axes: int
    stream_dtype: str
    write_stream: bool = True
    return_mask: bool = False
    has_residual: bool = False
    has_x1: bool = False
    has_bias: bool = False
    has_bias1: bool = False
    x_rows: int = 0
    out_rows: int = 0
    dropout_threshold: int = 0
    sums_are_last: bool = False
    implementation: str | None = None

    def adds_unchanged(self, layerscale, rowscale, x_subset) -> bool:
        """x joins the stream as it is: the gradient of both is the same array."""
        return self.dropout_threshold == 0 and all(map(is_off, (layerscale, rowscale, x_subset)))


# Axis names --------------------------------------------------------------------------------------


def _axes(config):
    """Names of (rows, x, residual and stream, z, vectors of the width, options)."""
    rows = (BATCH, *(f"R{i}" for i in range(config.row_axes)))
    options = (rows, rows, rows, (BATCH, "four"), rows)
    return rows, (BATCH, "D"), options


def _signature_of(names, config, operands, results) -> Signature:
    operand_axes = [() if is_off(x) else a for x, a in zip(operands, names[0], strict=True)]
    result_axes = [() if is_off(x) else a for x, a in zip(results, names[1], strict=True)]
    rows = _axes(config)[0]
    sizes = {
        name: n
        for x, axes in zip(operands, operand_axes, strict=True)
        for name, n in zip(reversed(axes), reversed(x.shape))
        if name in rows[1:]
    }
    return Signature(tuple(operand_axes), tuple(result_axes), sizes, {})


def _forward_names(config, operands):
    rows, vector, options = _axes(config)
    x_subset, out_subset = operands[-4:-2]
    full = (*rows, "D")
    x = full if is_off(x_subset) else (BATCH, "M", "D")
    z = full if is_off(out_subset) else (BATCH, "Z", "D")
    return (
        (x, x, full, *(vector,) * 5, *options),
        (z, z, full, rows, rows, full, full),
    )


def _backward_names(config, operands):
    rows, vector, options = _axes(config)
    x_subset, out_subset = operands[-4:-2]
    full = (*rows, "D")
    x = full if is_off(x_subset) else (BATCH, "M", "D")
    z = full if is_off(out_subset) else (BATCH, "Z", "D")
    return (
        (x, full, rows, rows, *(vector,) * 3, z, z, full, *options),
        (x, x, full, *(vector,) * 5),
    )


def _forward_signature(config, *operands) -> Signature:
    results = _forward_results(config, *operands)
    return _signature_of(_forward_names(config, operands), config, operands, results)


def _backward_signature(config, *operands) -> Signature:
    results = _backward_results(config, *operands)
    return _signature_of(_backward_names(config, operands), config, operands, results)


# Shapes ------------------------------------------------------------------------------------------


def _lead_and_rows(names, operands):
    """(batch axes of the call, axes of rows)."""
    leads, rows = [], ()
    for x, axes in zip(operands, names, strict=True):
        if is_off(x):
            continue
        n = len(x.shape) - len(axes) + 1
        leads.append(x.shape[:n])
        named = tuple(size for size, name in zip(x.shape[n:], axes[1:]) if name.startswith("R"))
        rows = named or rows
    return jnp.broadcast_shapes(*leads), rows


_OFF = jax.ShapeDtypeStruct((0,), jnp.float32)


def _forward_results(config, *operands):
    x, x1, _, weight, _, weight1, _, _, _, _, out_subset, _, _ = operands
    lead, rows = _lead_and_rows(_forward_names(config, operands)[0], operands)
    width, wide = weight.shape[-1], jnp.promote_types(x.dtype, jnp.float32)

    def array(on, shape, dtype):
        return jax.ShapeDtypeStruct((*lead, *shape), dtype) if on else _OFF

    z = (*rows, width) if is_off(out_subset) else (config.out_rows, width)
    masked = config.return_mask
    return (
        array(True, z, x.dtype),
        array(not is_off(weight1), z, x.dtype),
        array(config.write_stream, (*rows, width), jnp.dtype(config.stream_dtype)),
        array(not config.is_rms, rows, wide),
        array(True, rows, wide),
        array(masked, (*rows, width), jnp.bool_),
        array(masked and not is_off(x1), (*rows, width), jnp.bool_),
    )


def _backward_results(config, *operands):
    _, stream, _, rsigma, weight, weight1, layerscale, dz, *_ = operands
    rowscale, x_subset = operands[-5:-3]
    lead, rows = _lead_and_rows(_backward_names(config, operands)[0], operands)
    width, sums = weight.shape[-1], weight.dtype if config.sums_are_last else rsigma.dtype

    def array(on, shape, dtype):
        return jax.ShapeDtypeStruct((*lead, *shape), dtype) if on else _OFF

    same = config.adds_unchanged(layerscale, rowscale, x_subset)
    x = (*rows, width) if is_off(x_subset) else (config.x_rows, width)
    return (
        array(True, x, dz.dtype),
        array(config.has_x1 and config.dropout_threshold != 0, x, dz.dtype),
        array(
            config.has_residual and not (same and stream.dtype == dz.dtype),
            (*rows, width),
            stream.dtype,
        ),
        array(True, (width,), sums),
        array(config.has_bias, (width,), sums),
        array(not is_off(weight1), (width,), sums),
        array(config.has_bias1, (width,), sums),
        array(not is_off(layerscale), (width,), sums),
    )


def _xla(function, results):
    """The formulas broadcast; the primitive promises full shapes and types."""

    def run(config, *operands):
        promised = results(config, *operands)
        return tuple(
            jnp.zeros(p.shape, p.dtype)
            if is_off(p)
            else jnp.broadcast_to(x, p.shape).astype(p.dtype)
            for x, p in zip(function(config, *operands), promised, strict=True)
        )

    return Implementation("xla", run)


# CUDA --------------------------------------------------------------------------------------------
#
# The kernels see one axis of entries, which is all batch axes, and one of rows: [entries, rows, D],
# [entries, rows], [entries, D]; entries is 1 in what all of them share.

_MAX_WIDTH, _MAX_ROWS = 16384, 1 << 30
_SHARED_BYTES = 215 << 10  # what a CTA may have, where there is most of it
_CTAS = 192  # each writes a row of partial sums; no GPU has more multiprocessors yet


def _flat(config, x, axes, is_vector, lead):
    """The shape of an array of rows, of compact rows or of a vector, with batch axes `lead`."""
    tail = x.shape[len(lead) :]
    if not is_vector and not {"M", "Z"} & set(axes):
        tail = (math.prod(tail[: config.row_axes]), *tail[config.row_axes :])
    return math.prod(lead), *tail


def _call(target, names, results, vectors, scratch, config, *operands):
    """One custom call; `vectors`: which operands and which results have no rows."""
    operand_axes, result_axes = names(config, operands)
    promised = results(config, *operands)
    lead, rows = _lead_and_rows(operand_axes, operands)
    if 0 in (*lead, *rows):
        return [jnp.zeros(p.shape, p.dtype) for p in promised]

    given = []
    for i, (x, axes) in enumerate(zip(operands, operand_axes, strict=True)):
        if not is_off(x):
            own = x.shape[: len(lead)]
            if own != lead and math.prod(own) != 1:  # nested vmaps over ever different operands
                x, own = jnp.broadcast_to(x, (*lead, *x.shape[len(lead) :])), lead
            x = x.reshape(_flat(config, x, axes, i in vectors[0], own))
        given.append(x)
    shapes = [
        p.shape if is_off(p) else _flat(config, p, axes, i in vectors[1], lead)
        for i, (p, axes) in enumerate(zip(promised, result_axes, strict=True))
    ]
    returned = ffi_call(
        target,
        (
            *(jax.ShapeDtypeStruct(s, p.dtype) for s, p in zip(shapes, promised, strict=True)),
            *scratch(config, math.prod(lead), math.prod(rows), operands, promised),
        ),
        *given,
        epsilon=np.float32(config.epsilon),
        is_rms=config.is_rms,
        x_rows=np.int64(config.x_rows),
        out_rows=np.int64(config.out_rows),
        dropout_threshold=np.int64(config.dropout_threshold),
    )
    return [x.reshape(p.shape) for x, p in zip(returned, promised, strict=False)]


def _forward_call(*operands):
    # In a scan that stacks the stream for the backward XLA would run the call twice
    # (openxla/xla#45799).
    return jax.lax.optimization_barrier(_call(*operands))


def _claims(entries, compact_rows, subset):
    """Who names each row of a compact result."""
    shape = (0,) if is_off(subset) else (entries, 2, compact_rows)
    return jax.ShapeDtypeStruct(shape, jnp.uint32)


def _forward_scratch(config, entries, rows, operands, results):
    return [_claims(entries, config.out_rows, operands[-3])]


def _backward_scratch(config, entries, rows, operands, results):
    sums = [x for x in results[3:] if not is_off(x)]
    shape = (len(sums), entries, min(rows, -(-_CTAS // entries)), sums[0].shape[-1])
    return [
        _claims(entries, config.x_rows, operands[-4]),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    ]


def _refuse(copied, sums):
    """`copied`, `sums`: (config, *operands) -> arrays of rows that the kernel copies to shared
    memory, and how many sums over rows it keeps there."""

    def refuse(config, *operands) -> str | None:
        if (reason := _register.missing("cuda")) is not None:
            return reason
        arrays = [x for x in copied(*operands) if not is_off(x)]
        for x in arrays:
            if x.dtype not in (jnp.float32, jnp.float16, jnp.bfloat16):
                return f"{x.dtype} (kernels: float32, float16, bfloat16)"
        if not all(isinstance(n, int) for x in arrays for n in x.shape):
            return "sizes that are symbols of jax.export"
        width = arrays[0].shape[-1]
        if width > _MAX_WIDTH:
            return f"{width} features (kernels: up to {_MAX_WIDTH})"
        if max(math.prod(x.shape[:-1]) for x in arrays) > _MAX_ROWS:
            return f"more than {_MAX_ROWS} rows"
        multiple = 2048 if width > _MAX_WIDTH // 2 else 512
        items = sum(x.dtype.itemsize for x in arrays) + 4 * sums(*operands)
        if items * (-(-width // multiple) * multiple) > _SHARED_BYTES:
            return f"{width} features in {len(arrays)} arrays exceed a CTA's shared memory"
        return None

    return refuse


def _rows_are_unaligned(config, x, x1, residual, weight, *rest) -> bool:
    """Then the forward reads element by element, and XLA's is taken where nobody asks for ours."""
    return weight.shape[-1] % 8 != 0


_FORWARD = Implementation(
    "cuda",
    functools.partial(
        _forward_call,
        "jax_flash.norm_forward",
        _forward_names,
        _forward_results,
        ((3, 4, 5, 6, 7, 11), ()),
        _forward_scratch,
    ),
    _refuse(lambda *operands: operands[:3], lambda *operands: 0),
    _rows_are_unaligned,
)
_BACKWARD = Implementation(
    "cuda",
    functools.partial(
        _call,
        "jax_flash.norm_backward",
        _backward_names,
        _backward_results,
        ((4, 5, 6, 13), (3, 4, 5, 6, 7)),
        _backward_scratch,
    ),
    _refuse(
        lambda x, stream, *rest: (stream, *rest[5:8], x),
        lambda *operands: 2 * (not is_off(operands[5])) + (not is_off(operands[6])),
    ),
)

norm_forward = Op(
    "norm_forward",
    signature=_forward_signature,
    results=_forward_results,
    native={"cuda": _FORWARD},
    xla=_xla(norm_xla.forward, _forward_results),
)
norm_backward = Op(
    "norm_backward",
    signature=_backward_signature,
    results=_backward_results,
    native={"cuda": _BACKWARD},
    xla=_xla(norm_xla.backward, _backward_results),
)
