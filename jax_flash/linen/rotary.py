"""A Flax Linen layer on `jax_flash.apply_rotary`."""

from flax import linen as nn

from jax_flash import _flax

__all__ = ["RotaryEmbedding"]


class RotaryEmbedding(_flax.RotaryCalls, nn.Module, kw_only=True):
    """Rotary position embedding (Su et al., "RoFormer", 2021) as a layer, without parameters.

    `jax_flash.apply_rotary`, with the table made from these numbers once a process.

    Attributes:
      dim: how many elements of a head are turned, from the first on; even.
      base: of the frequencies. Default 10000.
      scale_base: xPos (Sun et al., "A length-extrapolatable transformer", 2022); 512 is usual.
        Default None: no scale.
      interleaved: pairs are (2 j, 2 j + 1) (GPT-J), not (j, j + dim / 2) (GPT-NeoX). Default False.
      max_length: number of positions. Default None: the rows of each call, at positions 0, 1, ...
      implementation: None or "xla".
    """

    dim: int
    base: float = 10000.0
    scale_base: float | None = None
    interleaved: bool = False
    max_length: int | None = None
    implementation: str | None = None
