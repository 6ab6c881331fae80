"""What the Linen and the NNX layers share, in plain JAX: this file imports no Flax.

    layer (linen/, nnx/): parameters, random streams, Flax's train/eval switch
      -> here: Flax's arguments become jax_flash's, and what cannot be honoured is refused
        -> attention.py

The one idea: a layer collects the keyword arguments of its call once (`call_options`), and the same
dictionary serves the padded, the packed and the variable-length form.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_flash._attention import refuse
from jax_flash._ops.dense import affine
from jax_flash.attention import attention, attention_kvpacked, attention_qkvpacked
from jax_flash.rotary import RotaryTable, apply_rotary, apply_rotary_qkvpacked, rotate_pair
from jax_flash.varlen import (
    varlen_attention,
    varlen_attention_kvpacked,
    varlen_attention_qkvpacked,
)

BlockLayout = Callable[[int, int], ArrayLike]


def check_rate(dropout_rate: float) -> None:
    """Raises ValueError unless 0 <= dropout_rate < 1; a layer asks even when it does not drop."""
    if not 0.0 <= dropout_rate < 1.0:
        refuse("dropout_rate", "a rate in [0, 1)", dropout_rate)


def check_precision(precision: Any) -> None:
    """Raises ValueError for what is no `jax.lax.Precision`, its name, or a pair of either.

    Those ask for "at least this exact", which the kernels always are: products accumulate in
    float32, and float32 inputs are multiplied as such. A dot algorithm asks for one exact recipe.
    """
    for part in precision if isinstance(precision, tuple) else (precision,):
        try:
            part is None or jax.lax.Precision(part)
        except ValueError:
            refuse("precision", "None, a jax.lax.Precision or its name", repr(precision))


def check_heads(num_heads: int, num_kv_heads: int | None, qkv_features: int) -> tuple[int, int]:
    """Returns (num_kv_heads, head_dim) of a layer, or raises ValueError naming the odd one."""
    if num_heads < 1:
        refuse("num_heads", "a positive number", num_heads)
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_kv_heads < 1 or num_heads % num_kv_heads != 0:
        refuse("num_kv_heads", f"a divisor of num_heads = {num_heads}", num_kv_heads)
    if qkv_features % num_heads != 0:
        refuse("qkv_features", f"a multiple of num_heads = {num_heads}", qkv_features)
    return num_kv_heads, qkv_features // num_heads


def check_cu_seqlens(cu_seqlens: jax.Array | None, **others: Any) -> None:
    """Raises ValueError for what says again, or otherwise, which rows belong together."""
    for name, given in others.items() if cu_seqlens is not None else ():
        if given is not None:
            refuse(name, "None with cu_seqlens (self-attention)", "an array")


def check_inputs(
    inputs_q: jax.Array, inputs_k: jax.Array | None, inputs_v: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Fills in the inputs a caller left out, as Flax does: k is q's, v is k's."""
    if inputs_k is None:
        if inputs_v is not None:
            refuse(
                "inputs_k", "an array when inputs_v is given (for V = K leave out inputs_v)", None
            )
        inputs_k = inputs_q
    if inputs_v is None:
        inputs_v = inputs_k
    for name, array in (("inputs_q", inputs_q), ("inputs_k", inputs_k), ("inputs_v", inputs_v)):
        if array.ndim < 2 or array.shape[:-2] != inputs_q.shape[:-2]:
            leading = inputs_q.shape[:-2]
            refuse(name, f"[*B, length, features] with *B = {leading}", f"shape {array.shape}")
    if inputs_k.shape[-2] != inputs_v.shape[-2]:
        refuse("inputs_v", f"inputs_k's length {inputs_k.shape[-2]}", f"shape {inputs_v.shape}")
    return inputs_q, inputs_k, inputs_v


