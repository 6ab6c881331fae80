"""Flax NNX layers on `jax_flash.attention`: O = dropout(softmax(scale Q K^T + masks)) V.

FlashSelfAttention, FlashCrossAttention, FlashBlocksparseAttention: packed Q K V in, no weights
"""

from typing import Any

import jax
from flax import nnx
from jax.typing import ArrayLike

from jax_flash import _flax

__all__ = [
    "FlashBlocksparseAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
]

RandomSource = nnx.Rngs | nnx.RngStream


class _FlashLayer(nnx.Module):
    """The attributes that every layer here has, and what a call makes of them."""

    def __init__(
        self,
        *,
        is_causal: bool = False,
        causal_offset: int | str = 0,
        local_window_size: int | tuple[int, int] | None = None,
        scale: float | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        deterministic_backward: bool = False,
        implementation: str | None = None,
        rngs: RandomSource | None = None,
    ):
        _flax.check_rate(dropout_rate)
        self.is_causal = is_causal
        self.causal_offset = causal_offset
        self.local_window_size = local_window_size
        self.scale = scale
        self.dropout_rate = dropout_rate
        self.deterministic = deterministic
        self.deterministic_backward = deterministic_backward
        self.implementation = implementation
        self._keep_stream(rngs)

    def _keep_stream(self, rngs: RandomSource | None) -> None:
        # A stream of its own, as in Flax's layers: nnx.split and nnx.jit then see no shared state.
        self.rngs: nnx.RngStream | None = nnx.data(None)
        if rngs is not None and self.dropout_rate > 0.0:
            self.rngs = _dropout_stream(rngs).fork()

    def set_view(self, deterministic: bool | None = None):
        """What `nnx.view` calls.

        Args:
          deterministic: if True, switches dropout off.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def _options(
        self, is_causal: bool | None, deterministic: bool | None, rngs: RandomSource | None
    ) -> dict[str, Any]:
        dropping = self.dropout_rate > 0.0 and not nnx.module.first_from(
            deterministic,
            self.deterministic,
            error_msg="deterministic: expected True or False where dropout_rate > 0 (in the "
            "constructor, at the call, or by train() and eval()), got None",
        )
        dropout_key = None
        if dropping:
            rngs = self.rngs if rngs is None else _dropout_stream(rngs)
            if rngs is None:
                raise ValueError(
                    f"rngs: expected nnx.Rngs where dropout applies (dropout_rate = "
                    f"{self.dropout_rate}), in the constructor or at the call, got None"
                )
            dropout_key = rngs()
        return _flax.call_options(
            self, is_causal=is_causal, dropping=dropping, dropout_key=dropout_key
        )


def _dropout_stream(rngs: RandomSource) -> nnx.RngStream:
    return rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs


class FlashSelfAttention(_FlashLayer):
    """Self-attention of already projected, packed queries, keys and values; no parameters.

    The module of the same name in the FlashAttention library, with its padded and its packed form.
    The kernels read the three parts of `qkv` where they lie and write one packed gradient.

    Example::

      layer = FlashSelfAttention(is_causal=True, dropout_rate=0.1, rngs=nnx.Rngs(0))
      layer.train()
      out = layer(qkv)

    Args:
      is_causal: query i sees key j only where j <= i. Default False.
      causal_offset: shifts the diagonal of `is_causal` and of the window: an int, or
        "bottom_right". Default 0, top-left.
      local_window_size: (left, right) keys that a query sees beside its own; an int means both.
        Default None, no limit.
      scale: factor of the logits. Default None, 1 / sqrt(H).
      dropout_rate: probability in [0, 1) that an attention weight is dropped. Default 0.
      deterministic: True switches dropout off. Wherever dropout_rate > 0 it must come from here,
        from the call (which wins) or from train() and eval(). Default None.
      deterministic_backward: the gradient is bitwise the same on every run. Default False.
      implementation: "cuda", "cpu", "xla", or None for the platform's own. Default None.
      rngs: whose "dropout" stream (or the stream itself) draws the keys. Default None: each call
        that drops brings its own.

    Raises:
      ValueError: dropout_rate outside [0, 1).
    """

    def __call__(
        self,
        qkv: jax.Array,
        *,
        cu_seqlens: jax.Array | None = None,
        seq_lengths: jax.Array | None = None,
        is_causal: bool | None = None,
        deterministic: bool | None = None,
        rngs: RandomSource | None = None,
    ) -> jax.Array:
        """Attends.

        Args:
          qkv: [*B, T, 3, N, H]; with `cu_seqlens`, [*B, total, 3, N, H].
          cu_seqlens: int32 [n + 1] or [*B, n + 1]; sequence s owns the rows from cu_seqlens[s] up
            to cu_seqlens[s + 1]; rows without an owner give 0.
          seq_lengths: int32 [*B]; rows from there on are padding: output 0. Not with cu_seqlens.
          is_causal, deterministic, rngs: override the constructor's where not None.

        Returns:
          [*B, T, N, H], or [*B, total, N, H], of qkv's dtype.

        Raises:
          ValueError: a bad shape, cu_seqlens together with seq_lengths, or dropout with no
            `deterministic` or no `rngs` anywhere; the message names the argument.
        """
        options = self._options(is_causal, deterministic, rngs)
        return _flax.self_attention(qkv, cu_seqlens, seq_lengths, options)


class FlashCrossAttention(_FlashLayer):
    """Attention of queries to packed keys and values of another sequence; no parameters.

    The module of the same name in the FlashAttention library. N may be a multiple of K
    (grouped-query attention).

    Args: those of `FlashSelfAttention`.
    """

    def __call__(
        self,
        query: jax.Array,
        key_value: jax.Array,
        *,
        cu_seqlens_q: jax.Array | None = None,
        cu_seqlens_k: jax.Array | None = None,
        query_seq_lengths: jax.Array | None = None,
        key_value_seq_lengths: jax.Array | None = None,
        is_causal: bool | None = None,
        deterministic: bool | None = None,
        rngs: RandomSource | None = None,
    ) -> jax.Array:
        """Attends.

        Args:
          query: [*B, T, N, H]; with cu_seqlens_q, [*B, total_q, N, H].
          key_value: [*B, S, 2, K, H]; with cu_seqlens_q, [*B, total_k, 2, K, H].
          cu_seqlens_q: int32 [n + 1] or [*B, n + 1]; sequence s owns the query rows from
            cu_seqlens_q[s] up to cu_seqlens_q[s + 1].
          cu_seqlens_k: likewise for the keys. Default None: the same as cu_seqlens_q.
          query_seq_lengths: int32 [*B]; query rows from there on give 0. Not with cu_seqlens_q.
          key_value_seq_lengths: int32 [*B]; keys from there on are not seen. Likewise.
          is_causal, deterministic, rngs: override the constructor's where not None.

        Returns:
          [*B, T, N, H], or [*B, total_q, N, H], of query's dtype.

        Raises:
          ValueError: a bad shape, cu_seqlens_k alone, lengths beside cu_seqlens_q, or dropout with
            no `deterministic` or no `rngs` anywhere; the message names the argument.
        """
        options = self._options(is_causal, deterministic, rngs)
        return _flax.cross_attention(
            query,
            key_value,
            (cu_seqlens_q, cu_seqlens_k),
            (query_seq_lengths, key_value_seq_lengths),
            options,
        )


class FlashBlocksparseAttention(_FlashLayer):
    """Self-attention restricted to the tiles of a block mask; time falls with its density.

    The module of the same name in the FlashAttention library: there a configuration object lays
    out the blocks (`make_layout`), here any function does, or the call brings the mask itself.

    Example::

      def banded(num_queries, num_keys):  # each tile of 128 sees itself and the one before
          rows, columns = -(-num_queries // 128), -(-num_keys // 128)
          return np.tri(rows, columns, 0, bool) & ~np.tri(rows, columns, -2, bool)

      layer = FlashBlocksparseAttention(layout=banded, is_causal=True)

    Args:
      layout: (T, S) -> block mask, asked at every trace; see `block_mask` of the call for the
        shape. Default None: each call brings its mask.
      block_size: (queries, keys) of a tile, multiples of 16, such as (64, 64) or (16, 256). Default
        (128, 128).
      The rest: those of `FlashSelfAttention`.
    """

    def __init__(
        self,
        *,
        layout: _flax.BlockLayout | None = None,
        block_size: tuple[int, int] = (128, 128),
        **options,
    ):
        super().__init__(**options)
        self.layout = layout
        self.block_size = block_size

    def __call__(
        self,
        qkv: jax.Array,
        block_mask: ArrayLike | None = None,
        *,
        seq_lengths: jax.Array | None = None,
        is_causal: bool | None = None,
        deterministic: bool | None = None,
        rngs: RandomSource | None = None,
    ) -> jax.Array:
        """Attends.

        Args:
          qkv: [*B, T, 3, N, H].
          block_mask: bool [*B, N, ceil(T / rows), ceil(T / columns)] for block_size = (rows,
            columns), or broadcastable to that. True: the tile exists. Wins over `layout`.
          seq_lengths: int32 [*B]; rows from there on are padding: output 0.
          is_causal, deterministic, rngs: override the constructor's where not None.

        Returns:
          [*B, T, N, H] of qkv's dtype; rows that no tile covers are 0.

        Raises:
          ValueError: neither block_mask nor layout, a bad shape or size, or dropout with no
            `deterministic` or no `rngs` anywhere; the message names the argument.
        """
        options = self._options(is_causal, deterministic, rngs)
        return _flax.blocksparse_self_attention(
            qkv, block_mask, self.layout, self.block_size, seq_lengths, options
        )
