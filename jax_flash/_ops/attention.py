"""The two primitives of attention: operands, shapes, sharding, and which implementation runs.

    attention_forward (query, key, value,                        *options) -> out, lse
    attention_backward(query, key, value, out, lse, dout, dlse,  *options) -> dq, dk, dv

    options = query_lengths, key_lengths, causal_offset, dropout_state, head_ids, block_mask

csrc/attention/check.h reads the same lists. Packed operands come as one array, in `query` (qkv)
or `key` (kv), and their gradients go out as one array in `dq` or `dk`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_flash._ops import _register, attention_xla
from jax_flash._ops._batch import BATCH_DIMS, batch_shape, canonical
from jax_flash._ops._op import Implementation, Op, ffi_call
from jax_flash._ops._partition import BATCH, Signature, is_off

SEPARATE, KEY_VALUE, QUERY_KEY_VALUE = range(3)  # Packing in check.h
OPTIONS = (
    "query_lengths",
    "key_lengths",
    "causal_offset",
    "dropout_state",
    "head_ids",
    "block_mask",
)
MAX_HEAD_DIM = 256


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """What is static in a call; the attributes of the custom calls.

    Attributes:
      scale: factor on the scores.
      window_left, window_right: how far a query sees to either side of its diagonal; -1: without
        limit.
      bottom_right: the diagonal ends in the last query and key, not begins in the first.
      varlen: lengths are cu_seqlens, rows of all sequences are concatenated.
      dropout_threshold: 16-bit draws below it drop; 0: no dropout.
      block_rows, block_cols: queries and keys a block of block_mask covers; 0: no block mask.
      packing: SEPARATE, KEY_VALUE or QUERY_KEY_VALUE.
      deterministic: the backward gives the same bits every time.
      implementation: None (by platform), "cuda", "cpu" or "xla".
    """

    scale: float
    window_left: int = -1
    window_right: int = -1
    bottom_right: bool = False
    varlen: bool = False
    dropout_threshold: int = 0
    block_rows: int = 0
    block_cols: int = 0
    packing: int = SEPARATE
    deterministic: bool = False
    implementation: str | None = None

    def attributes(self) -> dict[str, object]:
        integers = (
            "window_left",
            "window_right",
            "dropout_threshold",
            "block_rows",
            "block_cols",
            "packing",
        )
        return {
            "scale": np.float32(self.scale),
            "bottom_right": self.bottom_right,
            "varlen": self.varlen,
            **{name: np.int64(getattr(self, name)) for name in integers},
        }


# Axis names --------------------------------------------------------------------------------------


def _tensor_axes(packing: int) -> tuple[tuple[str, ...], ...]:
    if packing == QUERY_KEY_VALUE:
        return (BATCH, "T", "three", "N", "H"), (), ()
    if packing == KEY_VALUE:
        return (BATCH, "T", "N", "H"), (BATCH, "S", "two", "K", "H"), ()
    return (BATCH, "T", "N", "H"), (BATCH, "S", "K", "H"), (BATCH, "S", "K", "Hv")


def _option_axes(options) -> tuple[tuple[str, ...], ...]:
    mask_heads = "N" if not is_off(options[-1]) and options[-1].shape[-3] != 1 else "one"
    axes = (
        (BATCH, "lengths"),
        (BATCH, "lengths"),
        (BATCH, "one"),
        (BATCH, "four"),
        ("N",),
        (BATCH, mask_heads, "rows", "cols"),
    )
    return tuple(() if is_off(x) else a for x, a in zip(options, axes, strict=True))


def _heads(config, query, key) -> tuple[int, int]:
    kv_heads = query.shape[-2] if config.packing == QUERY_KEY_VALUE else key.shape[-2]
    return query.shape[-2], kv_heads


def _signature(extra, results):
    def of(config, *operands) -> Signature:
        query, key = operands[:2]
        packed = _tensor_axes(config.packing)
        middle = tuple(
            () if is_off(x) else axes for x, axes in zip(operands[3:], extra, strict=False)
        )
        return Signature(
            operands=packed + middle + _option_axes(operands[-len(OPTIONS) :]),
            results=packed if results is None else results,
            shardable={"N": _heads(config, query, key)[1]},
            aliases={"K": "N"},
        )

    return of


_OUT, _ROWS = (BATCH, "T", "N", "Hv"), (BATCH, "N", "T")
_forward_signature = _signature((), (_OUT, _ROWS))
_backward_signature = _signature(
    (_OUT, _ROWS, _OUT, _ROWS),
    None,  # out, lse, dout, dlse
)


# Shapes ------------------------------------------------------------------------------------------


def _forward_results(config, *operands):
    query, value = operands[0], operands[2]
    batch = batch_shape(_forward_signature(config, *operands), operands)
    seq_q = query.shape[-4] if config.packing == QUERY_KEY_VALUE else query.shape[-3]
    value_dim = value.shape[-1] if config.packing == SEPARATE else query.shape[-1]
    heads = query.shape[-2]
    return (
        jax.ShapeDtypeStruct((*batch, seq_q, heads, value_dim), query.dtype),
        jax.ShapeDtypeStruct((*batch, heads, seq_q), jnp.promote_types(query.dtype, jnp.float32)),
    )


def _backward_results(config, *operands):
    signature = _backward_signature(config, *operands)
    batch = batch_shape(signature, operands)
    return tuple(
        jax.ShapeDtypeStruct((*batch, *x.shape[len(x.shape) - len(axes) + 1 :]), x.dtype)
        if axes
        else jax.ShapeDtypeStruct((0,), x.dtype)
        for x, axes in zip(operands[:3], signature.results, strict=True)
    )


# Custom calls ------------------------------------------------------------------------------------


def _bytes(block_mask):
    return block_mask if is_off(block_mask) else block_mask.astype(jnp.uint8)


def _call(target, signature, results, workspace, config, *operands):
    operands = (*operands[:-1], _bytes(operands[-1]))
    operands, full = canonical(signature(config, *operands), operands)
    shapes = results(config, *operands)
    attributes = config.attributes()
    scratch = ()
    if workspace is not None:
        attributes["deterministic"] = config.deterministic
        scratch = (jax.ShapeDtypeStruct((workspace(config, *operands),), jnp.uint8),)
    returned = ffi_call(target, (*shapes, *scratch), *operands, **attributes)
    return tuple(
        x if is_off(x) else x.reshape(*full, *x.shape[BATCH_DIMS:]) for x in returned[: len(shapes)]
    )


def _no_workspace(config, *operands) -> int:
    return 0


def cuda_backward_workspace(config, *operands) -> int:
    """Bytes of scratch of the CUDA backward, from shapes alone.

    The rule is that of csrc/attention/cuda/backward_plan.h, for the largest tiles any kernel has;
    f32 keeps one delta a row. The handler refuses a buffer that is too small.
    """
    batch_dims = slice(None, BATCH_DIMS)
    query, key, value = operands[:3]
    batch = math.prod(_backward_results(config, *operands)[0].shape[batch_dims])
    heads, kv_heads = _heads(config, query, key)
    seq_q = query.shape[BATCH_DIMS]
    seq_k = seq_q if config.packing == QUERY_KEY_VALUE else key.shape[BATCH_DIMS]
    if query.dtype == jnp.float32:
        return 4 * batch * heads * seq_q

    def slots(total, tile):  # tiles of all sequences
        if not config.varlen:
            return -(-total // tile)
        num_sequences = operands[-len(OPTIONS)].shape[-1] - 1
        return total // tile + num_sequences + 2

    dims = [query.shape[-1]] + ([value.shape[-1]] if config.packing == SEPARATE else [])
    head_dim = next(dim for dim in (64, 128, 256) if max(dims) <= dim)
    ctas, most_dq_bytes, most_splits = 264, 512 << 20, 16
    columns, tiles = batch * kv_heads, -(-seq_k // 128)
    rows = batch * heads * max(tile * slots(seq_q, tile) for tile in (64, 128))
    dq_bytes = 4 * head_dim * rows
    dkv_bytes = 2 * 4 * head_dim * columns * 128 * slots(seq_k, 128)
    dq_buffers = key_splits = 1
    if config.deterministic:
        dq_buffers = max(1, min(tiles, -(-ctas // columns), most_dq_bytes // dq_bytes))
    else:
        steps = heads // kv_heads * -(-seq_q // 64)
        key_splits = max(1, min(ctas // (columns * tiles), -(-steps // 4), most_splits))
    sums = dq_buffers * dq_bytes + (key_splits * dkv_bytes if key_splits > 1 else 0)
    places = 128 * (columns * key_splits * slots(seq_k, 64) + 1)
    counters = -(-(4 + 2 * batch * heads * slots(seq_q, 64)) // 4) * 16
    return 18 * rows + sums + places + counters


def _refuse(platform: str):
    dtypes = (jnp.float32, jnp.float16, jnp.bfloat16)

    def refuse(config, *operands) -> str | None:
        query, value = operands[0], operands[2]
        if (reason := _register.missing(platform)) is not None:
            return reason
        if query.dtype not in dtypes:
            return f"{query.dtype} (kernels: float32, float16, bfloat16)"
        dims = [query.shape[-1]] + ([value.shape[-1]] if config.packing == SEPARATE else [])
        if max(dims) > MAX_HEAD_DIM:
            return f"head dim {max(dims)} (kernels: up to {MAX_HEAD_DIM})"
        return None

    return refuse


def _native(direction, signature, results, workspaces):
    target = f"jax_flash.attention_{direction}"
    return {
        platform: Implementation(
            platform,
            functools.partial(_call, target, signature, results, workspace),
            _refuse(platform),
        )
        for platform, workspace in workspaces.items()
    }


attention_forward = Op(
    "attention_forward",
    signature=_forward_signature,
    results=_forward_results,
    native=_native("forward", _forward_signature, _forward_results, {"cpu": None, "cuda": None}),
    xla=Implementation("xla", attention_xla.forward),
)
attention_backward = Op(
    "attention_backward",
    signature=_backward_signature,
    results=_backward_results,
    native=_native(
        "backward",
        _backward_signature,
        _backward_results,
        {"cpu": _no_workspace, "cuda": cuda_backward_workspace},
    ),
    xla=Implementation("xla", attention_xla.backward),
)
