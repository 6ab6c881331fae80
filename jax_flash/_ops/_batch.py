"""Leading batch axes, however many, as the three that the kernels know."""

from __future__ import annotations

import math

import jax.numpy as jnp

from jax_flash._ops._partition import BATCH, Signature

BATCH_DIMS = 3  # kBatchDims in csrc/common/batch.h


def batch_shape(signature: Signature, operands) -> tuple[int, ...]:
    """The full leading axes of a call."""
    leads = [
        x.shape[: len(x.shape) - len(axes) + 1]
        for x, axes in zip(operands, signature.operands, strict=True)
        if axes[:1] == (BATCH,)
    ]
    return jnp.broadcast_shapes(*leads)


def canonical(signature: Signature, operands):
    """Operands with exactly BATCH_DIMS batch axes, by reshapes that move nothing.

    Neighbouring batch axes that the same operands share become one. More kinds of sharing than the
    kernels have axes for (nested vmaps over ever different operands) are broadcast in memory.
    """
    batched = [axes[:1] == (BATCH,) for axes in signature.operands]
    tails = [
        x.shape[x.ndim - len(a) + 1 :] for x, a in zip(operands, signature.operands, strict=False)
    ]
    leads = [
        x.shape[: x.ndim - len(a) + 1] for x, a in zip(operands, signature.operands, strict=False)
    ]
    full = batch_shape(signature, operands)

    def groups_of(leads):
        groups: list[list[int]] = []
        patterns: list[tuple[bool, ...]] = []
        for axis, size in enumerate(full):
            if size == 1:
                continue
            pattern = tuple(b and lead[axis] == 1 for b, lead in zip(batched, leads, strict=False))
            if patterns and patterns[-1] == pattern:
                groups[-1].append(axis)
            else:
                groups.append([axis])
                patterns.append(pattern)
        return groups

    groups = groups_of(leads)
    if len(groups) > BATCH_DIMS:
        operands = [
            jnp.broadcast_to(x, (*full, *tail)) if b else x
            for x, b, tail in zip(operands, batched, tails, strict=False)
        ]
        leads = [full if b else lead for b, lead in zip(batched, leads, strict=False)]
        groups = groups_of(leads)
    padding = (1,) * (BATCH_DIMS - len(groups))

    def shape(lead):
        return padding + tuple(math.prod(lead[axis] for axis in group) for group in groups)

    canonical = [
        x.reshape(*shape(lead), *tail) if b else x
        for x, b, lead, tail in zip(operands, batched, leads, tails, strict=False)
    ]
    return canonical, full
