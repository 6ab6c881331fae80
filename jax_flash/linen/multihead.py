"""Flax Linen's own attention layer on `jax_flash.attention`.

    MultiHeadAttention: Flax's, with GQA, windows and lengths
    attention_fn: for Flax's own nn.MultiHeadDotProductAttention

`MultiHeadAttention` names and initialises its parameters exactly as Flax's does, so that weights
move between the two.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.linen.linear import default_kernel_init

from jax_flash import _flax
from jax_flash.linen.attention import _FlashLayer

__all__ = ["MultiHeadAttention", "attention_fn"]

Initializer = jax.nn.initializers.Initializer


class _Projection(nn.Module):
    """The parameters of Flax's DenseGeneral to (heads, head dim), without its product."""

    heads: int
    head_dim: int
    use_bias: bool
    param_dtype: Any
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, inputs: int) -> tuple[jax.Array, jax.Array | None]:
        """Features of the input -> kernel [inputs, heads, head_dim], bias [heads, head_dim]."""
        per_head = (self.heads, self.head_dim)

        def flat(init, lead):  # as there: initialised as one matrix, one vector
            shape = (*lead, self.heads * self.head_dim)
            return lambda key, full, dtype: init(key, shape, dtype).reshape(full)

        dtype = self.param_dtype
        kernel = self.param("kernel", flat(self.kernel_init, (inputs,)), (inputs, *per_head), dtype)
        bias = (
            self.param("bias", flat(self.bias_init, ()), per_head, dtype) if self.use_bias else None
        )
        return kernel, bias


