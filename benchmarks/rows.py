"""Reads the committed rows: the latest run of every workload, rivals from that very run."""

from __future__ import annotations

import csv
import pathlib

from benchmarks import evidence

LABELS = {
    "jax_flash": "jax_flash",
    "jax_flash_xla": "jax_flash, xla",
    "jax_nn_xla": "jax.nn, XLA",
    "jax_nn_cudnn": "jax.nn, cuDNN",
    "torch_flash": "torch, flash",
    "torch_cudnn": "torch, cuDNN",
}


class Rows:
    """`ms[workload, direction][provider]`, and where and when it was measured."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        self.device = rows[0]["device"]
        latest: dict[tuple[str, str], str] = {}
        for row in rows:
            if row["provider"] == "jax_flash":
                key = row["workload"], row["direction"]
                latest[key] = max(latest.get(key, ""), row["run"])
        kept = [
            row for row in rows if latest.get((row["workload"], row["direction"])) == row["run"]
        ]
        self.ms: dict[tuple[str, str], dict[str, float]] = {}
        self.tflops: dict[tuple[str, str], dict[str, float]] = {}
        for row in kept:
            key = row["workload"], row["direction"]
            self.ms.setdefault(key, {})[row["provider"]] = float(row["ms"])
            self.tflops.setdefault(key, {})[row["provider"]] = float(row["tflops"])
        self.dates = sorted({row["date"] for row in kept})
        self.sources = sorted({row["source"] for row in kept})
        self.versions = sorted({row["version"] for row in kept})

    def providers(self, prefix: str) -> list[str]:
        """Who was measured on the workloads of this prefix, ours first."""
        found = {p for (name, _), row in self.ms.items() if name.startswith(prefix) for p in row}
        return [provider for provider in LABELS if provider in found]

    def ratio(self, workload: str, direction: str, rival: str) -> float | None:
        """How many times faster than `rival` jax_flash was."""
        row = self.ms.get((workload, direction), {})
        return row[rival] / row["jax_flash"] if rival in row and "jax_flash" in row else None


def load_all() -> list[Rows]:
    """Every device's rows of attention, in folder order; devices without our rows are left out."""
    found = [Rows(path) for path in sorted(evidence.RESULTS.glob("*/attention.csv"))]
    return [rows for rows in found if rows.ms]
