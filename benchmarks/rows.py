"""Reads the committed rows: the latest run of every workload, rivals from that very run."""

from __future__ import annotations

import csv
import pathlib

from benchmarks import evidence

LABELS = {
    "jax_flash": "jax_flash",
    "jax_flash_sm80": "jax_flash, sm_80 kernels",
    "jax_flash_xla": "jax_flash, xla",
    "jax_nn_xla": "jax.nn, XLA",
    "jax_nn_cudnn": "jax.nn, cuDNN",
    "torch_flash": "torch, flash",
    "torch_cudnn": "torch, cuDNN",
    "xla": "XLA, plain jnp",
    "torch_compile": "torch.compile",
    "tokamax": "tokamax",
    "liger": "Liger",
    "quack": "QuACK",
}
# Rivals that run in no JAX program: their lead over jax.nn's cuDNN, measured elsewhere.
OTHER_LABELS = {
    "flash_attention_3": "FlashAttention-3",
    "flash_attention_4": "FlashAttention-4",
    "tokamax": "tokamax",
}
CEILING = "ceiling/matmul8192"  # what the device's matrix units do in the same run
COPY_CEILING = "ceiling/copy"  # bytes read and written by a large copy


class Rows:
    """`ms[workload, direction][provider]`, and where and when it was measured.

    Of each workload and direction that is the latest run with rivals, or where none has any, the
    latest run. `tflops` and `gbs` are alike, where the rows have them.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        self.device = rows[0]["device"]
        # (workload, direction) -> run -> provider -> row
        self._runs: dict[tuple[str, str], dict[str, dict[str, dict]]] = {}
        for row in rows:
            runs = self._runs.setdefault((row["workload"], row["direction"]), {})
            runs.setdefault(row["run"], {})[row["provider"]] = row
        self.ms: dict[tuple[str, str], dict[str, float]] = {}
        self.tflops: dict[tuple[str, str], dict[str, float]] = {}
        self.gbs: dict[tuple[str, str], dict[str, float]] = {}
        self._run: dict[tuple[str, str], str] = {}
        kept = []
        for key, runs in self._runs.items():
            ours = [run for run, found in runs.items() if "jax_flash" in found]
            if not ours:
                continue
            self._run[key] = max(ours, key=lambda run: (_has_rivals(runs[run]), run))
            found = runs[self._run[key]]
            kept += found.values()
            self.ms[key] = _column(found, "ms")
            self.tflops[key] = _column(found, "tflops")
            self.gbs[key] = _column(found, "gbs")
        self.dates = sorted({row["date"] for row in kept})
        self.sources = sorted({row["source"] for row in kept})
        self.versions = sorted({row["version"] for row in kept})
        self.other = _other_call(path.with_name("other_call.csv"))

    def providers(self, prefix: str) -> list[str]:
        """Who was measured on the workloads of this prefix, ours first."""
        found = {p for (name, _), row in self.ms.items() if name.startswith(prefix) for p in row}
        return [provider for provider in LABELS if provider in found]

    def ratio(self, workload: str, direction: str, rival: str) -> float | None:
        """How many times faster than `rival` jax_flash was."""
        row = self.ms.get((workload, direction), {})
        return row[rival] / row["jax_flash"] if rival in row and "jax_flash" in row else None

    def other_ratio(self, workload: str, direction: str, rival: str) -> float | None:
        """The same against a rival of OTHER_LABELS: through its lead over jax.nn's cuDNN."""
        ours = self.ratio(workload, direction, "jax_nn_cudnn")
        lead = self.other.get((workload, direction), {}).get(rival)
        return ours / lead if ours and lead else None

    def best_rival(self, workload: str, direction: str) -> tuple[str, float] | None:
        """(label, how many times faster we were) of the fastest rival, wherever it was measured."""
        rivals = [name for name in LABELS if not name.startswith("jax_flash")]
        found = {LABELS[name]: self.ratio(workload, direction, name) for name in rivals}
        for name, label in OTHER_LABELS.items():
            found[label] = self.other_ratio(workload, direction, name)
        found = {label: ratio for label, ratio in found.items() if ratio}
        return min(found.items(), key=lambda item: item[1]) if found else None

    def cost(self, workload: str, twin: str, direction: str) -> float | None:
        """Our time over our time for `twin`, in the latest run that has both."""
        mine, theirs = (self._runs.get((name, direction), {}) for name in (workload, twin))
        both = [
            run
            for run in mine.keys() & theirs.keys()
            if "jax_flash" in mine[run] and "jax_flash" in theirs[run]
        ]
        if not both:
            return None
        run = max(both)
        return float(mine[run]["jax_flash"]["ms"]) / float(theirs[run]["jax_flash"]["ms"])

    def ceiling(self) -> float | None:
        """TFLOP/s of a large matrix product, in the latest run that has it."""
        runs = self._runs.get((CEILING, "forward"), {})
        return float(runs[max(runs)]["jax_matmul"]["tflops"]) if runs else None

    def ceiling_beside(self, workload: str, direction: str) -> float | None:
        """Of the device: GB/s of a copy, or TFLOP/s of a product; the highest of the day's runs.

        What a run measures once, before all else, may meet the end of what ran before it.
        """
        key = workload, direction
        name, column = (COPY_CEILING, "gbs") if self.gbs.get(key) else (CEILING, "tflops")
        day = self._run.get(key, "").partition("T")[0]
        runs = self._runs.get((name, "forward"), {})
        found = [found for run, found in runs.items() if run.partition("T")[0] == day]
        return max((rate for row in found for rate in _column(row, column).values()), default=None)

    def rate(self, workload: str, direction: str) -> dict[str, float]:
        """Provider -> GB/s, or TFLOP/s where arithmetic is what counts."""
        key = workload, direction
        return self.gbs.get(key) or self.tflops.get(key, {})


