"""Where results live, and which code and device they belong to."""

from __future__ import annotations

import hashlib
import json
import pathlib
import re
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
_SUFFIXES = {".h", ".cc", ".cu", ".cuh", ".py", ".cmake"}


def source_hash(root: pathlib.Path = ROOT) -> str:
    """sha256 over the names and contents of all that decides what the kernels compute.

    That is csrc/, cmake/, jax_flash/ and CMakeLists.txt, in name order; so a report made on another
    machine, from a copy without history, still says exactly which code it judged.
    """
    files = [root / "CMakeLists.txt"]
    for folder in ("cmake", "csrc", "jax_flash"):
        files += [path for path in (root / folder).rglob("*") if path.suffix in _SUFFIXES]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def commit() -> str:
    """The short commit hash, with `+` where files differ from it; "" without git."""

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "csrc", "jax_flash")
        return git("rev-parse", "--short=10", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def device_name() -> str:
    """What JAX's default device is, for people: "NVIDIA H200", "AMD EPYC, 2 cores"."""
    import os

    import jax

    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    info = pathlib.Path("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.*)", info.read_text() if info.exists() else "")
    flags = info.read_text() if info.exists() else ""
    vector = next((name for name in ("avx512f", "avx2") if name in flags), "")
    vector = {"avx512f": ", AVX-512", "avx2": ", AVX2"}.get(vector, "")
    return f"{model[1].strip() if model else 'CPU'}, {len(os.sched_getaffinity(0))} cores{vector}"


def device_folder(name: str) -> pathlib.Path:
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def gpu_reports() -> list[dict]:
    """Every committed gpu_tests.json, each with `matches`: was it this very code?"""
    return _reports("gpu_tests.json")


def soak_reports() -> list[dict]:
    """Every committed soak.json (tests/soak.py), likewise."""
    return _reports("soak.json")


def _reports(name: str) -> list[dict]:
    current = source_hash()
    reports = []
    for path in sorted(RESULTS.glob(f"*/{name}")):
        report = json.loads(path.read_text())
        report["matches"] = report["source_hash"] == current
        reports.append(report)
    return reports
