"""What the soak runs: random signatures (what is compiled), random cases of each (what is data),
and the judgement of one case against the float64 definition. All of it in numpy.

A case is a function of (signature, seed, index) alone, so that any can be run again by itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_flash.reference import attention as reference
from tests import helpers

POOL = 1 << 23  # random numbers that the tensors of all cases are slices of
HEAD_DIMS = (64, 64, 128, 128, 96, 192, 256)
PRIMES = (2, 3, 7, 17, 31, 61, 67, 127, 131, 191, 193, 257, 383, 389, 521)
BLOCK_SIZES = ((64, 64), (128, 128), (16, 256))
DATA = ("normal", "peaky", "growing", "spikes")


@dataclasses.dataclass(frozen=True)
class Signature:
    """The static part of a call: one compilation."""

    dtype: str
    batch: int
    seq_q: int
    seq_k: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    packing: str = "separate"
    sequences: int = 0  # 0: a padded batch
    is_causal: bool = False
    offset: str = "zero"  # or "bottom_right" or "array"
    window: tuple[int, int] | None = None
    query_lengths: bool = False
    key_lengths: bool = False
    rate: float = 0.0
    block_size: tuple[int, int] | None = None
    block_heads: int = 1
    lse: bool = False
    deterministic: bool = False
    scale: float | None = None

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of q, k, v, dO; a packed batch of sequences has one batch entry."""
        b, t, s, n, k = self.batch, self.seq_q, self.seq_k, self.heads, self.kv_heads
        h, hv = self.head_dim, self.value_dim
        return [(b, t, n, h), (b, s, k, h), (b, s, k, hv), (b, t, n, hv)]

    @property
    def scores(self) -> tuple[int, int, int, int]:
        return self.batch, self.heads, self.seq_q, self.seq_k

    def labels(self) -> list[str]:
        """What a report counts."""
        h, hv = self.head_dim, self.value_dim
        found = [self.dtype, f"head_dim {h}" if h in HEAD_DIMS else "head_dim other"]
        conditions = {
            "value_dim != head_dim": hv != h,
            "head_dim odd multiple of 8": h % 16 == 8,
            "T != S": self.seq_q != self.seq_k,
            "T = 1": self.seq_q == 1,
            "long": max(self.seq_q, self.seq_k) > 900,
            "many tiles": self.batch * self.heads * self.seq_q > 30000,
            "gqa": 1 < self.kv_heads < self.heads,
            "mqa": self.kv_heads == 1 < self.heads,
            "packed qkv": self.packing == "qkv",
            "packed kv": self.packing == "kv",
            "varlen": self.sequences > 0,
            "causal": self.is_causal,
            "bottom right": self.offset == "bottom_right",
            "offset array": self.offset == "array",
            "window": self.window is not None,
            "lengths": self.query_lengths or self.key_lengths,
            "dropout": self.rate > 0,
            "block mask": self.block_size is not None,
            "scale": self.scale is not None,
            "lse cotangent": self.lse,
            "deterministic": self.deterministic,
        }
        return found + [name for name, holds in conditions.items() if holds]


