"""Exact attention, and the fused operators around it in a transformer, for JAX.

Flax layers are in `jax_flash.linen` and `jax_flash.nnx`.
"""

from jax_flash._attention import AttentionProbs
from jax_flash._ops import _register
from jax_flash.attention import (
    attention,
    attention_kvpacked,
    attention_qkvpacked,
    blocksparse_attention,
)
from jax_flash.backends import export_checks, show_backends
from jax_flash.cross_entropy import linear_softmax_cross_entropy, softmax_cross_entropy
from jax_flash.dense import (
    column_parallel_dense,
    dense,
    dense_gelu,
    mlp,
    row_parallel_dense,
)
from jax_flash.norm import dropout_add_layer_norm, dropout_add_rms_norm, layer_norm, rms_norm
from jax_flash.rotary import RotaryTable, apply_rotary, apply_rotary_qkvpacked
from jax_flash.softmax import (
    scaled_causal_softmax,
    scaled_masked_softmax,
    softmax_batch_per_block,
)
from jax_flash.varlen import (
    varlen_attention,
    varlen_attention_kvpacked,
    varlen_attention_qkvpacked,
)

__version__ = "0.1.0"

_register.register_all()

__all__ = [
    "AttentionProbs",
    "RotaryTable",
    "apply_rotary",
    "apply_rotary_qkvpacked",
    "attention",
    "attention_kvpacked",
    "attention_qkvpacked",
    "blocksparse_attention",
    "column_parallel_dense",
    "dense",
    "dense_gelu",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "export_checks",
    "layer_norm",
    "linear_softmax_cross_entropy",
    "mlp",
    "rms_norm",
    "row_parallel_dense",
    "scaled_causal_softmax",
    "scaled_masked_softmax",
    "show_backends",
    "softmax_batch_per_block",
    "softmax_cross_entropy",
    "varlen_attention",
    "varlen_attention_kvpacked",
    "varlen_attention_qkvpacked",
]
