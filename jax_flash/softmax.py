"""Softmax over scores that exist in memory, masked or causal.

    P = softmax(scale * S over the keys that a row sees),  dS = scale * P * (dP - rowsum(dP * P))

For programs that hold their scores; `attention` never stores them. The operators are those of
Megatron-LM (Shoeybi et al., arXiv:1909.08053), which FlashAttention carries as `fused_softmax`,
here for rows of any number and length. The sum of a row is taken as in Milakov and Gimelshein,
arXiv:1805.02867: around its largest score, in float32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jax_flash import _attention as shared
from jax_flash._ops import softmax as ops
from jax_flash._ops._op import vary_together
from jax_flash._ops.softmax import SoftmaxConfig, softmax_backward, softmax_forward
from jax_flash.attention import Implementation, _documented

_SOFTMAX_OPTIONS = """scale: factor on the scores, a Python float.
      implementation: None picks by platform when the program is lowered: "cuda", kernels for NVIDIA
        GPUs, or else "xla", compiled from jnp. Naming one that is not there raises."""


# The custom VJP ----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _softmax(config: SoftmaxConfig, scores, mask, row_ids):
    return softmax_forward(config, scores, mask, row_ids)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradient(config: SoftmaxConfig, probs, dprobs, row_ids):
    return softmax_backward(config, probs, dprobs, row_ids)[0]


def _softmax_forward(config, scores, mask, row_ids):
    # Through `_softmax` itself, so that the residual can be differentiated once more.
    probs = checkpoint_name(_softmax(config, scores, mask, row_ids), "softmax_probs")
    return probs, (probs, row_ids)


def _softmax_backward(config, residuals, dprobs):
    probs, row_ids = residuals
    return _gradient(config, probs, dprobs, row_ids), None, None


def _gradient_forward(config, *operands):
    return _gradient(config, *operands), operands


def _gradient_backward(config, operands, cotangent):
    # The second derivative: of the backward's own formula, in XLA.
    probs, dprobs, row_ids = operands
    _, pullback = jax.vjp(lambda *x: ops.backward(config, *x, row_ids)[0], probs, dprobs)
    return (*pullback(cotangent), None)


_softmax.defvjp(_softmax_forward, _softmax_backward)
_gradient.defvjp(_gradient_forward, _gradient_backward)


# The public calls --------------------------------------------------------------------------------


def _static_scale(scale: Any) -> float:
    if isinstance(scale, jax.core.Tracer) or not isinstance(scale, (int, float, np.number)):
        shared.refuse("scale", "a Python float (static)", type(scale).__name__, TypeError)
    return float(scale)


def _mask_operand(mask: Any, shape: tuple[int, ...]) -> jax.Array:
    """bool or uint8 [*B or 1, N or 1, T or 1, S], or the empty array: nothing is masked."""
    if mask is None:
        return jnp.zeros((0,), jnp.bool_)
    mask = jnp.asarray(mask)
    if mask.dtype not in (jnp.bool_, jnp.uint8):
        if not jnp.issubdtype(mask.dtype, jnp.integer):
            shared.refuse("mask", "a boolean (or 0/1 integer) array", mask.dtype, TypeError)
        mask = mask != 0
    fits = mask.ndim == len(shape) and mask.shape[-1] == shape[-1]
    if not fits or any(m not in (1, n) for m, n in zip(mask.shape, shape, strict=True)):
        expected = f"shape {shape}, with 1 on any axis but the last"
        shared.refuse("mask", expected, f"shape {mask.shape}")
    return mask


def _run(config: SoftmaxConfig, scores, mask, row_ids):
    if 0 in scores.shape:
        return jnp.zeros_like(scores)
    return _softmax(config, *vary_together(scores, mask, row_ids))


@_documented
def scaled_masked_softmax(
    scores: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float = 1.0,
    implementation: Implementation = None,
) -> jax.Array:
    """Softmax over the last axis of scale * scores, without what `mask` hides.

    A masked key has probability 0 exactly, whatever its score (NaN too), and so has a key whose
    score is -inf; a row that has no other keys is 0. A row that sees NaN or +inf is NaN in all keys
    that it sees. The gradient needs the probabilities alone: they are what is saved for it, as
    "softmax_probs" for the policies of `jax.checkpoint`. A key of probability 0 has gradient 0.

    Devices may share all axes but the last without a collective; a last axis that is cut over
    devices is gathered.

    Args:
      scores: [*B, N, T, S]; float32, bfloat16 or float16. At least two axes.
      mask: bool or integer, of as many axes, [*B, 1, T, S] or with 1 on any axis but the last:
        True or 1 is masked out (as in Megatron-LM; the opposite of `jax.nn`'s). None: no mask.
      {softmax_options}

    Returns:
      Probabilities [*B, N, T, S], of the scores' type. Sums are taken in float32.

    {raises}
    """
    shared.check_implementation(implementation, "softmax", ("cuda",))
    scores = shared.as_tensor("scores", scores, 2)
    config = SoftmaxConfig(_static_scale(scale), implementation)
    mask = _mask_operand(mask, scores.shape)
    return _run(config, scores, mask, jnp.zeros((0,), jnp.int32))


@_documented
def scaled_causal_softmax(
    scores: jax.Array,
    *,
    scale: float = 1.0,
    implementation: Implementation = None,
) -> jax.Array:
    """Softmax over the last axis of scale * scores, where row i sees the keys 0 .. i.

    The diagonal starts top left also where T != S, as in `attention`: rows beyond the last key see
    all keys. Scores above the diagonal are not looked at. Everything else is as in
    `scaled_masked_softmax`.

    Args:
      scores: [*B, T, S]; float32, bfloat16 or float16.
      {softmax_options}

    Returns:
      Probabilities [*B, T, S], of the scores' type, 0 above the diagonal.

    {raises}
    """
    shared.check_implementation(implementation, "softmax", ("cuda",))
    scores = shared.as_tensor("scores", scores, 2)
    shared.check_sizes(*scores.shape[-2:])
    config = SoftmaxConfig(_static_scale(scale), implementation)
    row_ids = jnp.arange(scores.shape[-2], dtype=jnp.int32)
    return _run(config, scores, jnp.zeros((0,), jnp.bool_), row_ids)


for _function in (scaled_masked_softmax, scaled_causal_softmax):
    _function.__doc__ = _function.__doc__.replace("{softmax_options}", _SOFTMAX_OPTIONS)


def softmax_batch_per_block(seq_q: int, seq_k: int, batch: int, heads: int) -> int:
    """How many rows one thread block of 128 took in Megatron-LM's softmax: 4, 8, and more below 32
    keys.

    Programs written for it ask before they choose the fused operator, whose number of rows had to
    be a multiple. The calls of this module take any number: nothing here depends on the answer.

    Args:
      seq_q, seq_k, batch, heads: sizes of the scores [batch, heads, seq_q, seq_k], positive ints.
        The answer depends on seq_k alone.

    Raises:
      ValueError: a size is not a positive int.
    """
    sizes = {"seq_q": seq_q, "seq_k": seq_k, "batch": batch, "heads": heads}
    for name, size in sizes.items():
        if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
            shared.refuse(name, "a positive int", repr(size))
    width = 1 << (int(seq_k) - 1).bit_length()  # a row is padded to a power of two
    rows_per_warp = 2 if width <= 128 else 1
    return 128 // min(width, 32) * rows_per_warp