class MultiHeadAttention(_FlashLayer, kw_only=True):
    """Multi-head attention with projections: Flax's layer on the fused kernels.

    Q, K, V = inputs W + b per head, O = attention(Q, K, V), out = O W_out + b_out. Parameters are
    those of `flax.linen.MultiHeadDotProductAttention`, by name, shape, dtype and initial value:
    query/kernel [D, N, H], key/kernel and value/kernel [D, K, H], out/kernel [N, H, D_out], and
    their biases; with K = num_kv_heads < num_heads (grouped-query attention) only that axis
    differs. Unlike Flax's, a query that sees no key gives zeros, not the mean of all values, and
    dropout is drawn for each batch entry and head (Flax's broadcast_dropout=False).

    Example::

      layer = MultiHeadAttention(num_heads=8, num_kv_heads=2, is_causal=True)
      variables = layer.init(jax.random.key(0), x)
      out = layer.apply(variables, x)

    Attributes:
      num_heads: query heads, N.
      num_kv_heads: key/value heads, K, a divisor of num_heads. Default None: num_heads.
      qkv_features: N * H. Default None: the features of inputs_q.
      out_features: features of the result. Default None: those of inputs_q.
      use_bias: whether the four projections add a bias. Default True.
      normalize_qk: LayerNorm (scale only) of each head's queries and keys. Default False.
      rotary: a `jax_flash.RotaryTable` or a `RotaryEmbedding` layer, which turns queries and keys.
        Default None.
      dtype: of the computation. Default None: promoted from inputs and parameters.
      param_dtype: of the parameters. Default float32.
      precision: of the projections' products, as in `jax.lax.dot_general`. Default None.
      kernel_init, bias_init: initialisers. Default Flax's: LeCun normal, zeros.
      out_kernel_init, out_bias_init: of the last projection. Default None: the same.
      The rest: those of `FlashSelfAttention`.
    """

    num_heads: int
    num_kv_heads: int | None = None
    qkv_features: int | None = None
    out_features: int | None = None
    use_bias: bool = True
    normalize_qk: bool = False
    rotary: Any = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Initializer = default_kernel_init
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = jax.nn.initializers.zeros
    out_bias_init: Initializer | None = None

    @nn.compact
    def __call__(
        self,
        inputs_q: jax.Array,
        inputs_k: jax.Array | None = None,
        inputs_v: jax.Array | None = None,
        *,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        query_seq_lengths: jax.Array | None = None,
        key_value_seq_lengths: jax.Array | None = None,
        cu_seqlens: jax.Array | None = None,
        positions: jax.Array | None = None,
        offsets: int | jax.Array | None = None,
        is_causal: bool | None = None,
        deterministic: bool | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array:
        """Projects, attends, projects back.

        Self-attention with as many kv heads as query heads is projected by one product and read
        where it lies, unless bias, mask, precision or normalize_qk ask for the parts.

        Args:
          inputs_q: [*B, T, D].
          inputs_k: [*B, S, D_k]. Default None: inputs_q, that is self-attention.
          inputs_v: [*B, S, D_v]. Default None: inputs_k.
          bias: added to the logits; broadcastable to [*B, N, T, S].
          mask: True, or not zero, where a query sees a key; broadcastable to [*B, N, T, S]. A
            causal, windowed or padded pattern is faster said by is_causal, local_window_size and
            the lengths.
          query_seq_lengths: int32 [*B]; query rows from there on attend to nothing.
          key_value_seq_lengths: int32 [*B]; keys from there on are not seen.
          cu_seqlens: int32 [n + 1] or [*B, n + 1]: self-attention within each of n concatenated
            sequences, T their total. Not together with inputs_k, masks and lengths.
          positions, offsets: for rotary: where the rows stand, as in `jax_flash.apply_rotary`.
          is_causal, deterministic, dropout_rng: as for `FlashSelfAttention`.

        Returns:
          [*B, T, out_features].

        Raises:
          TypeError, ValueError: num_kv_heads no divisor of num_heads, qkv_features no multiple of
            it, inputs that do not fit each other, or a bad rate or table; the message names the
            argument.
        """
        seq_lengths = (query_seq_lengths, key_value_seq_lengths)
        _flax.check_cu_seqlens(
            cu_seqlens,
            inputs_k=inputs_k,
            bias=bias,
            mask=mask,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
        )
        in_parts = any(x is not None for x in (inputs_k, inputs_v, bias, mask, self.precision))
        inputs_q, inputs_k, inputs_v = _flax.check_inputs(inputs_q, inputs_k, inputs_v)
        num_kv_heads, head_dim = _flax.check_heads(
            self.num_heads, self.num_kv_heads, self.qkv_features or inputs_q.shape[-1]
        )
        _flax.check_rotary(self.rotary, head_dim, positions, offsets)
        places = dict(positions=positions, offsets=offsets, cu_seqlens=cu_seqlens)
        options = self._options(is_causal, deterministic, dropout_rng)
        if in_parts or self.normalize_qk or num_kv_heads != self.num_heads:
            inputs = (inputs_q, inputs_k, inputs_v)
            query, key, value = self._project(inputs, num_kv_heads, head_dim)
            query, key = _flax.rotate(self.rotary, query, key, self.implementation, places)
            out = _flax.attend(query, key, value, bias, mask, cu_seqlens, seq_lengths, options)
        else:
            qkv = self._project_packed(inputs_q, head_dim)
            qkv = _flax.rotate_packed(self.rotary, qkv, self.implementation, places)
            out = _flax.attend_packed(qkv, cu_seqlens, seq_lengths, options)
        return nn.DenseGeneral(
            self.out_features or inputs_q.shape[-1],
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            name="out",
            **self._common(),
        )(out)

    def _common(self) -> dict[str, Any]:
        return dict(
            use_bias=self.use_bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
        )

    def _project(self, inputs, num_kv_heads: int, head_dim: int) -> tuple[jax.Array, ...]:
        """Queries [*B, T, N, H], keys and values [*B, S, K, H], of one type."""
        project = functools.partial(
            nn.DenseGeneral,
            kernel_init=self.kernel_init,
            bias_init=self.bias_init,
            **self._common(),
        )
        query = project((self.num_heads, head_dim), name="query")(inputs[0])
        key = project((num_kv_heads, head_dim), name="key")(inputs[1])
        value = project((num_kv_heads, head_dim), name="value")(inputs[2])
        if self.normalize_qk:
            normalize = functools.partial(
                nn.LayerNorm, use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype
            )
            query = normalize(name="query_ln")(query)
            key = normalize(name="key_ln")(key)
        return promote_dtype(query, key, value, dtype=self.dtype)

    def _project_packed(self, inputs: jax.Array, head_dim: int) -> jax.Array:
        """The same parameters; [*B, T, 3, N, H]."""
        common = (self.use_bias, self.param_dtype, self.kernel_init, self.bias_init)
        parameters = []
        for name in ("query", "key", "value"):
            projection = _Projection(self.num_heads, head_dim, *common, name=name)
            parameters += projection(inputs.shape[-1])
        inputs, *parameters = promote_dtype(inputs, *parameters, dtype=self.dtype)
        return _flax.project_packed(inputs, parameters[::2], parameters[1::2])


def attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: nn.Module | None = None,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    *,
    is_causal: bool = False,
    causal_offset: int | str = 0,
    local_window_size: int | tuple[int, int] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The fused attention as the `attention_fn` of Flax's own `nn.MultiHeadDotProductAttention`.

    The arguments before the star are those of `flax.linen.dot_product_attention`, with the same
    meaning, except that a query whose keys are all masked gives zeros. Those after it are
    jax_flash's own, for `functools.partial`::

      layer = nn.MultiHeadDotProductAttention(
          num_heads=8, attention_fn=functools.partial(attention_fn, is_causal=True))

    Args:
      query, key, value: [*B, T, N, H], [*B, S, K, H], [*B, S, K, Hv]; K divides N.
      bias: added to the logits; broadcastable to [*B, N, T, S].
      mask: not zero where a query sees a key; broadcastable to [*B, N, T, S].
      broadcast_dropout: must be False where dropout applies (Flax's default is True).
      dropout_rng: JAX key, needed where dropout_rate > 0 and not deterministic.
      dropout_rate: in [0, 1). Default 0.
      deterministic: True switches dropout off. Default False.
      dtype: the arrays are cast to it first. Default None: promoted among themselves.
      precision: None, a `jax.lax.Precision` or its name; met by all, products accumulate in f32.
      module: must be None: no weights to sow.
      force_fp32_for_softmax: always so, whatever it says.
      einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: must be None.
      is_causal, causal_offset, local_window_size, scale, implementation: as in
        `FlashSelfAttention`.

    Returns:
      [*B, T, N, Hv].

    Raises:
      ValueError: an argument that a fused kernel cannot honour, named in the message.
    """
    query, key, value = promote_dtype(query, key, value, dtype=dtype)
    return _flax.flax_attention(
        query,
        key,
        value,
        bias,
        mask,
        broadcast_dropout=broadcast_dropout,
        dropout_rng=dropout_rng,
        dropout_rate=dropout_rate,
        deterministic=deterministic,
        precision=precision,
        refused=dict(
            module=module,
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        ),
        is_causal=is_causal,
        causal_offset=causal_offset,
        local_window_size=local_window_size,
        scale=scale,
        implementation=implementation,
    )
