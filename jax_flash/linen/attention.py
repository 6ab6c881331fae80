"""Flax Linen layers on `jax_flash.attention`: O = dropout(softmax(scale Q K^T + masks)) V.

FlashSelfAttention, FlashCrossAttention, FlashBlocksparseAttention: packed Q K V in, no weights
"""

from typing import Any

import jax
from flax import linen as nn
from jax.typing import ArrayLike

from jax_flash import _flax

__all__ = [
    "FlashBlocksparseAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
]


class _FlashLayer(nn.Module, kw_only=True):
    """The attributes that every layer here has, and what a call makes of them."""

    is_causal: bool = False
    causal_offset: int | str = 0
    local_window_size: int | tuple[int, int] | None = None
    scale: float | None = None
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    deterministic_backward: bool = False
    implementation: str | None = None

    def _options(
        self, is_causal: bool | None, deterministic: bool | None, dropout_rng: jax.Array | None
    ) -> dict[str, Any]:
        _flax.check_rate(self.dropout_rate)
        dropping = self.dropout_rate > 0.0 and not nn.merge_param(
            "deterministic", self.deterministic, deterministic
        )
        if dropping and dropout_rng is None:
            dropout_rng = self.make_rng("dropout")
        return _flax.call_options(
            self, is_causal=is_causal, dropping=dropping, dropout_key=dropout_rng
        )


class FlashSelfAttention(_FlashLayer, kw_only=True):
    """Self-attention of already projected, packed queries, keys and values; no parameters.

    The module of the same name in the FlashAttention library, with its padded and its packed form.
    The kernels read the three parts of `qkv` where they lie and write one packed gradient.

    Example::

      layer = FlashSelfAttention(is_causal=True, dropout_rate=0.1)
      out = layer.apply({}, qkv, deterministic=False, rngs={"dropout": jax.random.key(0)})

    Attributes:
      is_causal: query i sees key j only where j <= i. Default False.
      causal_offset: shifts the diagonal of `is_causal` and of the window: an int, or
        "bottom_right". Default 0, top-left.
      local_window_size: (left, right) keys that a query sees beside its own; an int means both.
        Default None, no limit.
      scale: factor of the logits. Default None, 1 / sqrt(H).
      dropout_rate: probability in [0, 1) that an attention weight is dropped. Default 0.
      deterministic: True switches dropout off. As in Flax, it must come from here or from the
        call, not both, wherever dropout_rate > 0. Default None.
      deterministic_backward: the gradient is bitwise the same on every run. Default False.
      implementation: "cuda", "cpu", "xla", or None for the platform's own. Default None.
    """

    def __call__(
        self,
        qkv: jax.Array,
        *,
        cu_seqlens: jax.Array | None = None,
        seq_lengths: jax.Array | None = None,
        is_causal: bool | None = None,
        deterministic: bool | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Attends.

        Args:
          qkv: [*B, T, 3, N, H]; with `cu_seqlens`, [*B, total, 3, N, H].
          cu_seqlens: int32 [n + 1] or [*B, n + 1]; sequence s owns the rows from cu_seqlens[s] up
            to cu_seqlens[s + 1]; rows without an owner give 0.
          seq_lengths: int32 [*B]; rows from there on are padding: output 0. Not with cu_seqlens.
          is_causal: overrides the attribute where not None.
          deterministic: see the attribute.
          dropout_rng: JAX key of the dropout; by default the "dropout" stream's next.

        Returns:
          [*B, T, N, H], or [*B, total, N, H], of qkv's dtype.

        Raises:
          ValueError: a bad shape or rate, or cu_seqlens together with seq_lengths; the message
            names the argument. Also where dropout_rate > 0 and `deterministic` is nowhere given.
        """
        options = self._options(is_causal, deterministic, dropout_rng)
        return _flax.self_attention(qkv, cu_seqlens, seq_lengths, options)


class FlashCrossAttention(_FlashLayer, kw_only=True):
    """Attention of queries to packed keys and values of another sequence; no parameters.

    The module of the same name in the FlashAttention library. N may be a multiple of K
    (grouped-query attention).

    Attributes: those of `FlashSelfAttention`.
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
        dropout_rng: jax.Array | None = None,
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
          is_causal, deterministic, dropout_rng: as for `FlashSelfAttention`.

        Returns:
          [*B, T, N, H], or [*B, total_q, N, H], of query's dtype.

        Raises:
          ValueError: a bad shape or rate, cu_seqlens_k alone, or lengths beside cu_seqlens_q; the
            message names the argument.
        """
        options = self._options(is_causal, deterministic, dropout_rng)
        return _flax.cross_attention(
            query,
            key_value,
            (cu_seqlens_q, cu_seqlens_k),
            (query_seq_lengths, key_value_seq_lengths),
            options,
        )


class FlashBlocksparseAttention(_FlashLayer, kw_only=True):
    """Self-attention restricted to the tiles of a block mask; time falls with its density.

    The module of the same name in the FlashAttention library: there a configuration object lays
    out the blocks (`make_layout`), here any function does, or the call brings the mask itself.

    Example::

      def banded(num_queries, num_keys):  # each tile of 128 sees itself and the one before
          rows, columns = -(-num_queries // 128), -(-num_keys // 128)
          return np.tri(rows, columns, 0, bool) & ~np.tri(rows, columns, -2, bool)

      layer = FlashBlocksparseAttention(layout=banded, is_causal=True)

    Attributes:
      layout: (T, S) -> block mask, asked at every trace; see `block_mask` of the call for the
        shape. Default None: each call brings its mask.
      block_size: (queries, keys) of a tile, multiples of 16, such as (64, 64) or (16, 256). Default
        (128, 128).
      The rest: those of `FlashSelfAttention`.
    """

    layout: _flax.BlockLayout | None = None
    block_size: tuple[int, int] = (128, 128)

    def __call__(
        self,
        qkv: jax.Array,
        block_mask: ArrayLike | None = None,
        *,
        seq_lengths: jax.Array | None = None,
        is_causal: bool | None = None,
        deterministic: bool | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Attends.

        Args:
          qkv: [*B, T, 3, N, H].
          block_mask: bool [*B, N, ceil(T / rows), ceil(T / columns)] for block_size = (rows,
            columns), or broadcastable to that. True: the tile exists. Wins over `layout`.
          seq_lengths, is_causal, deterministic, dropout_rng: as for `FlashSelfAttention`.

        Returns:
          [*B, T, N, H] of qkv's dtype; rows that no tile covers are 0.

        Raises:
          ValueError: neither block_mask nor layout, or a bad shape, size or rate; the message
            names the argument.
        """
        options = self._options(is_causal, deterministic, dropout_rng)
        return _flax.blocksparse_self_attention(
            qkv, block_mask, self.layout, self.block_size, seq_lengths, options
        )