class ModelRows:
    """The rows of benchmarks/model.py, or of fused_model.py."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        with open(path, newline="") as file:
            self.rows = list(csv.DictReader(file))
        self.device = self.rows[0]["device"]
        self.dates = sorted({row["date"] for row in self.latest()})
        self.versions = sorted({row["version"] for row in self.latest()})

    def latest(self, name: str | None = None, with_value: str | None = None) -> list[dict]:
        """The rows of the latest run: of the model called so, with a value in that column."""
        rows = [row for row in self.rows if name in (None, row["model"])]
        if with_value is not None:
            rows = [row for row in rows if row[with_value]]
        run = max((row["run"] for row in rows), default="")
        return [row for row in rows if row["run"] == run]

    def names(self) -> list[str]:
        """Models, in the order in which they were first measured."""
        return list(dict.fromkeys(row["model"] for row in self.rows))


def _column(found: dict[str, dict], name: str) -> dict[str, float]:
    return {provider: float(row[name]) for provider, row in found.items() if row.get(name)}


def _has_rivals(found: dict[str, dict]) -> bool:
    return any(not provider.startswith("jax_flash") for provider in found)


def _other_call(path: pathlib.Path) -> dict[tuple[str, str], dict[str, float]]:
    """(workload, direction) -> rival -> its lead over jax.nn's cuDNN, from a call of its own."""
    leads: dict[tuple[str, str], dict[str, float]] = {}
    if path.exists():
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                key = row["workload"], row["direction"]
                leads.setdefault(key, {})[row["provider"]] = float(row["over_jax_nn_cudnn"])
    return leads


def load_all() -> list[Rows]:
    """Every device's rows of attention, in folder order; devices without our rows are left out."""
    found = [Rows(path) for path in sorted(evidence.RESULTS.glob("*/attention.csv"))]
    return [rows for rows in found if rows.ms]


def load_operators() -> list[Rows]:
    """Every device's rows of the fused operators, in folder order."""
    found = [Rows(path) for path in sorted(evidence.RESULTS.glob("*/operators.csv"))]
    return [rows for rows in found if rows.ms]


def load_models(file: str = "model.csv") -> list[ModelRows]:
    """Every device's rows of the model benchmark, in folder order."""
    return [ModelRows(path) for path in sorted(evidence.RESULTS.glob(f"*/{file}"))]
