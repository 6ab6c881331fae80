"""A Flax NNX layer on `jax_flash.apply_rotary`."""

from flax import nnx

from jax_flash import _flax

__all__ = ["RotaryEmbedding"]


class RotaryEmbedding(_flax.RotaryCalls, nnx.Module):
    """Rotary position embedding (Su et al., "RoFormer", 2021) as a layer, without parameters.

    `jax_flash.apply_rotary`, with the table made from these numbers once a process.

    Args:
      dim: how many elements of a head are turned, from the first on; even.
      base: of the frequencies. Default 10000.
      scale_base: xPos (Sun et al., "A length-extrapolatable transformer", 2022); 512 is usual.
        Default None: no scale.
      interleaved: pairs are (2 j, 2 j + 1) (GPT-J), not (j, j + dim / 2) (GPT-NeoX). Default False.
      max_length: number of positions. Default None: the rows of each call, at positions 0, 1, ...
      implementation: None or "xla".
    """

    def __init__(
        self,
        dim: int,
        *,
        base: float = 10000.0,
        scale_base: float | None = None,
        interleaved: bool = False,
        max_length: int | None = None,
        implementation: str | None = None,
    ):
        self.dim = dim
        self.base = base
        self.scale_base = scale_base
        self.interleaved = interleaved
        self.max_length = max_length
        self.implementation = implementation