def draw_signature(rng: np.random.Generator) -> Signature:
    def chance(p):
        return rng.random() < p

    def pick(values):
        return values[rng.integers(len(values))]

    def length():
        kind = rng.integers(5)
        if kind == 0:
            return int(pick(PRIMES))
        if kind == 1:
            return 64 * int(rng.integers(1, 9))
        if kind == 2:
            return int(rng.integers(1, 40))
        return int(rng.integers(1, 600))

    head_dim = int(pick(HEAD_DIMS)) if chance(0.6) else 8 * int(rng.integers(1, 33))
    value_dim = head_dim
    if chance(0.08):
        head_dim, value_dim = 192, 128
    elif chance(0.15):
        value_dim = 8 * int(rng.integers(1, 33))
    kv_heads = int(rng.integers(1, 4))
    heads = kv_heads * int(pick((1, 1, 1, 2, 3, 4, 8)))
    seq_q = 1 if chance(0.05) else length()
    seq_k = seq_q if chance(0.3) else 1 if chance(0.04) else length()
    batch, pairs = int(rng.integers(1, 4)), 800_000
    sequences = int(pick((1, 2, 3, 5, 9))) if chance(0.35) else 0
    if sequences:
        batch, pairs = 1, 600_000
        seq_q, seq_k = seq_q + 60, seq_k + 60
    elif chance(0.06):  # two or three tiles for every processor of a GPU
        batch, kv_heads, seq_q, seq_k = 7, 5, int(rng.integers(129, 300)), int(rng.integers(30, 80))
        heads, pairs = kv_heads * int(pick((4, 8))), 10_000_000
        head_dim = value_dim = int(pick((64, 128)))
    elif chance(0.05):  # a ring of stages goes round many times, and tiles are skipped in a row
        batch, kv_heads, heads, pairs = 1, 1, int(pick((1, 2))), 6_000_000
        seq_q, seq_k = (int(x) for x in rng.integers(900, 2400, 2))
    packing = "separate"
    if chance(0.15):
        packing, value_dim, seq_k, kv_heads = "qkv", head_dim, seq_q, heads
    elif chance(0.15):
        packing, value_dim = "kv", head_dim
    widest = max(head_dim, value_dim)
    while (  # small enough for the host's float64, and for the pool
        batch * heads * seq_q * seq_k > pairs
        or batch * heads * max(seq_q, seq_k) * widest > 6_000_000
    ):
        if batch > 1:
            batch -= 1
        elif heads > kv_heads:
            heads -= kv_heads
        elif kv_heads > 1:
            heads, kv_heads = heads // kv_heads, 1
        else:
            seq_q, seq_k = (seq_q * 3 // 4, seq_k * 3 // 4)
            seq_k = seq_q if packing == "qkv" else seq_k
    options = {}
    if not sequences and chance(0.15):
        options |= dict(block_size=pick(BLOCK_SIZES), block_heads=int(pick((1, heads))))
    if chance(0.2):
        options["window"] = (int(rng.integers(0, 200)), int(rng.integers(0, 200)))
    if not sequences:
        options |= dict(query_lengths=chance(0.2), key_lengths=chance(0.25))
    return Signature(
        dtype=pick(("bfloat16", "bfloat16", "float16")),
        batch=batch,
        seq_q=seq_q,
        seq_k=seq_k,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        packing=packing,
        sequences=sequences,
        is_causal=chance(0.5),
        offset=pick(("zero", "zero", "bottom_right", "array")),
        rate=pick((0.03, 0.1, 0.5)) if chance(0.3) else 0.0,
        lse=chance(0.4),
        deterministic=chance(0.25),
        scale=pick((0.21, -0.15)) if chance(0.1) else None,
        **options,
    )


def signatures(seed: int, count: int, labels: Sequence[str] = ()) -> list[Signature]:
    """Signatures that have all of `labels`, and none of those that are given as "!label".

    Raises:
      ValueError: among many there is none.
    """
    rng, found = np.random.default_rng(seed), []
    for _ in range(1000 * count):
        signature = draw_signature(rng)
        has = signature.labels()
        if all((name.lstrip("!") in has) != name.startswith("!") for name in labels):
            found.append(signature)
        if len(found) == count:
            return found
    raise ValueError(f"labels: expected some that go together, got {', '.join(labels)}")


@dataclasses.dataclass
class Case:
    """The data of one call; `poisoned`: what does not exist is NaN, and may not be seen."""

    signature: Signature
    index: int
    operands: dict[str, np.ndarray]  # what of the options is an array
    places: list[int]  # of q, k, v, dO, dlse in the pool
    data: str
    poisoned: bool

    def labels(self) -> list[str]:
        names = [f"data {self.data}"] + ["NaN in rows that do not exist"] * self.poisoned
        return self.signature.labels() + names


class Plan:
    """Which case each index of a run is, the same in all of its processes.

    Args:
      labels: of `signatures`.
    """

    def __init__(self, seed: int, cases: int, count: int, labels: Sequence[str] = ()):
        self.arguments = seed, cases, count, labels
        self.seed = seed
        self.signatures = signatures(seed, count, labels)
        self.order = np.random.default_rng((seed, 1)).integers(count, size=cases)

    def __reduce__(self):
        """Small: a process that starts another waits until it reads what does not fit in a pipe."""
        return Plan, self.arguments

    def case(self, index: int) -> Case:
        return draw_case(self.signatures[self.order[index]], self.seed, index)


def draw_case(signature: Signature, seed: int, index: int) -> Case:
    s, rng = signature, np.random.default_rng((seed, index))
    operands = {}
    if s.sequences:
        for name, total in (("cu_seqlens_q", s.seq_q), ("cu_seqlens_k", s.seq_k)):
            ends = np.sort(rng.integers(0, total + 1, s.sequences + 1))
            if rng.random() < 0.5:  # nothing before the first and after the last sequence
                ends[0], ends[-1] = 0, total
            if rng.random() < 0.15:  # garbage
                ends = rng.integers(-total, 3 * total, s.sequences + 1)
            operands[name] = ends.astype(np.int32)
        if s.packing == "qkv":
            operands["cu_seqlens_k"] = operands["cu_seqlens_q"]
    for name, wanted, limit in (
        ("query_seq_lengths", s.query_lengths, s.seq_q),
        ("key_value_seq_lengths", s.key_lengths, s.seq_k),
    ):
        if wanted:
            operands[name] = rng.integers(-2, limit + 9, s.batch).astype(np.int32)
    if s.offset == "array":
        reach = max(s.seq_q, s.seq_k)
        shape = () if s.sequences else (s.batch,)
        operands["causal_offset"] = rng.integers(-reach, reach + 1, shape).astype(np.int32)
    if s.rate:
        operands["dropout_key"] = rng.integers(0, 1 << 32, 2, np.uint32)
    if s.block_size is not None:
        blocks = (-(-s.seq_q // s.block_size[0]), -(-s.seq_k // s.block_size[1]))
        density = rng.choice((0.2, 0.6, 0.9))
        operands["block_mask"] = rng.random((s.batch, s.block_heads, *blocks)) < density
    sizes = [int(np.prod(shape)) for shape in (*s.shapes, s.scores[:3])]
    return Case(
        signature=s,
        index=index,
        operands=operands,
        places=[int(rng.integers(0, POOL - size + 1)) for size in sizes],
        data=str(rng.choice(DATA, p=(0.6, 0.14, 0.13, 0.13))),
        poisoned=bool(rng.random() < 0.5),
    )


@functools.lru_cache(maxsize=3)
def _pool(seed: int, dtype: str) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(POOL, np.float32).astype(jnp.dtype(dtype))


def tensors(case: Case, seed: int) -> list[np.ndarray]:
    """q, k, v, dO in the signature's type and dlse in float32, whatever exists of them."""
    s = case.signature
    pool = _pool(seed, s.dtype)
    found = [
        pool[place : place + int(np.prod(shape))].reshape(shape)
        for place, shape in zip(case.places, s.shapes, strict=False)
    ]
    if case.data == "peaky":  # one key takes nearly all of a row
        found[0] = (found[0].astype(np.float32) * 6).astype(found[0].dtype)
    if case.data == "growing":  # the running maximum changes with every tile
        ramp = np.linspace(0, 5, s.seq_k, dtype=np.float32)[:, None, None]
        found[1] = (found[1].astype(np.float32) * ramp).astype(found[1].dtype)
    if case.data == "spikes":  # few keys, anywhere, above all others
        rows = np.random.default_rng(case.index).random(s.seq_k) < 0.02
        found[1] = np.where(rows[:, None, None], found[1].astype(np.float32) * 12, found[1])
        found[1] = found[1].astype(found[0].dtype)
    size = int(np.prod(s.scores[:3]))
    dlse = _pool(seed, "float32")[case.places[4] : case.places[4] + size].reshape(s.scores[:3])
    return [*found, dlse]


def keep_mask(rate: float, key, batch: int, heads: int, seq_q: int, seq_k: int, first_batch=0):
    """`reference.dropout_keep`, computing every Philox call once and not eight times."""
    rows, cols = -(-seq_q // 16), -(-seq_k // 16)
    x = np.arange(cols * 4)
    y = np.arange(rows * 8)[:, None]
    h = np.arange(heads)[:, None, None]
    b = first_batch + np.arange(batch)[:, None, None, None]
    words = np.stack(np.broadcast_arrays(*reference.philox((x, y, h, b), key)))
    # [2 halves of rows, 2 of columns, batch, heads, rows, 8, cols, 4] -> a tile's own order
    words = words.reshape(2, 2, batch, heads, rows, 8, cols, 4).transpose(2, 3, 4, 0, 5, 6, 1, 7)
    draws = np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], -1)
    draws = draws.reshape(batch, heads, rows * 16, cols * 16)[..., :seq_q, :seq_k]
    return draws >= min(round(rate * reference.DRAWS), reference.DRAWS - 1)


def pairs(case: Case) -> tuple[np.ndarray, np.ndarray | None]:
    """(ok, keep), bool [B, N, T, S]: which pairs exist, and which of them dropout keeps."""
    s, operands = case.signature, case.operands
    mask = dict(is_causal=s.is_causal, local_window_size=s.window)
    mask["causal_offset"] = operands.get("causal_offset", "bottom_right")
    if s.offset == "zero":
        mask["causal_offset"] = 0
    key = operands.get("dropout_key")
    if not s.sequences:
        for name in ("query_seq_lengths", "key_value_seq_lengths", "block_mask"):
            mask[name] = operands.get(name)
        ok = reference.allowed(*s.scores, **mask, block_size=s.block_size)
        return ok, keep_mask(s.rate, key, *s.scores) if s.rate else None
    ok = np.zeros(s.scores, bool)
    keep = np.zeros(s.scores, bool) if s.rate else None
    rows = reference.sequences(operands["cu_seqlens_q"], s.seq_q)
    cols = reference.sequences(operands["cu_seqlens_k"], s.seq_k)
    for i, ((top, bottom), (left, right)) in enumerate(zip(rows, cols, strict=True)):
        part = (1, s.heads, bottom - top, right - left)
        block = np.s_[:, :, top:bottom, left:right]
        ok[block] = reference.allowed(*part, **mask)
        if s.rate and 0 not in part:
            keep[block] = keep_mask(s.rate, key, *part, first_batch=i)
    return ok, keep


def existing_rows(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """bool [B, T], [B, S]: rows inside the lengths, or owned by a sequence."""
    s, found = case.signature, []
    for cu, lengths, size in (
        ("cu_seqlens_q", "query_seq_lengths", s.seq_q),
        ("cu_seqlens_k", "key_value_seq_lengths", s.seq_k),
    ):
        rows = np.ones((s.batch, size), bool)
        if s.sequences:
            spans = reference.sequences(case.operands[cu], size)
            rows[:, : spans[0][0]] = rows[:, spans[-1][1] :] = False
        elif lengths in case.operands:
            rows = np.arange(size) < case.operands[lengths][:, None]
        found.append(rows)
    return found[0], found[1]


class Truth(NamedTuple):
    """What the definition says, and how far dq and dk move by what every kernel rounds."""

    forward: reference.Forward
    gradients: reference.Gradients
    inherent: tuple[float, float]


def definition(case: Case, pairs, arrays, dlse) -> Truth:
    """The case in float64.

    Args:
      pairs, arrays, dlse: of `pairs` and `tensors`.
    """
    s = case.signature
    (ok, keep), (q, k, v, dout) = pairs, arrays
    scale = s.head_dim**-0.5 if s.scale is None else s.scale
    formula = dict(scale=scale, keep=keep, rate=s.rate)
    exact = reference.forward(q, k, v, ok, **formula)
    dlse = np.where(ok.any(-1), dlse, 0) if s.lse else None
    grads = reference.backward(q, k, v, ok, dout, dlse, **formula)
    return Truth(exact, grads, helpers.rounding_of_delta(q, k, dout, exact, scale))


def judge(case: Case, pairs, truth: Truth, ours, plain) -> tuple[float, list[str]]:
    """The largest error of (out, dq, dk, dv) over what is allowed it, and every complaint.

    Args:
      ours, plain: (out, lse or None, dq, dk, dv) in numpy.
    """
    worst, complaints = 0.0, []
    out, lse, *gradients = ours
    if lse is not None:
        try:
            helpers.assert_lse(lse, truth.forward.lse)
        except AssertionError as error:
            complaints.append(f"lse: {' '.join(str(error).split())[:300]}")
    for name, mine, exact, theirs, inherent in zip(
        ("out", "dq", "dk", "dv"),
        (out, *gradients),
        (truth.forward.out, *truth.gradients),
        (plain[0], *plain[2:]),
        (0.0, *truth.inherent, 0.0),
        strict=True,
    ):
        ratio, text = helpers.error_ratio(mine, exact, theirs, inherent)
        worst = max(worst, ratio)
        if not ratio <= 1:
            complaints.append(f"{name}: {text}")
    if np.asarray(out, np.float32)[np.moveaxis(~pairs[0].any(-1), 1, 2)].any():
        complaints.append("out: rows without keys are not 0")
    return worst, complaints
