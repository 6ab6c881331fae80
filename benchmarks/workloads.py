"""The named workloads: one list feeds the benchmarks, the tests and the README.

A workload is a shape and a set of options, without data and without a library. Names read
`group/what/...`; `select("grid/h128/*")` picks by shell pattern. The grid has 16384 tokens and a
hidden size of 2048 (batch * sequence, heads * head_dim), the setting in which the FlashAttention
papers report; TFLOP/s count 4 * H operations for a visited (query, key) pair and head, half of the
square where attention is causal, and 2.5 times as much for the backward.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from typing import Any

import numpy as np

TOKENS = 16384
HIDDEN = 2048


@dataclasses.dataclass(frozen=True)
class Workload:
    """One attention call. `lengths` makes it a packed (varlen) one, whose batch is 1."""

    name: str
    batch: int
    seq: int  # queries and keys; varlen: sum(lengths)
    heads: int
    head_dim: int
    dtype: str = "bfloat16"
    kv_heads: int | None = None  # None: heads
    is_causal: bool = False
    window: tuple[int, int] | None = None  # keys to the left and right of the query
    dropout_rate: float = 0.0
    lengths: tuple[int, ...] | None = None
    block_density: float | None = None  # share of the blocks that exist
    block_size: tuple[int, int] = (128, 128)
    deterministic: bool = False

    @property
    def group(self) -> str:
        return self.name.split("/")[0]

    @property
    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    def pairs(self) -> float:
        """Visited (query, key) pairs of one head, all batch entries together."""
        if self.lengths is not None:
            return sum(n * n for n in self.lengths) * (0.5 if self.is_causal else 1.0)
        if self.window is not None:
            row = np.arange(self.seq)
            left, right = self.window
            right = 0 if self.is_causal else right
            first, last = np.maximum(row - left, 0), np.minimum(row + right, self.seq - 1)
            return float(self.batch * (last - first + 1).sum())
        square = self.batch * self.seq * self.seq * (0.5 if self.is_causal else 1.0)
        return square if self.block_density is None else square * self.block_mask().mean()

    def twin(self) -> Workload | None:
        """The dense call of the grid that an option is compared with; None: it has none.

        Ragged sequences: the grid's length next to the mean length that a FLOP sees.
        """
        seq = self.seq
        if self.lengths is not None:
            lengths = np.array(self.lengths, np.float64)
            typical = (lengths**3).sum() / (lengths**2).sum()
            seq = 1 << round(math.log2(typical))
        mask = "causal" if self.is_causal else "full"
        found = WORKLOADS.get(f"grid/h{self.head_dim}/t{seq}/{mask}")
        return None if found is None or found is self or self.dtype != found.dtype else found

    def share(self) -> float:
        """The time that this call should take over its twin's, if the option itself cost nothing.

        Lengths and blocks: the pairs that exist. A window: its tiles of 128 x 128.
        """
        twin = self.twin()
        if self.window is not None:
            return self._tiles() / twin._tiles()
        return self.flops("forward") / twin.flops("forward")

    def _tiles(self, size: int = 128) -> int:
        """Tiles of a causal sequence with a pair that exists, in one head of one batch entry."""
        left = self.seq if self.window is None else self.window[0]
        rows = np.arange(0, self.seq, size)
        first, last = np.maximum(rows - left, 0) // size, (rows + size - 1) // size
        return int((last - first + 1).sum())

    def flops(self, direction: str) -> float:
        factor = {"forward": 1.0, "backward": 2.5, "forward_backward": 3.5}[direction]
        return factor * 4.0 * self.head_dim * self.heads * self.pairs()

    def cu_seqlens(self) -> np.ndarray:
        """int32 [sequences + 1]: where each packed sequence begins."""
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)

    def block_mask(self) -> np.ndarray:
        """bool [1, 1, ceil(T / rows), ceil(S / columns)], the same blocks for every head.

        A fixed number of blocks in every row of blocks, at random places.
        """
        rows, columns = (math.ceil(self.seq / size) for size in self.block_size)
        kept = max(1, round(self.block_density * columns))
        scores = np.random.default_rng(0).random((rows, columns))
        return (scores.argsort(axis=1) < kept)[None, None]

    def small(self, seq: int = 160, heads: int = 4) -> Workload:
        """The same options at a size for tests: shapes, windows and lengths shrink."""
        if self.block_density is not None:
            seq = 3 * max(self.block_size) + 16
        ratio = seq / self.seq
        lengths = self.lengths
        if lengths is not None:
            lengths = tuple(max(1, int(n * ratio)) for n in lengths[:7])
            seq = sum(lengths)
        window = self.window and tuple(
            int(math.ceil(side * ratio)) if side > 0 else side for side in self.window
        )
        return dataclasses.replace(
            self,
            batch=min(self.batch, 2),
            seq=seq,
            heads=heads,
            kv_heads=self.kv_heads and max(1, heads * self.kv_heads // self.heads),
            lengths=lengths,
            window=window,
        )


def _lognormal_lengths(total: int) -> tuple[int, ...]:
    """Ragged lengths as in web text: log-normal, median 600, that sum to `total`."""
    draws = np.random.default_rng(0).lognormal(math.log(600), 1.0, 4 * total // 600).astype(int) + 1
    ends = np.minimum(np.cumsum(draws), total)
    lengths = np.diff(np.concatenate([[0], ends]))
    return tuple(int(n) for n in lengths[lengths > 0])


def _grid(prefix: str, head_dim: int, seq: int, is_causal: bool, **options) -> Workload:
    name = f"{prefix}/h{head_dim}/t{seq}/{'causal' if is_causal else 'full'}"
    return Workload(
        name, TOKENS // seq, seq, HIDDEN // head_dim, head_dim, is_causal=is_causal, **options
    )


def _all() -> list[Workload]:
    masks = (False, True)
    found = [
        _grid("grid", head_dim, seq, is_causal)
        for head_dim in (64, 128, 256)
        for seq in (512, 1024, 2048, 4096, 8192, 16384)
        for is_causal in masks
    ]
    for is_causal in masks:
        for head_dim in (64, 128):
            for seq in (2048, 8192):
                found.append(_grid("dropout", head_dim, seq, is_causal, dropout_rate=0.1))
        found.append(_grid("gqa", 128, 4096, is_causal, kv_heads=4))
        found.append(_grid("gqa8", 128, 4096, is_causal, kv_heads=2))
        found.append(_grid("mqa", 128, 4096, is_causal, kv_heads=1))
        for head_dim in (64, 128):
            found.append(_grid("deterministic", head_dim, 8192, is_causal, deterministic=True))
        mask = "causal" if is_causal else "full"
        for head_dim in (64, 128):
            for kind, lengths in (
                ("equal", (4096,) * (TOKENS // 4096)),
                ("ragged", _lognormal_lengths(TOKENS)),
            ):
                found.append(
                    Workload(
                        f"varlen/{kind}/h{head_dim}/{mask}",
                        1,
                        TOKENS,
                        HIDDEN // head_dim,
                        head_dim,
                        is_causal=is_causal,
                        lengths=lengths,
                    )
                )
    for left in (256, 1024, 4096):
        found.append(
            dataclasses.replace(
                _grid("window", 128, 16384, True, window=(left, 0)), name=f"window/h128/left{left}"
            )
        )
    for block_size, densities in (
        ((128, 128), (1.0, 0.5, 0.25, 0.125, 0.0625)),
        ((64, 64), (0.25,)),
        ((16, 256), (0.25,)),
    ):
        for density in densities:
            blocks = "x".join(map(str, block_size))
            workload = _grid(
                "blocksparse", 64, 8192, False, block_density=density, block_size=block_size
            )
            found.append(
                dataclasses.replace(workload, name=f"blocksparse/{blocks}/{density * 100:g}%")
            )
    # One head of one sequence: can the kernels still fill the device?
    found += [
        Workload(f"long/h128/t65536/{mask}", 1, 65536, 1, 128, is_causal=mask == "causal")
        for mask in ("full", "causal")
    ]
    cpu = Workload("cpu/f32/t2048/full", 1, 2048, 8, 64, dtype="float32")
    found += [
        cpu,
        dataclasses.replace(cpu, name="cpu/f32/t4096/causal", seq=4096, is_causal=True),
        dataclasses.replace(
            cpu, name="cpu/bf16/t4096/causal", seq=4096, is_causal=True, dtype="bfloat16"
        ),
        dataclasses.replace(cpu, name="cpu/f32/t2048/dropout", dropout_rate=0.1),
        dataclasses.replace(cpu, name="cpu/f32/t2048/gqa", kv_heads=2),
        dataclasses.replace(
            cpu, name="cpu/f32/t4096/window", seq=4096, is_causal=True, window=(256, 0)
        ),
        dataclasses.replace(cpu, name="cpu/f32/t2048/blocksparse25%", block_density=0.25),
    ]
    return found


WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in _all()}


def select(patterns: str, among: dict[str, Any] = WORKLOADS) -> list[Any]:
    """Those of `among` whose name matches any of the comma-separated shell patterns, in its order.

    Raises:
      ValueError: a pattern matches nothing.
    """
    chosen = set()
    for pattern in patterns.split(","):
        names = fnmatch.filter(among, pattern)
        if not names:
            raise ValueError(f"no workload matches {pattern!r}; see --list")
        chosen.update(names)
    return [workload for name, workload in among.items() if name in chosen]


def with_twins(chosen: list[Workload]) -> list[Workload]:
    """Each dense twin, followed by those of `chosen` that are compared with it; then the others."""
    twins = dict.fromkeys(workload.twin() for workload in chosen)
    found = {}
    for twin in [*filter(None, twins), None]:
        members = [workload for workload in chosen if workload.twin() is twin]
        found |= dict.fromkeys([twin, *members] if twin else members)
    return list(found)