def call_options(
    layer: Any, *, is_causal: bool | None, dropping: bool, dropout_key: jax.Array | None
) -> dict[str, Any]:
    """The keyword arguments that every form of attention takes, from a layer's attributes.

    Args:
      layer: a Linen or NNX layer with the attributes read below.
      is_causal: the call's own choice; None takes the layer's.
      dropping: whether this call applies dropout.
      dropout_key: JAX key; read only where `dropping`.
    """
    return dict(
        scale=layer.scale,
        is_causal=layer.is_causal if is_causal is None else is_causal,
        causal_offset=layer.causal_offset,
        local_window_size=layer.local_window_size,
        dropout_rate=layer.dropout_rate if dropping else 0.0,
        dropout_key=dropout_key if dropping else None,
        deterministic=layer.deterministic_backward,
        implementation=layer.implementation,
    )


def self_attention(
    qkv: jax.Array, cu_seqlens: jax.Array | None, seq_lengths: jax.Array | None, options: dict
) -> jax.Array:
    """FlashSelfAttention's call: qkv [*B, T, 3, N, H], or with cu_seqlens [*B, total, 3, N, H]."""
    if cu_seqlens is None:
        return attention_qkvpacked(
            qkv, query_seq_lengths=seq_lengths, key_value_seq_lengths=seq_lengths, **options
        )
    if seq_lengths is not None:
        refuse("seq_lengths", "None with cu_seqlens, which has the lengths already", "an array")
    return varlen_attention_qkvpacked(qkv, cu_seqlens, **options)


def cross_attention(
    query: jax.Array,
    key_value: jax.Array,
    cu_seqlens: tuple[jax.Array | None, jax.Array | None],
    seq_lengths: tuple[jax.Array | None, jax.Array | None],
    options: dict,
) -> jax.Array:
    """FlashCrossAttention's call; the pairs are (of the queries, of the keys)."""
    if cu_seqlens[0] is None and cu_seqlens[1] is None:
        return attention_kvpacked(
            query,
            key_value,
            query_seq_lengths=seq_lengths[0],
            key_value_seq_lengths=seq_lengths[1],
            **options,
        )
    if cu_seqlens[0] is None:
        refuse("cu_seqlens_q", "an array when cu_seqlens_k is given", None)
    for name, lengths in zip(
        ("query_seq_lengths", "key_value_seq_lengths"), seq_lengths, strict=True
    ):
        if lengths is not None:
            refuse(name, "None with cu_seqlens_q, which has the lengths already", "an array")
    return varlen_attention_kvpacked(query, key_value, *cu_seqlens, **options)


def blocksparse_self_attention(
    qkv: jax.Array,
    block_mask: ArrayLike | None,
    layout: BlockLayout | None,
    block_size: tuple[int, int],
    seq_lengths: jax.Array | None,
    options: dict,
) -> jax.Array:
    """FlashBlocksparseAttention's call; `block_mask` wins over `layout(T, T)`."""
    if block_mask is None:
        if layout is None:
            refuse("block_mask", "an array at the call, or a layout in the constructor", "neither")
        if qkv.ndim < 4:
            refuse("qkv", "shape [*B, T, 3, N, H]", f"shape {qkv.shape}")
        block_mask = layout(qkv.shape[-4], qkv.shape[-4])
    return attention_qkvpacked(
        qkv,
        query_seq_lengths=seq_lengths,
        key_value_seq_lengths=seq_lengths,
        block_mask=block_mask,
        block_size=block_size,
        **options,
    )


