"""A Flax NNX transformer block on jax_flash's operators: norms, attention, MLP, residuals."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.linear import default_bias_init, default_kernel_init

from jax_flash import _block
from jax_flash.nnx.attention import RandomSource, _dropout_stream
from jax_flash.nnx.dense import FusedMLP
from jax_flash.nnx.multihead import MultiHeadAttention

__all__ = ["TransformerBlock"]

Initializer = jax.nn.initializers.Initializer


class _NormParameters(nnx.Module):
    """Those of Flax's LayerNorm and RMSNorm."""

    def __init__(self, width: int, use_bias: bool, param_dtype: Any, rngs: nnx.Rngs):
        self.scale = nnx.Param(nnx.initializers.ones(rngs.params(), (width,), param_dtype))
        self.bias = nnx.data(None)
        if use_bias:
            self.bias = nnx.Param(nnx.initializers.zeros(rngs.params(), (width,), param_dtype))

    def values(self) -> tuple[jax.Array, jax.Array | None]:
        return self.scale[...], None if self.bias is None else self.bias[...]


class TransformerBlock(nnx.Module):
    """Attention and MLP on a residual stream: dropout, addition and norm are one operator each.

    With prenorm (d is dropout, times drop path):

        s = s + d(x);  a = attention(norm1(s));  s = s + d(a);  x = mlp(norm2(s))

    The stream s travels beside x, what the block before computed and has not added yet, and a model
    ends in a norm of their sum::

      stream = None
      for block in self.blocks:
          x, stream = block(x, stream)
      x = self.norm(x, stream)  # a DropoutAddLayerNorm

    Parameters: `norm1`, `norm2` as nnx.LayerNorm or nnx.RMSNorm, `attention` as
    nnx.MultiHeadAttention, `mlp` as two nnx.Linear, fc1 and fc2.

    Args:
      num_heads, in_features: N and D.
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
      deterministic: True switches all three off; it must come from here, from the call, or by
        train() and eval(), wherever one of these rates is not 0. Default None.
      dtype: of the computation. Default None: x's in the norms, elsewhere that of inputs and
        parameters together.
      param_dtype, kernel_init, bias_init: as in Flax's layers.
      out_kernel_init: of the last product of each branch. Default None: kernel_init.
      implementation: of every operator in the block. Default None: the fastest each has.
      rngs: the parameters' and the dropout's randomness.
      attention_options: those of `MultiHeadAttention`: num_kv_heads, qkv_features, normalize_qk,
        rotary, is_causal, causal_offset, local_window_size, scale, deterministic_backward.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        hidden_features: int | None = None,
        *,
        activation: str = "gelu_tanh",
        checkpoint_level: int = 0,
        use_bias: bool = True,
        norm: str = "layer",
        epsilon: float = 1e-6,
        prenorm: bool = True,
        parallel: bool = False,
        tied_norm: bool = False,
        residual_in_fp32: bool = False,
        dropout_rate: float | tuple[float, float] = 0.0,
        drop_path_rate: float | tuple[float, float] = 0.0,
        attention_dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = default_bias_init,
        implementation: str | None = None,
        rngs: nnx.Rngs,
        **attention_options,
    ):
        self.norm = norm
        self.epsilon = epsilon
        self.prenorm = prenorm
        self.parallel = parallel
        self.tied_norm = tied_norm
        self.residual_in_fp32 = residual_in_fp32
        self.dropout_rate = dropout_rate
        self.drop_path_rate = drop_path_rate
        self.attention_dropout_rate = attention_dropout_rate
        self.deterministic = deterministic
        self.dtype = dtype
        self.implementation = implementation
        _block.check(self)

        def norm_parameters():
            return _NormParameters(in_features, norm == "layer", param_dtype, rngs)

        common = dict(
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            out_kernel_init=out_kernel_init,
            bias_init=bias_init,
            implementation=implementation,
        )
        self.norm1 = norm_parameters()
        self.norm2: _NormParameters | None = nnx.data(None)
        if not tied_norm:
            self.norm2 = norm_parameters()
        # Dropout is this block's to decide: `attention` gets it by the call.
        self.attention = MultiHeadAttention(
            num_heads,
            in_features,
            dropout_rate=attention_dropout_rate,
            **common,
            **attention_options,
            rngs=rngs,
        )
        self.mlp = FusedMLP(
            in_features,
            hidden_features,
            activation=activation,
            checkpoint_level=checkpoint_level,
            **common,
            rngs=rngs,
        )
        # A stream of its own, as in Flax's layers: nnx.split and nnx.jit then see no shared state.
        self.rngs: nnx.RngStream | None = nnx.data(None)
        if _block.drops(self):
            self.rngs = rngs.dropout.fork()

    def set_view(self, deterministic: bool | None = None):
        """What `nnx.view` calls.

        Args:
          deterministic: if True, switches dropout and drop path off.
        """
        if deterministic is not None:
            self.deterministic = deterministic

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
        rngs: RandomSource | None = None,
    ) -> jax.Array | tuple[_block.Branch, jax.Array]:
        """One block.

        Args:
          x: [*B, T, D]; parallel: after the first block the pair that it returned.
          residual: [*B, T, D], the stream that the block before returned. Default None: x begins
            it. Not without prenorm.
          cu_seqlens: int32 [n + 1] or [*B, n + 1]: T is the total of n concatenated sequences.
          seq_lengths: int32 [*B]: rows from there on are padding. Not with cu_seqlens.
          positions, offsets: for rotary: where the rows stand, as in `jax_flash.apply_rotary`.
          deterministic, rngs: override the constructor's where not None.

        Returns:
          (x, residual) for the next block; without prenorm x alone.

        Raises:
          TypeError, ValueError: arguments that do not fit; the message names them.
        """
        _block.check_stream(self, x, residual)
        dropping = _block.drops(self) and not nnx.module.first_from(
            deterministic,
            self.deterministic,
            error_msg="deterministic: expected True or False where dropout_rate, drop_path_rate or "
            "attention_dropout_rate > 0 (in the constructor, at the call, or by train() and "
            "eval()), got None",
        )
        stream = self.rngs if rngs is None else _dropout_stream(rngs)
        return _block.transform(
            self,
            _block.Parts(
                self.norm1.values(),
                None if self.norm2 is None else self.norm2.values(),
                lambda z: self.attention(
                    z,
                    cu_seqlens=cu_seqlens,
                    query_seq_lengths=seq_lengths,
                    key_value_seq_lengths=seq_lengths,
                    positions=positions,
                    offsets=offsets,
                    deterministic=not dropping,
                    rngs=stream if dropping else None,
                ),
                self.mlp,
            ),
            _block.draw(self, stream) if dropping else _block.Keys(),
            x,
            residual,
            cu_seqlens,
        )
