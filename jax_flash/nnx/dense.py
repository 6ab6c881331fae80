"""Flax NNX layers on `jax_flash.dense` and `jax_flash.mlp`: y = act(x W + b) (W2 + b2)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn import dtypes
from flax.nnx.nn.linear import default_bias_init, default_kernel_init

from jax_flash._ops.dense import GATED
from jax_flash.dense import dense, mlp

__all__ = ["FusedDense", "FusedMLP"]

Initializer = jax.nn.initializers.Initializer


class FusedDense(nnx.Linear):
    """`jax_flash.dense` as a Flax layer: nnx.Linear with an activation.

    Args:
      in_features: D, columns of the input.
      out_features: columns of the result.
      activation: "identity", "gelu_tanh", "gelu", "relu", "squared_relu", or gated "swiglu",
        "geglu", whose kernel has 2 * out_features columns, gate first. Default "identity".
      checkpoint_level: 2 computes the pre-activation again in the backward. Default 0.
      return_residual: the input comes back too, see `jax_flash.dense`. Default False.
      use_bias, dtype, param_dtype, kernel_init, bias_init, rngs: as in nnx.Linear.
      implementation: None or "xla".
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        activation: str = "identity",
        checkpoint_level: int = 0,
        return_residual: bool = False,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features,
            2 * out_features if activation in GATED else out_features,
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )
        self.activation = activation
        self.checkpoint_level = checkpoint_level
        self.return_residual = return_residual
        self.implementation = implementation

    def __call__(self, inputs: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
        """[*B, in_features] -> [*B, out_features], or (that, inputs in the computation's type).

        Raises:
          ValueError: inputs or an option that do not fit; the message names the argument.
        """
        x, kernel, bias = _promoted(inputs, self, dtype=self.dtype)
        return dense(
            x,
            kernel,
            bias,
            activation=self.activation,
            checkpoint_level=self.checkpoint_level,
            return_residual=self.return_residual,
            implementation=self.implementation,
        )


class FusedMLP(nnx.Module):
    """`jax_flash.mlp` as a Flax layer: a transformer's feed-forward block.

    Its parameters are those of two nnx.Linear, `fc1` and `fc2`.

    Args:
      in_features: D, columns of the input.
      hidden_features: columns between the two products. Default None: 4 D.
      out_features: columns of the result. Default None: D.
      activation: as in `FusedDense`. Default "gelu_tanh".
      checkpoint_level: 0, 1 or 2: what is saved for the backward, see `jax_flash.mlp`. Default 0.
      return_residual: the input comes back too. Default False.
      out_kernel_init: of fc2's kernel. Default None: kernel_init.
      use_bias, dtype, param_dtype, kernel_init, bias_init, rngs: as in nnx.Linear, of both layers.
      implementation: None or "xla".
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        *,
        activation: str = "gelu_tanh",
        checkpoint_level: int = 0,
        return_residual: bool = False,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        out_kernel_init: Initializer | None = None,
        bias_init: Initializer = default_bias_init,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        hidden = hidden_features or 4 * in_features
        options = dict(
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            bias_init=bias_init,
            rngs=rngs,
        )
        columns = 2 * hidden if activation in GATED else hidden
        self.fc1 = nnx.Linear(in_features, columns, kernel_init=kernel_init, **options)
        self.fc2 = nnx.Linear(
            hidden,
            out_features or in_features,
            kernel_init=out_kernel_init or kernel_init,
            **options,
        )
        self.activation = activation
        self.checkpoint_level = checkpoint_level
        self.return_residual = return_residual
        self.dtype = dtype
        self.implementation = implementation

    def __call__(self, inputs: jax.Array) -> jax.Array | tuple[jax.Array, jax.Array]:
        """[*B, in_features] -> [*B, out_features], or (that, inputs in the computation's type).

        Raises:
          ValueError: inputs or an option that do not fit; the message names the argument.
        """
        return mlp(
            *_promoted(inputs, self.fc1, self.fc2, dtype=self.dtype),
            activation=self.activation,
            checkpoint_level=self.checkpoint_level,
            return_residual=self.return_residual,
            implementation=self.implementation,
        )


def _promoted(inputs: jax.Array, *layers: nnx.Linear, dtype: Any) -> tuple:
    """Inputs and every layer's kernel and bias, in the type they are computed in."""
    parameters = []
    for layer in layers:
        parameters += [layer.kernel[...], None if layer.bias is None else layer.bias[...]]
    return dtypes.promote_dtype((inputs, *parameters), dtype=dtype)
