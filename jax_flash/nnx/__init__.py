"""Flax NNX layers on jax_flash's operators.

    attention   FlashSelfAttention, FlashCrossAttention, FlashBlocksparseAttention
    multihead   MultiHeadAttention, and attention_fn for Flax's own layers
    block       TransformerBlock
    dense       FusedDense, FusedMLP
    norm        RMSNorm, DropoutAddLayerNorm, DropoutAddRMSNorm
    rotary      RotaryEmbedding

Parameters are named, shaped and initialised as Flax's own, so that weights move between the two.
Needs Flax: `pip install "jax-flash[flax]"`; `import jax_flash` does not.
"""

try:
    import flax  # noqa: F401
except ImportError as error:
    raise ImportError(
        'jax_flash.nnx needs Flax, which is not installed: pip install "jax-flash[flax]"'
    ) from error

from jax_flash.nnx.attention import (
    FlashBlocksparseAttention,
    FlashCrossAttention,
    FlashSelfAttention,
)
from jax_flash.nnx.block import TransformerBlock
from jax_flash.nnx.dense import FusedDense, FusedMLP
from jax_flash.nnx.multihead import MultiHeadAttention, attention_fn
from jax_flash.nnx.norm import DropoutAddLayerNorm, DropoutAddRMSNorm, RMSNorm
from jax_flash.nnx.rotary import RotaryEmbedding

__all__ = [
    "DropoutAddLayerNorm",
    "DropoutAddRMSNorm",
    "FlashBlocksparseAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "FusedDense",
    "FusedMLP",
    "MultiHeadAttention",
    "RMSNorm",
    "RotaryEmbedding",
    "TransformerBlock",
    "attention_fn",
]
