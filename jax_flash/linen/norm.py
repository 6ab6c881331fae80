"""Flax Linen layers on `jax_flash`'s norms: plain, and with the residual stream they end.

RMSNorm               z = rms_norm(x)
DropoutAddLayerNorm   s = residual + dropout(x * rowscale * layerscale), z = layer_norm(s)
DropoutAddRMSNorm     the same with rms_norm
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype

from jax_flash import _flax, norm

__all__ = ["DropoutAddLayerNorm", "DropoutAddRMSNorm", "RMSNorm"]

Initializer = jax.nn.initializers.Initializer


class RMSNorm(nn.Module, kw_only=True):
    """`jax_flash.rms_norm` with the parameters of Flax's RMSNorm: `scale` [D].

    Attributes:
      epsilon: added to the mean square. Default 1e-6, Flax's.
      dtype: of the result. Default None: that of input and parameter together, as in Flax.
      param_dtype, scale_init: of `scale`. Defaults float32, ones.
      implementation: None or "xla".
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    scale_init: Initializer = nn.initializers.ones
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[*R, D] -> [*R, D], computed in float32 and rounded once."""
        scale = self.param("scale", self.scale_init, (x.shape[-1],), self.param_dtype)
        dtype = canonicalize_dtype(x, scale, dtype=self.dtype)
        x = x.astype(jnp.promote_types(x.dtype, dtype))
        options = dict(epsilon=self.epsilon, implementation=self.implementation)
        return norm.rms_norm(x, scale.astype(jnp.float32), **options).astype(dtype)


class _DropoutAddNorm(nn.Module, kw_only=True):
    """Attributes of both layers.

    Attributes:
      epsilon: Default 1e-6.
      dropout_rate: of x, in [0, 1). Default 0.
      deterministic: True switches dropout off; it must come from here or from the call, not both,
        wherever dropout_rate > 0. Default None.
      prenorm: the stream s comes back too, for the next block to add to. Default False.
      residual_in_fp32: without a residual, the stream is float32. Default False.
      layerscale_init: a factor of x on each column with this start, a parameter `layerscale` [D]
        (Touvron et al., "Going deeper with image transformers", 2021). Default None: none.
      use_bias: Default True (RMS: False).
      dtype: x is cast to it first, and z has it. Default None: x's own.
      param_dtype, scale_init, bias_init: Defaults float32, ones, zeros.
      implementation: None or "xla".
    """

    epsilon: float = 1e-6
    dropout_rate: float = 0.0
    deterministic: bool | None = None
    prenorm: bool = False
    residual_in_fp32: bool = False
    layerscale_init: float | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    scale_init: Initializer = nn.initializers.ones
    bias_init: Initializer = nn.initializers.zeros
    implementation: str | None = None

    def _operator(self):
        raise NotImplementedError

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        residual: jax.Array | None = None,
        *,
        x1: jax.Array | None = None,
        rowscale: jax.Array | float | None = None,
        deterministic: bool | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Adds to the stream and normalises it.

        Args:
          x: [*R, D], what a block computed.
          residual: [*R, D], the stream before it, float32 or x's dtype; None: x begins it.
          x1: [*R, D], a second branch, which a parallel TransformerBlock returns beside x.
          rowscale: a float or [*R], such as drop path's 0 or 1 / (1 - rate).
          deterministic: see the attribute.
          dropout_rng: a key, instead of the stream "dropout".

        Returns:
          z [*R, D], or (z, s) with prenorm.
        """
        _flax.check_rate(self.dropout_rate)
        dropping = self.dropout_rate > 0.0 and not nn.merge_param(
            "deterministic", self.deterministic, deterministic
        )
        if dropping and dropout_rng is None:
            dropout_rng = self.make_rng("dropout")
        x = x if self.dtype is None else x.astype(self.dtype)
        width, dtype = (x.shape[-1],), self.param_dtype
        scale = self.param("scale", self.scale_init, width, dtype)
        bias = self.param("bias", self.bias_init, width, dtype) if self.use_bias else None
        factor = None
        if self.layerscale_init is not None:
            constant = nn.initializers.constant(self.layerscale_init)
            factor = self.param("layerscale", constant, width, dtype)
        return self._operator()(
            x,
            residual,
            *_flax.in_float32(scale, bias),
            layerscale=_flax.in_float32(factor)[0],
            x1=x1,
            rowscale=rowscale,
            epsilon=self.epsilon,
            dropout_rate=self.dropout_rate if dropping else 0.0,
            dropout_key=dropout_rng if dropping else None,
            prenorm=self.prenorm,
            residual_in_fp32=self.residual_in_fp32,
            implementation=self.implementation,
        )


class DropoutAddLayerNorm(_DropoutAddNorm, kw_only=True):
    __doc__ = (
        "`jax_flash.dropout_add_layer_norm` as a layer; `scale` and `bias` as Flax's.\n"
        + (_DropoutAddNorm.__doc__.partition("\n")[2])
    )

    def _operator(self):
        return norm.dropout_add_layer_norm


class DropoutAddRMSNorm(_DropoutAddNorm, kw_only=True):
    __doc__ = (
        "`jax_flash.dropout_add_rms_norm` as a layer; `scale` as Flax's.\n"
        + (_DropoutAddNorm.__doc__.partition("\n")[2])
    )

    use_bias: bool = False

    def _operator(self):
        return norm.dropout_add_rms_norm
