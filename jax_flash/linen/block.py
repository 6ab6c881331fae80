"""A Flax Linen transformer block on jax_flash's operators: norms, attention, MLP, residuals."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.linear import default_kernel_init

from jax_flash import _block
from jax_flash.linen.dense import FusedMLP
from jax_flash.linen.multihead import MultiHeadAttention

__all__ = ["TransformerBlock"]

Initializer = jax.nn.initializers.Initializer


class _NormParameters(nn.Module):
    """Those of Flax's LayerNorm and RMSNorm."""

    use_bias: bool
    param_dtype: Any

    @nn.compact
    def __call__(self, width: int) -> tuple[jax.Array, jax.Array | None]:
        dtype = self.param_dtype
        scale = self.param("scale", nn.initializers.ones, (width,), dtype)
        bias = self.param("bias", nn.initializers.zeros, (width,), dtype) if self.use_bias else None
        return scale, bias


class TransformerBlock(nn.Module, kw_only=True):
    """Attention and MLP on a residual stream: dropout, addition and norm are one operator each.

    With prenorm (d is dropout, times drop path):

        s = s + d(x);  a = attention(norm1(s));  s = s + d(a);  x = mlp(norm2(s))

    The stream s travels beside x, what the block before computed and has not added yet, and a model
    ends in a norm of their sum::

      stream = None
      for _ in range(12):
          x, stream = TransformerBlock(num_heads=8, is_causal=True, norm="rms")(x, stream)
      x = DropoutAddRMSNorm()(x, stream)

    Parameters: `norm1`, `norm2` as Flax's LayerNorm or RMSNorm, `attention` as its
    MultiHeadDotProductAttention, `mlp` as two Dense, fc1 and fc2.

    Attributes:
      num_heads, num_kv_heads, qkv_features, normalize_qk, rotary: as in `MultiHeadAttention`.
      is_causal, causal_offset, local_window_size, scale, deterministic_backward: likewise.
      hidden_features, activation, checkpoint_level: as in `FusedMLP`.
      use_bias: of attention's and MLP's products. Default True.
      norm: "layer" or "rms". Default "layer".
      epsilon: of both norms. Default 1e-6.
      prenorm: Default True. False: x = norm1(x + d(attention(x))); x = norm2(x + d(mlp(x))).
      parallel: with prenorm: both branches of one stream, s = s + d(x) + d(x1); x =
        attention(norm1(s)); x1 = mlp(norm2(s)). x is then the pair (x, x1). Default False.
      tied_norm: with parallel: norm1 serves both branches (GPT-J). Default False (GPT-NeoX).
      residual_in_fp32: with prenorm: the stream is float32. Default False.
      dropout_rate: of what is added, or a pair: of the first and of the second addition. The first
        block's x is the embedding, which the first rate drops, too. Default 0.
      drop_path_rate: of dropping what is added to a whole sequence, or a pair; not of the first
        block's x (Huang et al., "Deep networks with stochastic depth", 2016). Default 0.
      attention_dropout_rate: of the attention weights. Default 0.
      deterministic: True switches all three off; it must come from here or from the call, not both,
        wherever one of these rates is not 0. Default None.
      dtype: of the computation. Default None: x's in the norms, elsewhere that of inputs and
        parameters together.
      param_dtype, kernel_init, bias_init: as in Flax's layers.
      out_kernel_init: of the last product of each branch. Default None: kernel_init.
      implementation: of every operator in the block. Default None: the fastest each has.
    """

    num_heads: int
    num_kv_heads: int | None = None
    qkv_features: int | None = None
    normalize_qk: bool = False
    rotary: Any = None
    is_causal: bool = False
    causal_offset: int | str = 0
    local_window_size: int | tuple[int, int] | None = None
    scale: float | None = None
    deterministic_backward: bool = False
    hidden_features: int | None = None
    activation: str = "gelu_tanh"
    checkpoint_level: int = 0
    use_bias: bool = True
    norm: str = "layer"
    epsilon: float = 1e-6
    prenorm: bool = True
    parallel: bool = False
    tied_norm: bool = False
    residual_in_fp32: bool = False
    dropout_rate: float | tuple[float, float] = 0.0
    drop_path_rate: float | tuple[float, float] = 0.0
    attention_dropout_rate: float = 0.0
    deterministic: bool | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = default_kernel_init
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros
    implementation: str | None = None

    @nn.compact
    def __call__(
        self,
        x: _block.Branch,
        residual: jax.Array | None = None,
        *,
        cu_seqlens: jax.Array | None = None,
        seq_lengths: jax.Array | None = None,
        positions: jax.Array | None = None,
        offsets: int | jax.Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array | tuple[_block.Branch, jax.Array]:
        """One block.

        Args:
          x: [*B, T, D]; parallel: after the first block the pair that it returned.
          residual: [*B, T, D], the stream that the block before returned. Default None: x begins
            it. Not without prenorm.
          cu_seqlens: int32 [n + 1] or [*B, n + 1]: T is the total of n concatenated sequences.
          seq_lengths: int32 [*B]: rows from there on are padding. Not with cu_seqlens.
          positions, offsets: for rotary: where the rows stand, as in `jax_flash.apply_rotary`.
          deterministic: see the attribute.
          dropout_rng: a key, instead of the stream "dropout".

        Returns:
          (x, residual) for the next block; without prenorm x alone.

        Raises:
          TypeError, ValueError: attributes or arguments that do not fit; the message names them.
        """
        _block.check(self)
        _block.check_stream(self, x, residual)
        keys, attention_key = _block.Keys(), None
        dropping = _block.drops(self) and not nn.merge_param(
            "deterministic", self.deterministic, deterministic
        )
        if dropping:
            own = None if dropout_rng is None else iter(jax.random.split(dropout_rng, 5))
            next_key = (lambda: self.make_rng("dropout")) if own is None else own.__next__
            keys = _block.draw(self, next_key)
            attention_key = next_key() if self.attention_dropout_rate else None
        width = (x[0] if isinstance(x, tuple) else x).shape[-1]
        return _block.transform(
            self,
            _block.Parts(
                self._norm("norm1", width),
                None if self.tied_norm else self._norm("norm2", width),
                lambda z: self._attention()(
                    z,
                    cu_seqlens=cu_seqlens,
                    query_seq_lengths=seq_lengths,
                    key_value_seq_lengths=seq_lengths,
                    positions=positions,
                    offsets=offsets,
                    deterministic=not dropping,
                    dropout_rng=attention_key,
                ),
                lambda z: self._mlp()(z),
            ),
            keys,
            x,
            residual,
            cu_seqlens,
        )

    def _norm(self, name: str, width: int) -> tuple[jax.Array, jax.Array | None]:
        return _NormParameters(self.norm == "layer", self.param_dtype, name=name)(width)

    def _common(self) -> dict[str, Any]:
        return dict(
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            implementation=self.implementation,
        )

    def _attention(self) -> MultiHeadAttention:
        return MultiHeadAttention(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            qkv_features=self.qkv_features,
            normalize_qk=self.normalize_qk,
            rotary=self.rotary,
            is_causal=self.is_causal,
            causal_offset=self.causal_offset,
            local_window_size=self.local_window_size,
            scale=self.scale,
            dropout_rate=self.attention_dropout_rate,
            deterministic_backward=self.deterministic_backward,
            out_kernel_init=self.out_kernel_init,
            name="attention",
            **self._common(),
        )

    def _mlp(self) -> FusedMLP:
        return FusedMLP(
            hidden_features=self.hidden_features,
            activation=self.activation,
            checkpoint_level=self.checkpoint_level,
            out_kernel_init=self.out_kernel_init,
            name="mlp",
            **self._common(),
        )