def flax_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    *,
    broadcast_dropout: bool,
    dropout_rng: jax.Array | None,
    dropout_rate: float,
    deterministic: bool,
    precision: Any,
    refused: dict[str, Any],
    **options,
) -> jax.Array:
    """The body of both `attention_fn`: Flax's meaning of the arguments, or a ValueError.

    Args:
      query, key, value: [*B, T, N, H], [*B, S, K, H], [*B, S, K, Hv], of one dtype.
      bias, mask: broadcastable to [*B, N, T, S]; Flax's mask may be a 0/1 array of any dtype.
      refused: argument name -> value, for what no fused kernel can do; all must be None.
      options: handed to `attention`.
    """
    reasons = {
        "module": "None: attention weights cannot be sown (sow_weights=True), no kernel holds them",
        "input_positions": "None: rotary embedding is no part of attention_fn",
    }
    for name, given in refused.items():
        if given is not None:
            refuse(name, reasons.get(name, "None: the kernels do their own products"), repr(given))
    check_precision(precision)
    check_rate(dropout_rate)
    dropping = dropout_rate > 0.0 and not deterministic
    if dropping and broadcast_dropout:
        expected = "False: the kernels draw each batch entry's and head's dropout on its own"
        refuse("broadcast_dropout", expected, True)
    if dropping and dropout_rng is None:
        refuse("dropout_rng", f"a JAX key with dropout_rate={dropout_rate}", None)
    return attention(
        query,
        key,
        value,
        bias,
        as_bool(mask),
        dropout_rate=dropout_rate if dropping else 0.0,
        dropout_key=dropout_rng if dropping else None,
        **options,
    )


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    cu_seqlens: jax.Array | None,
    seq_lengths: tuple[jax.Array | None, jax.Array | None],
    options: dict,
) -> jax.Array:
    """MultiHeadAttention's call, of queries, keys and values that are apart."""
    if cu_seqlens is not None:
        return varlen_attention(query, key, value, cu_seqlens, **options)
    lengths = dict(query_seq_lengths=seq_lengths[0], key_value_seq_lengths=seq_lengths[1])
    return attention(query, key, value, bias, as_bool(mask), **lengths, **options)


def attend_packed(
    qkv: jax.Array,
    cu_seqlens: jax.Array | None,
    seq_lengths: tuple[jax.Array | None, jax.Array | None],
    options: dict,
) -> jax.Array:
    """The same of one array [*B, T, 3, N, H], read where it lies, with one packed gradient."""
    if cu_seqlens is not None:
        return varlen_attention_qkvpacked(qkv, cu_seqlens, **options)
    lengths = dict(query_seq_lengths=seq_lengths[0], key_value_seq_lengths=seq_lengths[1])
    return attention_qkvpacked(qkv, **lengths, **options)


def project_packed(inputs: jax.Array, kernels: list, biases: list) -> jax.Array:
    """The three projections of self-attention as one product: [*B, T, D] -> [*B, T, 3, N, H].

    Args:
      kernels: of queries, keys and values, [D, N, H] each, inputs' type.
      biases: [N, H] each, or None.
    """
    kernel = jnp.stack(kernels, 1)
    bias = None if biases[0] is None else jnp.stack(biases)
    if jax.device_count() == 1:
        bias = None if bias is None else bias.reshape(-1)
        qkv = affine(inputs, kernel.reshape(kernel.shape[0], -1), bias)
        return qkv.reshape(*inputs.shape[:-1], *kernel.shape[1:])
    # The axes stay apart, so that heads which devices share need no gathering.
    qkv = jnp.einsum("...d,dcnh->...cnh", inputs, kernel)
    return qkv if bias is None else qkv + bias


def as_bool(mask: ArrayLike | None) -> jax.Array | None:
    """Flax's mask helpers return 0.0 and 1.0 by default; attention takes bool."""
    return None if mask is None else jnp.asarray(mask).astype(bool)


def rotate(
    rotary: Any, query: jax.Array, key: jax.Array, implementation: str | None, places: dict
) -> tuple[jax.Array, jax.Array]:
    """Queries and keys turned by a RotaryTable or a RotaryEmbedding layer; None: as they are.

    Args:
      places: positions, offsets, cu_seqlens, as in `jax_flash.apply_rotary`.
    """
    if rotary is None:
        return query, key
    if not isinstance(rotary, RotaryTable):
        return rotary(query, key, **places)
    implementation = _table_implementation(implementation)
    return rotate_pair(query, key, rotary, implementation=implementation, **places)


