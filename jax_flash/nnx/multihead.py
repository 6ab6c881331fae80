"""Flax NNX's own attention layer on `jax_flash.attention`.

    MultiHeadAttention: Flax's, with windows and lengths
    attention_fn: for Flax's own nnx.MultiHeadAttention

`MultiHeadAttention` names and initialises its parameters exactly as Flax's does, so that weights
move between the two.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_kernel_init

from jax_flash import _flax
from jax_flash.nnx.attention import RandomSource, _FlashLayer

__all__ = ["MultiHeadAttention", "attention_fn"]

Initializer = jax.nn.initializers.Initializer


class _Constant:
    """Holds arrays that are no part of a layer's state: NNX does not look inside."""

    def __init__(self, value: Any):
        self.value = value


class MultiHeadAttention(_FlashLayer):
    """Multi-head attention with projections: Flax's layer on the fused kernels.

    Q, K, V = inputs W + b per head, O = attention(Q, K, V), out = O W_out + b_out. Parameters are
    those of `flax.nnx.MultiHeadAttention`, by name, shape, dtype and initial value: query.kernel
    [D, N, H], key.kernel and value.kernel [D, K, H], out.kernel [N, H, D_out], and their biases,
    with K = num_kv_heads. Unlike Flax's, a query that sees no key gives zeros, not the mean of all
    values, and dropout is drawn for each batch entry and head (Flax's broadcast_dropout=False).

    Example::

      layer = MultiHeadAttention(8, 512, num_kv_heads=2, is_causal=True, rngs=nnx.Rngs(0))
      out = layer(x)

    Args:
      num_heads: query heads, N.
      in_features: features of inputs_q, D.
      qkv_features: N * H. Default None: in_features.
      out_features: features of the result. Default None: in_features.
      num_kv_heads: key/value heads, K, a divisor of num_heads. Default None: num_heads.
      in_kv_features: features of inputs_k and inputs_v. Default None: in_features.
      use_bias: whether the four projections add a bias. Default True.
      normalize_qk: LayerNorm (scale only) of each head's queries and keys. Default False.
      rotary: a `jax_flash.RotaryTable` or a `RotaryEmbedding` layer, which turns queries and keys.
        Default None.
      dtype: of the computation. Default None: promoted from inputs and parameters.
      param_dtype: of the parameters. Default float32.
      precision: of the projections' products, as in `jax.lax.dot_general`. Default None.
      kernel_init, bias_init: initialisers. Default Flax's: LeCun normal, zeros.
      out_kernel_init, out_bias_init: of the last projection. Default None: the same.
      rngs: the parameters' and the dropout's randomness.
      The rest: those of `FlashSelfAttention`.

    Raises:
      ValueError: num_kv_heads no divisor of num_heads, qkv_features no multiple of it, or a bad
        dropout_rate; the message names the argument.
    """

    def __init__(
        self,
        num_heads: int,
        in_features: int,
        qkv_features: int | None = None,
        out_features: int | None = None,
        num_kv_heads: int | None = None,
        in_kv_features: int | None = None,
        *,
        use_bias: bool = True,
        normalize_qk: bool = False,
        rotary: Any = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: Any = None,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = jax.nn.initializers.zeros,
        out_bias_init: Initializer | None = None,
        rngs: nnx.Rngs,
        **options,
    ):
        super().__init__(**options)
        self.num_heads = num_heads
        self.in_features = in_features
        self.qkv_features = in_features if qkv_features is None else qkv_features
        self.out_features = in_features if out_features is None else out_features
        self.in_kv_features = in_features if in_kv_features is None else in_kv_features
        self.num_kv_heads, self.head_dim = _flax.check_heads(
            num_heads, num_kv_heads, self.qkv_features
        )
        _flax.check_rotary(rotary, self.head_dim, None, None)
        self.rotary = rotary if isinstance(rotary, nnx.Module) else _Constant(rotary)
        self.dtype = dtype
        self.precision = precision

        common = dict(
            use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, precision=precision, rngs=rngs
        )
        project = functools.partial(
            nnx.LinearGeneral, kernel_init=kernel_init, bias_init=bias_init, **common
        )
        # The order is Flax's, to the dropout stream at the end: it decides which key initialises
        # which parameter.
        self.query = project(self.in_features, (num_heads, self.head_dim))
        self.key = project(self.in_kv_features, (self.num_kv_heads, self.head_dim))
        self.value = project(self.in_kv_features, (self.num_kv_heads, self.head_dim))
        self.query_ln: nnx.LayerNorm | None = nnx.data(None)
        self.key_ln: nnx.LayerNorm | None = nnx.data(None)
        if normalize_qk:
            normalize = functools.partial(
                nnx.LayerNorm, self.head_dim, use_bias=False, dtype=dtype, param_dtype=param_dtype
            )
            self.query_ln = normalize(rngs=rngs)
            self.key_ln = normalize(rngs=rngs)
        self.out = nnx.LinearGeneral(
            (num_heads, self.head_dim),
            self.out_features,
            axis=(-2, -1),
            kernel_init=out_kernel_init or kernel_init,
            bias_init=out_bias_init or bias_init,
            **common,
        )
        self._keep_stream(rngs)

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
        rngs: RandomSource | None = None,
    ) -> jax.Array:
        """Projects, attends, projects back.

        Self-attention with as many kv heads as query heads is projected by one product and read
        where it lies, unless bias, mask, precision or normalize_qk ask for the parts.

        Args:
          inputs_q: [*B, T, in_features].
          inputs_k: [*B, S, in_kv_features]. Default None: inputs_q, that is self-attention.
          inputs_v: [*B, S, in_kv_features]. Default None: inputs_k.
          bias: added to the logits; broadcastable to [*B, N, T, S].
          mask: True, or not zero, where a query sees a key; broadcastable to [*B, N, T, S]. A
            causal, windowed or padded pattern is faster said by is_causal, local_window_size and
            the lengths.
          query_seq_lengths: int32 [*B]; query rows from there on attend to nothing.
          key_value_seq_lengths: int32 [*B]; keys from there on are not seen.
          cu_seqlens: int32 [n + 1] or [*B, n + 1]: self-attention within each of n concatenated
            sequences, T their total. Not together with inputs_k, masks and lengths.
          positions, offsets: for rotary: where the rows stand, as in `jax_flash.apply_rotary`.
          is_causal, deterministic, rngs: override the constructor's where not None.

        Returns:
          [*B, T, out_features].

        Raises:
          ValueError: inputs that do not fit each other or the layer, or dropout with no
            `deterministic` or no `rngs` anywhere; the message names the argument.
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
        for name, array, features in (
            ("inputs_q", inputs_q, self.in_features),
            ("inputs_k", inputs_k, self.in_kv_features),
            ("inputs_v", inputs_v, self.in_kv_features),
        ):
            if array.shape[-1] != features:
                raise ValueError(
                    f"{name}: expected {features} features, got shape {list(array.shape)}"
                )
        rotary = self.rotary.value if isinstance(self.rotary, _Constant) else self.rotary
        _flax.check_rotary(rotary, self.head_dim, positions, offsets)
        places = dict(positions=positions, offsets=offsets, cu_seqlens=cu_seqlens)
        options = self._options(is_causal, deterministic, rngs)
        if in_parts or self.query_ln is not None or self.num_kv_heads != self.num_heads:
            query, key, value = self.query(inputs_q), self.key(inputs_k), self.value(inputs_v)
            if self.query_ln is not None:
                query, key = self.query_ln(query), self.key_ln(key)
            query, key, value = dtypes.promote_dtype((query, key, value), dtype=self.dtype)
            query, key = _flax.rotate(rotary, query, key, self.implementation, places)
            out = _flax.attend(query, key, value, bias, mask, cu_seqlens, seq_lengths, options)
        else:
            qkv = self._project_packed(inputs_q)
            qkv = _flax.rotate_packed(rotary, qkv, self.implementation, places)
            out = _flax.attend_packed(qkv, cu_seqlens, seq_lengths, options)
        return self.out(out)

    def _project_packed(self, inputs: jax.Array) -> jax.Array:
        """Queries, keys and values by one product: [*B, T, 3, N, H]."""
        layers = (self.query, self.key, self.value)
        kernels = (layer.kernel[...] for layer in layers)
        biases = (None if layer.bias is None else layer.bias[...] for layer in layers)
        inputs, *parameters = dtypes.promote_dtype((inputs, *kernels, *biases), dtype=self.dtype)
        return _flax.project_packed(inputs, parameters[:3], parameters[3:])


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
    module: nnx.Module | None = None,
    promote_dtype: Callable[..., Any] = dtypes.promote_dtype,
    is_causal: bool = False,
    input_positions: jax.Array | None = None,
    *,
    causal_offset: int | str = 0,
    local_window_size: int | tuple[int, int] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The fused attention as the `attention_fn` of Flax's own `nnx.MultiHeadAttention`.

    The arguments before the star are those that Flax passes to its
    `flax.nnx.dot_product_attention`, with the same meaning, except that a query whose keys are all
    masked gives zeros. Those after it are jax_flash's own, for `functools.partial`::

      layer = nnx.MultiHeadAttention(8, 512, decode=False, rngs=rngs, attention_fn=attention_fn)
      out = layer(x, is_causal=True)

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
      promote_dtype: does the casting: ((query, key, value), dtype=dtype) -> three arrays.
      is_causal: query i sees key j only where j <= i. Default False.
      input_positions: must be None: rotary embedding is not applied here.
      causal_offset, local_window_size, scale, implementation: as in `FlashSelfAttention`.

    Returns:
      [*B, T, N, Hv].

    Raises:
      ValueError: an argument that a fused kernel cannot honour, named in the message.
    """
    query, key, value = promote_dtype((query, key, value), dtype=dtype)
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
        refused=dict(module=module, input_positions=input_positions),
        is_causal=is_causal,
        causal_offset=causal_offset,
        local_window_size=local_window_size,
        scale=scale,
        implementation=implementation,
    )
