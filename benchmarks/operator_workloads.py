"""The named workloads of the fused operators: shapes, random data, and what a call must move or do.

Names read `operator/what/...`. Bytes are the fewest that the operator can move: each operand read
once, each result written once. The backward reads what the forward must have saved for it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.providers import DIRECTIONS, _draw

SMOOTHING, DROPOUT, SCALE, EPSILON = 0.1, 0.1, 0.125, 1e-6


@dataclasses.dataclass(frozen=True)
class Data:
    """Operands of one call: `primals` are differentiated, `constants` follow them."""

    primals: tuple[Any, ...]
    constants: tuple[Any, ...]
    cotangent: Any  # of the call's result or results


@dataclasses.dataclass(frozen=True)
class Workload:
    """One operator at one size.

    shape: norm [rows, width]; cross_entropy [rows, vocabulary]; linear_cross_entropy [rows, width,
    vocabulary]; softmax [batch, heads, rows, columns]; rotary [batch, rows, heads, head dim] of
    queries and of keys, which may be packed with values; dense_gelu and mlp [rows, width, inner
    width].
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    dropout_rate: float = 0.0
    calls: int = 1  # in one launch, on arrays of their own: a short one would time the host

    @property
    def operator(self) -> str:
        return self.name.split("/")[0]

    @property
    def kind(self) -> str:
        """What stands second in the name: ln, masked, half, ..."""
        return self.name.split("/")[1]

    @property
    def is_packed(self) -> bool:
        """rotary: of queries and keys inside qkv."""
        return self.name.endswith("/packed")

    @property
    def in_place(self) -> tuple[str, ...]:
        """Directions that may write their result over an operand, which they then use up."""
        if self.is_packed:
            return DIRECTIONS
        return ("backward",) if self.operator in ("cross_entropy", "softmax") else ()

    def small(self) -> Workload:
        """The same call at a size for tests."""
        small = {
            "norm": (24, 136),
            "cross_entropy": (12, 101),
            "linear_cross_entropy": (12, 16, 67),
        }
        small |= {"softmax": (2, 3, 24, 40), "rotary": (2, 9, 3, 16)}
        shape = small.get(self.operator, (24, 16, 40))
        return dataclasses.replace(self, shape=shape, calls=min(self.calls, 2))

    def gigabytes(self, direction: str) -> float | None:
        """None where arithmetic, not memory, is what the operator waits for."""
        one = math.prod(self.shape) * jnp.dtype(self.dtype).itemsize
        mask = self.shape[0] * self.shape[-1] * self.shape[-2] if self.kind == "masked" else 0
        # norm: x, residual -> z, s; dz, ds, s -> dx, and the residual's gradient where it differs.
        # cross_entropy: logits; logits -> dlogits. softmax: scores, mask -> P; P, dP -> dscores.
        # rotary: q, k -> q, k; packed as well, as values stay where they are.
        counts = {
            "norm": (4 * one, (5 if self.dropout_rate else 4) * one),
            "cross_entropy": (one, 2 * one),
            "softmax": (2 * one + mask, 3 * one),
            "rotary": (4 * one, 4 * one),
        }
        return _of(direction, counts[self.operator], 1e9) if self.operator in counts else None

    def tflop(self, direction: str) -> float | None:
        """Of the products; what a backward computes again (logits, say) is not counted."""
        product = 2.0 * math.prod(self.shape)
        products = {"linear_cross_entropy": (1, 2), "dense_gelu": (1, 2), "mlp": (2, 4)}
        if self.operator not in products:
            return None
        return _of(direction, [product * count for count in products[self.operator]], 1e12)

    def data(self) -> Data:
        """Random, normal (weights of products with deviation 0.02)."""
        seeds = iter(jax.random.split(jax.random.key(math.prod(self.shape) % 99991), 12))

        def normal(*shape, dtype=self.dtype, scale=1.0):
            return _draw(next(seeds), shape, dtype) * jnp.asarray(scale, dtype)

        def labels(classes):
            return jax.random.randint(next(seeds), self.shape[:1], 0, classes, jnp.int32)

        if self.operator == "norm":
            x, residual, dz, ds = (normal(*self.shape) for _ in range(4))
            vectors = [normal(self.shape[1]) + 1, *([normal(self.shape[1])] * (self.kind == "ln"))]
            if self.dropout_rate:
                key = jax.random.key_data(jax.random.key(0))
                return Data((x, *vectors, residual), (key,), (dz, ds))
            return Data((x, *vectors), (residual,), (dz, ds))
        if self.operator == "cross_entropy":
            dloss = normal(self.shape[0], dtype="float32")
            return Data((normal(*self.shape),), (labels(self.shape[1]),), dloss)
        if self.operator == "linear_cross_entropy":
            rows, width, vocabulary = self.shape
            primals = normal(rows, width), normal(width, vocabulary, scale=0.02)
            return Data(primals, (labels(vocabulary),), normal(rows, dtype="float32"))
        if self.operator == "softmax":
            mask = (self.shape[0], 1, *self.shape[2:])  # True is masked
            masked = jax.random.bernoulli(next(seeds), 0.15, mask)
            constants = (masked,) if self.kind == "masked" else ()
            return Data((normal(*self.shape),), constants, normal(*self.shape))
        if self.operator == "rotary":
            frequencies = 10000.0 ** (-jnp.arange(0, self.shape[3], 2) / self.shape[3])
            angle = jnp.arange(self.shape[1])[:, None] * frequencies  # as the layer has them
            tables = jnp.cos(angle), jnp.sin(angle)
            if self.is_packed:
                qkv = self.shape[:2] + (3,) + self.shape[2:]
                return Data((normal(*qkv),), tables, normal(*qkv))
            arrays = [normal(*self.shape) for _ in range(4)]
            return Data(tuple(arrays[:2]), tables, tuple(arrays[2:]))
        rows, width, inner = self.shape
        layer = normal(rows, width), normal(width, inner, scale=0.02), normal(inner)
        if self.operator == "dense_gelu":
            return Data(layer, (), normal(rows, inner))
        return Data((*layer, normal(inner, width, scale=0.02), normal(width)), (), layer[0] * 1)


def _of(direction: str, forward_and_backward, unit: float) -> float:
    parts = dict(zip(DIRECTIONS, forward_and_backward, strict=False))
    return parts.get(direction, sum(forward_and_backward)) / unit


def _all() -> list[Workload]:
    found = []
    for width in (1024, 4096, 8192):
        for kind in ("ln", "rms"):
            for name, rate in (("", 0.0), ("/dropout", DROPOUT)):
                name, calls = f"norm/{kind}/{width}{name}", max(1, 8192 // width)
                found.append(Workload(name, (16384, width), dropout_rate=rate, calls=calls))
    for vocabulary in (32000, 50257, 128256):
        for dtype in ("bfloat16", "float32"):
            name = f"cross_entropy/{dtype.replace('float', 'f')}/{vocabulary}"
            found.append(Workload(name, (8192, vocabulary), dtype))
    found += [
        Workload(f"softmax/{kind}/2048", (4, 16, 2048, 2048)) for kind in ("masked", "causal")
    ]
    for kind in ("half", "interleaved"):
        for form in ("", "/packed"):
            found.append(Workload(f"rotary/{kind}/128{form}", (4, 4096, 32, 128), calls=2))
    found.append(Workload("linear_cross_entropy/bf16/128256", (8192, 4096, 128256)))
    found.append(Workload("dense_gelu/bf16/4096x16384", (16384, 4096, 16384)))
    found.append(Workload("mlp/bf16/4096x16384", (16384, 4096, 16384)))
    return found


WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in _all()}
