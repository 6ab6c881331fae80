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
from jax_flash.norm import dropout_add_layer_norm, dropout_add_rms_norm, layer_norm, rms_norm
from jax_flash.varlen import (
    varlen_attention,
    varlen_attention_kvpacked,
    varlen_attention_qkvpacked,
)

__version__ = "0.1.0"

_register.register_all()

__all__ = [
    "AttentionProbs",
    "attention",
    "attention_kvpacked",
    "attention_qkvpacked",
    "blocksparse_attention",
    "dropout_add_layer_norm",
    "dropout_add_rms_norm",
    "export_checks",
    "layer_norm",
    "rms_norm",
    "show_backends",
    "varlen_attention",
    "varlen_attention_kvpacked",
    "varlen_attention_qkvpacked",
]
