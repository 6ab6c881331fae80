"""Flax Linen layers on `jax_flash.dense` and `jax_flash.mlp`: y = act(x W + b) (W2 + b2)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import promote_dtype
from flax.linen.linear import default_kernel_init

from jax_flash._ops.dense import GATED
from jax_flash.dense import dense, mlp

__all__ = ["FusedDense", "FusedMLP"]

Initializer = jax.nn.initializers.Initializer


def _affine(layer: nn.Module, inputs: int, features: int) -> tuple[jax.Array, jax.Array | None]:
    """The parameters of Flax's Dense: kernel [inputs, features] and bias [features]."""
    shape, dtype = (inputs, features), layer.param_dtype
    kernel = layer.param("kernel", layer.kernel_init, shape, dtype)
    bias = layer.param("bias", layer.bias_init, shape[1:], dtype) if layer.use_bias else None
    return kernel, bias


class _Affine(nn.Module):
    """These parameters under a name of their own."""

    features: int
    use_bias: bool
    param_dtype: Any
    kernel_init: Initializer
    bias_init: Initializer

    @nn.compact
    def __call__(self, inputs: int) -> tuple[jax.Array, jax.Array | None]:
        return _affine(self, inputs, self.features)


class FusedDense(nn.Module, kw_only=True):
    """`jax_flash.dense` with the parameters of Flax's Dense.

    Attributes:
      features: columns of the result.
      use_bias: Default True.
      activation: "identity", "gelu_tanh", "gelu", "relu", "squared_relu", or gated "swiglu",
        "geglu", whose kernel has 2 * features columns, gate first. Default "identity".
      checkpoint_level: 2 computes the pre-activation again in the backward. Default 0.
      return_residual: the input comes back too, see `jax_flash.dense`. Default False.
      dtype: of the computation. Default None: that of inputs and parameters together.
      param_dtype, kernel_init, bias_init: as in Flax's Dense.
      implementation: None or "xla".
    """

    features: int
    use_bias: bool = True
    activation: str = "identity"
    checkpoint_level: int = 0
    return_residual: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = nn.initializers.zeros_init()
    implementation: str | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
        """[*B, D] -> [*B, features], or (that, inputs in the computation's type).

        Raises:
          ValueError: a bad attribute; the message names it.
        """
        features = 2 * self.features if self.activation in GATED else self.features
        kernel, bias = _affine(self, inputs.shape[-1], features)
        inputs, kernel, bias = promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        return dense(
            inputs,
            kernel,
            bias,
            activation=self.activation,
            checkpoint_level=self.checkpoint_level,
            return_residual=self.return_residual,
            implementation=self.implementation,
        )


class FusedMLP(nn.Module, kw_only=True):
    """`jax_flash.mlp`: a transformer's feed-forward block.

    Parameters: `fc1` and `fc2`, each with the kernel and bias of Flax's Dense.

    Attributes:
      hidden_features: columns between the two products. Default None: 4 D.
      out_features: columns of the result. Default None: D.
      use_bias: of both layers. Default True.
      activation: as in `FusedDense`. Default "gelu_tanh".
      checkpoint_level: 0, 1 or 2: what is saved for the backward, see `jax_flash.mlp`. Default 0.
      out_kernel_init: of fc2's kernel. Default None: kernel_init.
      return_residual, dtype, param_dtype, kernel_init, bias_init, implementation: as there.
    """

    hidden_features: int | None = None
    out_features: int | None = None
    use_bias: bool = True
    activation: str = "gelu_tanh"
    checkpoint_level: int = 0
    return_residual: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = default_kernel_init
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros_init()
    implementation: str | None = None

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
        """[*B, D] -> [*B, out_features], or (that, inputs in the computation's type).

        Raises:
          ValueError: a bad attribute; the message names it.
        """
        width = inputs.shape[-1]
        hidden = self.hidden_features or 4 * width
        columns = 2 * hidden if self.activation in GATED else hidden
        common = dict(
            use_bias=self.use_bias, param_dtype=self.param_dtype, bias_init=self.bias_init
        )
        fc1 = _Affine(columns, kernel_init=self.kernel_init, name="fc1", **common)
        out_init = self.out_kernel_init or self.kernel_init
        fc2 = _Affine(self.out_features or width, kernel_init=out_init, name="fc2", **common)
        (kernel1, bias1), (kernel2, bias2) = fc1(width), fc2(hidden)
        operands = promote_dtype(inputs, kernel1, bias1, kernel2, bias2, dtype=self.dtype)
        return mlp(
            *operands,
            activation=self.activation,
            checkpoint_level=self.checkpoint_level,
            return_residual=self.return_residual,
            implementation=self.implementation,
        )
