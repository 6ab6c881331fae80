"""Flax NNX layers on `jax_flash`'s norms: plain, and with the residual stream they end.

RMSNorm               z = rms_norm(x)
DropoutAddLayerNorm   s = residual + dropout(x * rowscale * layerscale), z = layer_norm(s)
DropoutAddRMSNorm     the same with rms_norm
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes

from jax_flash import _flax, norm

__all__ = ["DropoutAddLayerNorm", "DropoutAddRMSNorm", "RMSNorm"]

Initializer = jax.nn.initializers.Initializer
_ones, _zeros = nnx.initializers.ones, nnx.initializers.zeros


class RMSNorm(nnx.Module):
    """`jax_flash.rms_norm` with the parameters of Flax's RMSNorm: `scale` [D].

    Args:
      num_features: D.
      epsilon: added to the mean square. Default 1e-6, Flax's.
      dtype: of the result. Default None: that of input and parameter together, as in Flax.
      param_dtype, scale_init: of `scale`. Defaults float32, ones.
      implementation: None or "xla".
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        scale_init: Initializer = _ones,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.scale = nnx.Param(scale_init(rngs.params(), (num_features,), param_dtype))
        self.epsilon = epsilon
        self.dtype = dtype
        self.implementation = implementation

    def __call__(self, x: jax.Array) -> jax.Array:
        """[*R, D] -> [*R, D], computed in float32 and rounded once."""
        scale = self.scale[...]
        dtype = dtypes.canonicalize_dtype(x, scale, dtype=self.dtype)
        x = x.astype(jnp.promote_types(x.dtype, dtype))
        options = dict(epsilon=self.epsilon, implementation=self.implementation)
        return norm.rms_norm(x, scale.astype(jnp.float32), **options).astype(dtype)


class _DropoutAddNorm(nnx.Module):
    """Arguments of both layers.

    Args:
      num_features: D.
      epsilon: Default 1e-6.
      dropout_rate: of x, in [0, 1). Default 0.
      deterministic: True switches dropout off; it must come from here, from the call, or by
        train() and eval(), wherever dropout_rate > 0. Default None.
      prenorm: the stream s comes back too, for the next block to add to. Default False.
      residual_in_fp32: without a residual, the stream is float32. Default False.
      layerscale_init: a factor of x on each column with this start, a parameter `layerscale` [D]
        (Touvron et al., "Going deeper with image transformers", 2021). Default None: none.
      use_bias: Default True (RMS: False).
      dtype: x is cast to it first, and z has it. Default None: x's own.
      param_dtype, scale_init, bias_init: Defaults float32, ones, zeros.
      implementation: None or "xla".
      rngs: for the parameters, and for dropout unless the call brings its own.
    """

    _has_bias = True
    _operator: Any = None

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dropout_rate: float = 0.0,
        deterministic: bool | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
        layerscale_init: float | None = None,
        use_bias: bool | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        scale_init: Initializer = _ones,
        bias_init: Initializer = _zeros,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        _flax.check_rate(dropout_rate)
        shape = (num_features,)
        self.scale = nnx.Param(scale_init(rngs.params(), shape, param_dtype))
        self.bias = self.layerscale = nnx.data(None)
        if self._has_bias if use_bias is None else use_bias:
            self.bias = nnx.Param(bias_init(rngs.params(), shape, param_dtype))
        if layerscale_init is not None:
            self.layerscale = nnx.Param(jnp.full(shape, layerscale_init, param_dtype))
        self.epsilon = epsilon
        self.dropout_rate = dropout_rate
        self.deterministic = deterministic
        self.prenorm = prenorm
        self.residual_in_fp32 = residual_in_fp32
        self.dtype = dtype
        self.implementation = implementation
        # A stream of its own, as in Flax's layers: nnx.split and nnx.jit then see no shared state.
        self.rngs: nnx.RngStream | None = nnx.data(None)
        if dropout_rate > 0.0:
            self.rngs = rngs.dropout.fork()

    def set_view(self, deterministic: bool | None = None):
        """What `nnx.view` calls.

        Args:
          deterministic: if True, switches dropout off.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def __call__(
        self,
        x: jax.Array,
        residual: jax.Array | None = None,
        *,
        x1: jax.Array | None = None,
        rowscale: jax.Array | float | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Adds to the stream and normalises it.

        Args:
          x: [*R, D], what a block computed.
          residual: [*R, D], the stream before it, float32 or x's dtype; None: x begins it.
          x1: [*R, D], a second branch, which a parallel TransformerBlock returns beside x.
          rowscale: a float or [*R], such as drop path's 0 or 1 / (1 - rate).
          deterministic, rngs: override the constructor's where not None.

        Returns:
          z [*R, D], or (z, s) with prenorm.
        """
        key = None
        if self.dropout_rate > 0.0 and not nnx.module.first_from(
            deterministic,
            self.deterministic,
            error_msg="deterministic: expected True or False where dropout_rate > 0 (in the "
            "constructor, at the call, or by train() and eval()), got None",
        ):
            stream = self.rngs if rngs is None else rngs
            key = (stream.dropout if isinstance(stream, nnx.Rngs) else stream)()
        scale, bias, factor = _flax.in_float32(
            *(None if p is None else p[...] for p in (self.scale, self.bias, self.layerscale))
        )
        return type(self)._operator(
            x if self.dtype is None else x.astype(self.dtype),
            residual,
            scale,
            bias,
            layerscale=factor,
            x1=x1,
            rowscale=rowscale,
            epsilon=self.epsilon,
            dropout_rate=0.0 if key is None else self.dropout_rate,
            dropout_key=key,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
            implementation=self.implementation,
        )


class DropoutAddLayerNorm(_DropoutAddNorm):
    __doc__ = (
        "`jax_flash.dropout_add_layer_norm` as a layer; `scale` and `bias` as Flax's.\n"
        + (_DropoutAddNorm.__doc__.partition("\n")[2])
    )
    _operator = staticmethod(norm.dropout_add_layer_norm)


class DropoutAddRMSNorm(_DropoutAddNorm):
    __doc__ = (
        "`jax_flash.dropout_add_rms_norm` as a layer; `scale` as Flax's.\n"
        + (_DropoutAddNorm.__doc__.partition("\n")[2])
    )
    _has_bias = False
    _operator = staticmethod(norm.dropout_add_rms_norm)
