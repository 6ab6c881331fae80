"""Time workloads on this machine's JAX device and append the rows to benchmarks/results/.

    python -m benchmarks.run                                     # cpu/* or grid/*
    python -m benchmarks.run --workloads 'grid/h128/*' --providers jax_flash,jax_nn_cudnn
    python -m benchmarks.run --workloads 'dropout/*,gqa8/*' --twins --providers jax_flash
    python -m benchmarks.run --list

All providers of a workload are timed in one process and interleaved (benchmarks/clock.py). Compare
rows of one run only. Rows reach the disk as soon as they exist.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory as well

import jax
import numpy as np

from benchmarks import clock, evidence, providers, workloads
from benchmarks.rows import CEILING

COLUMNS = clock.columns("tflops")


def build(workload, names, directions, report) -> list[clock.Timed]:
    """Compile every call of a workload, a few at a time; what cannot be built is reported."""
    data = jax.block_until_ready(providers.arrays(workload))
    jobs = []
    for name in names:
        try:
            makers = providers.prepare(name, workload, data)
        except providers.Unsupported as reason:
            report(f"  {name}: not measured: {reason}")
            continue
        jobs += [(name, direction, makers[direction]) for direction in directions]
    return clock.build(jobs, report)


def agreeing(workload, timed, report) -> list[clock.Timed]:
    """The calls whose forward output is the same as ours: a wrong kernel has no time.

    A rival that differs is dropped; where all differ, ours is wrong and nothing is left. Dropout
    draws other bits in every library, so that there is nothing to compare.
    """
    if workload.dropout_rate:
        return timed
    outputs = {}
    for entry in timed:
        if entry.direction == "forward":
            with providers.environment(entry.provider):
                out = entry.call()
                sample = out.cpu().float().numpy() if hasattr(out, "cpu") else np.asarray(out)
            outputs[entry.provider] = sample.reshape(-1)[::7].astype(np.float32)  # elements enough
    if len(outputs) < 2:
        return timed
    ours, *rivals = outputs
    bound = 1e-5 if workload.dtype == "float32" else 2e-2
    wrong = set()
    for rival in rivals:
        error = np.linalg.norm(outputs[rival] - outputs[ours]) / np.linalg.norm(outputs[ours])
        if not error < bound:
            report(f"  MISMATCH: {rival} and {ours} differ by {error:.2e} (bound {bound:g})")
            wrong.add(rival)
    if len(wrong) == len(rivals):
        return []
    return [entry for entry in timed if entry.provider not in wrong]


def measure(workload, names, directions, args, report) -> list[clock.Timed]:
    timed = agreeing(workload, build(workload, names, directions, report), report)
    return clock.time_all(timed, args.rounds, args.target, report)


def matmul(args) -> clock.Timed:
    """A large bf16 product: what the matrix units do in this very run."""
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (8192, 8192), jax.numpy.bfloat16) for key in keys)
    product = jax.jit(jax.numpy.matmul).lower(a, b).compile()
    entry = clock.Timed("jax_matmul", "forward", lambda: product(a, b))
    return clock.time_all([entry], args.rounds, args.target, print)[0]


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = [name for name in providers.PROVIDERS if not name.startswith("jax_flash_")]
    clock.add_arguments(parser, providers.PROVIDERS, ",".join(default))
    parser.add_argument("--twins", action="store_true", help="also their dense twins, beside them")
    return clock.parse(parser, argv, providers.PROVIDERS)


def main(argv=None) -> int:
    args = parse(argv)
    if args.list:
        for workload in workloads.WORKLOADS.values():
            print(f"{workload.name:32s} {workload.flops('forward') / 1e12:8.3f} TFLOP forward")
        return 0
    begin = time.monotonic()
    on_gpu = jax.default_backend() == "gpu"
    chosen = workloads.select(args.workloads or ("grid/*" if on_gpu else "cpu/*"))
    if args.twins:
        chosen = workloads.with_twins(chosen)
    directions = args.directions or ["forward", "backward" if on_gpu else "forward_backward"]
    names = args.providers

    device = evidence.device_name()
    path = args.out or evidence.device_folder(device) / "attention.csv"
    print(f"{device}, {len(chosen)} workloads -> {path}", flush=True)
    wrong = []
    with clock.RowFile(path, device, COLUMNS) as rows:

        def write(name, version, entry, flops) -> None:
            rows.write(name, version, entry, tflops=flops / entry.median() / 1e12)

        if on_gpu and any(workload.group == "grid" for workload in chosen):
            print(CEILING, flush=True)
            write(CEILING, providers.version("jax_flash"), matmul(args), 2 * 8192**3)
        for index, workload in enumerate(chosen):
            if time.monotonic() - begin > args.budget:
                left = ", ".join(w.name for w in chosen[index:])
                print(f"out of time, not measured: {left}", flush=True)
                break
            print(workload.name, flush=True)
            timed = measure(workload, names, directions, args, lambda text: print(text, flush=True))
            ours = {entry.direction for entry in timed if entry.provider == names[0]}
            if ours != set(directions):
                wrong.append(workload.name)
            for entry in timed:
                version = providers.version(entry.provider)
                write(workload.name, version, entry, workload.flops(entry.direction))
            del timed
    if wrong:
        print(f"not measured, or outputs differ: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