def rotate_packed(
    rotary: Any, qkv: jax.Array, implementation: str | None, places: dict
) -> jax.Array:
    """The same inside packed qkv [*B, T, 3, N, H]."""
    if rotary is None:
        return qkv
    if not isinstance(rotary, RotaryTable):
        return rotary.packed(qkv, **places)
    implementation = _table_implementation(implementation)
    return apply_rotary_qkvpacked(qkv, rotary, implementation=implementation, **places)


def _table_implementation(implementation: str | None) -> str | None:
    """Of the rotation in a layer whose attention runs by `implementation`."""
    return "xla" if implementation == "xla" else None


def check_rotary(rotary: Any, head_dim: int, positions: Any, offsets: Any) -> None:
    """Raises for what is neither kind of table, is too wide, or for places without any."""
    if rotary is None:
        for name, given in (("positions", positions), ("offsets", offsets)):
            if given is not None:
                refuse(name, "None without rotary", "an array")
        return
    if not isinstance(rotary, (RotaryTable, RotaryCalls)):
        got = type(rotary).__name__
        refuse("rotary", "a RotaryTable, a RotaryEmbedding or None", got, TypeError)
    dim = rotary.dim if isinstance(rotary, RotaryCalls) else 2 * jnp.shape(rotary.cos)[-1]
    if dim > head_dim:
        refuse("rotary", f"at most {head_dim} turned elements, the head dim", dim)


class RotaryCalls:
    """The calls of both RotaryEmbedding layers, which only add how they hold these numbers."""

    dim: int
    base: float
    scale_base: float | None
    interleaved: bool
    max_length: int | None
    implementation: str | None

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array | None = None,
        *,
        positions: jax.Array | None = None,
        offsets: int | jax.Array | None = None,
        cu_seqlens: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Turns queries, and keys.

        Args:
          query: [*B, T, N, H].
          key: [*B, S, K, H], or None.
          positions, offsets, cu_seqlens: where the rows are, as in `jax_flash.apply_rotary`.

        Returns:
          The turned queries, or (queries, keys).

        Raises:
          ValueError: positions or offsets without max_length, or a bad shape.
        """
        options = dict(positions=positions, offsets=offsets, cu_seqlens=cu_seqlens)
        options |= dict(implementation=self.implementation)
        rows = max(query.shape[-3], 0 if key is None else key.shape[-3])
        table = self._table(rows, positions, offsets)
        if key is None:
            return apply_rotary(query, table, **options)
        return rotate_pair(query, key, table, **options)

    def packed(
        self,
        qkv: jax.Array,
        *,
        positions: jax.Array | None = None,
        offsets: int | jax.Array | None = None,
        cu_seqlens: jax.Array | None = None,
    ) -> jax.Array:
        """The same of the queries and keys inside packed qkv [*B, T, 3, N, H]."""
        return apply_rotary_qkvpacked(
            qkv,
            self._table(qkv.shape[-4], positions, offsets),
            positions=positions,
            offsets=offsets,
            cu_seqlens=cu_seqlens,
            implementation=self.implementation,
        )

    def _table(self, rows: int, positions: Any, offsets: Any) -> RotaryTable:
        """As long as the positions need."""
        if self.max_length is None and (positions is not None or offsets is not None):
            refuse("max_length", "a number together with positions or offsets", None)
        return RotaryTable.make(
            rows if self.max_length is None else self.max_length,
            self.dim,
            base=self.base,
            scale_base=self.scale_base,
            interleaved=self.interleaved,
        )


def in_float32(*parameters: jax.Array | None) -> list[jax.Array | None]:
    """What the norms take as weights beside any x."""
    return [None if p is None else p.astype(jnp.float32) for p in parameters]
