"""Variants under compute-sanitizer, in processes that load neither JAX nor torch.

    python -m benchmarks.variants build --name mine --head-dims 64,128,256
    python -m benchmarks.variants.sanitize --name mine --tools memcheck,synccheck

The more code a process loads, the slower is the tool, and the sooner it dies; here that is one
shared object. Every array is an allocation of its own. The calls are those of `benchmarks.variants
check`, the backward also deterministic where it can; each element of the results has to be written,
and whether it is right is check's business. All eight objects take 6 s (H200, 2026-11-28).
"""

from __future__ import annotations

import argparse
import ctypes
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np

from benchmarks import evidence
from benchmarks.variants import __main__ as variants

NOT_COVERED = "jax_flash: not covered by these kernels"  # kNotCovered
RANDOM = np.random.default_rng(0).standard_normal(1 << 20, np.float32)


class Calls:
    """The functions of one shared object, and arrays on its device."""

    def __init__(self, path: pathlib.Path):
        self.module = ctypes.CDLL(str(path))
        self.module.to_device.restype = ctypes.c_void_p
        self.module.to_device.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        self.module.to_host.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
        self.module.release.argtypes = [ctypes.c_void_p]
        self.module.run.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.module.run.restype = self.module.to_host.restype = ctypes.c_char_p

    def run(self, problem: variants.Problem, direction: str, fp16: bool, **options) -> str:
        """One call of random operands -> what is wrong, "" for nothing."""
        arrays = host_arrays(problem, direction, fp16)
        size = problem.workspace_bytes
        pointers = {"workspace": self.module.to_device(None, size)}
        for name, array in arrays.items():
            pointers[name] = self.module.to_device(array.ctypes.data, array.nbytes)
        if missing := [name for name, pointer in pointers.items() if not pointer]:
            return f"no memory for {', '.join(missing)}"
        call = variants.Call(
            **pointers,
            **problem.shape,
            **problem.options,
            workspace_bytes=size,
            is_fp16=fp16,
            num_sequences=problem.num_sequences,
            threshold=problem.threshold,
            **options,
        )
        error = self.module.run(ctypes.addressof(call), None)
        for name in ("o", "lse") if direction == "forward" else ("dq", "dk", "dv"):
            array = arrays[name]
            error = error or self.module.to_host(array.ctypes.data, pointers[name], array.nbytes)
            if not error and np.isnan(array.astype(np.float32)).any():
                error = f"{name}: not all written".encode()
        for pointer in pointers.values():
            self.module.release(pointer)
        return (error or b"").decode()


def host_arrays(problem: variants.Problem, direction: str, fp16: bool) -> dict[str, np.ndarray]:
    """What Problem.fill has, but for the workspace and what this direction does not touch."""
    dtype = np.dtype(np.float16 if fp16 else ml_dtypes.bfloat16)
    batch, seq_q, seq_k, heads, kv_heads, head_dim = problem.shape.values()
    query, key = (batch, seq_q, heads, head_dim), (batch, seq_k, kv_heads, head_dim)
    random, nan = RANDOM.astype(dtype), dtype.type(math.nan)

    def normal(shift, shape):  # other numbers in each array
        return np.resize(random[shift:], shape)

    arrays = dict(q=normal(0, query), k=normal(1, key), v=normal(2, key))
    if direction == "forward":
        arrays["o"] = np.full(query, nan)
        arrays["lse"] = np.full((batch, heads, seq_q), math.nan, np.float32)
    else:  # of the right order is enough
        arrays |= dict(o=normal(3, query), dout=normal(4, query))
        arrays["lse"] = np.full((batch, heads, seq_q), math.log(seq_k) + 0.5, np.float32)
        arrays |= dict(dq=np.full(query, nan), dk=np.full(key, nan), dv=np.full(key, nan))
    if problem.bounds:
        arrays["cu_seqlens"] = np.array(problem.bounds, np.int32)
    arrays["state"] = np.array([[*variants.KEY, entry, 0] for entry in range(batch)], np.uint32)
    arrays["head_ids"] = np.arange(heads, dtype=np.uint32)
    return arrays


def run_all(folder: pathlib.Path, name: str, direction: str, head_dim: int) -> int:
    """Every call of one shared object; the backward of each also in a fixed order of sums."""
    calls, bad, count = Calls(variants.library(folder, name, direction, head_dim)), 0, 0
    for problem, options in variants.problems(head_dim, direction):
        # Of the largest, as many jobs as make the backward at H = 64 take whole columns.
        problem.shape["batch"] = min(problem.shape["batch"], 16)
        for deterministic in (False, True)[: 1 + (direction == "backward")]:
            fp16 = options.get("fp16", False)
            found = calls.run(problem, direction, fp16, deterministic=deterministic)
            if found == NOT_COVERED:
                continue
            count += 1
            if found:
                bad += 1
                print(f"{direction} {problem.shape} {problem.options}: {found}", flush=True)
    print(f"{bad} of {count} calls failed", flush=True)
    return int(bad > 0)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True)
    parser.add_argument("--folder", type=pathlib.Path, default=evidence.ROOT / "build" / "variants")
    parser.add_argument("--tools", default="memcheck,synccheck")
    parser.add_argument("--timeout", type=float, default=600, help="seconds of each process")
    parser.add_argument("--alone", help="DIRECTION_HEADDIM, without a tool: what the others run")
    args = parser.parse_args(argv)
    if args.alone:
        direction, head_dim = args.alone.split("_")
        return run_all(args.folder, args.name, direction, int(head_dim))
    found = sorted(args.folder.glob(f"{args.name}_*.so"))
    jobs = {}
    for tool in args.tools.split(","):
        for path in found:
            what = path.stem.removeprefix(f"{args.name}_")
            command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20", sys.executable]
            command += ["-m", __spec__.name, "--name", args.name, "--folder", str(args.folder)]
            command += ["--alone", what]
            jobs[tool, what] = command
    return run_jobs(jobs, args.timeout)


def run_jobs(jobs: dict, timeout: float) -> int:
    """All at once, then a line for each -> 0 if all are clean."""
    begin, bad = time.monotonic(), 0
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    running = {
        job: subprocess.Popen(
            command,
            cwd=evidence.ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for job, command in jobs.items()
    }
    for (tool, what), process in running.items():
        try:
            text, _ = process.communicate(timeout=max(1, begin + timeout - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the tool and what it watches
            text, _ = process.communicate()
        summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
        calls = re.search(r"(\d+) of (\d+) calls failed", text)
        clean = summary and ": 0 " in summary[0] and calls and calls[1] == "0" != calls[2]
        bad += not clean
        said = (calls[0] if calls else "did not end") + ", " + (summary[0] if summary else "died")
        print(f"{tool} {what}: {said}, {time.monotonic() - begin:.0f} s", flush=True)
        if not clean:
            print("\n".join(text.splitlines()[:60]), flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
