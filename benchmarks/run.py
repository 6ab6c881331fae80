"""Time workloads on this machine's JAX device and append the rows to benchmarks/results/.

    python -m benchmarks.run                                     # cpu/* or grid/*
    python -m benchmarks.run --workloads 'grid/h128/*' --providers jax_flash,jax_nn_cudnn
    python -m benchmarks.run --workloads 'dropout/*,gqa8/*' --twins --providers jax_flash
    python -m benchmarks.run --list

All providers of a workload are timed in one process and interleaved: every round visits each
(provider, direction) once, in random order, for a burst of back-to-back launches between two
synchronisations. A row is the median over the rounds. Compare rows of one run only: clocks and
power differ between runs by several percent. Rows reach the disk as soon as they exist.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import dataclasses
import datetime
import os
import random
import statistics
import sys
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory as well

import jax
import numpy as np

from benchmarks import evidence, providers, workloads
from benchmarks.rows import CEILING

COLUMNS = (
    "run,device,date,commit,source,workload,provider,version,direction,ms,tflops,spread,host_bound"
)
COLUMNS = COLUMNS.split(",")


@dataclasses.dataclass
class Timed:
    """One (provider, direction) of a workload, and the seconds a launch took in each round."""

    provider: str
    direction: str
    call: object
    launches: int = 1
    seconds: list[float] = dataclasses.field(default_factory=list)
    host_bound: int = 0

    def burst(self) -> None:
        # What the host needs for a launch shows in the first ones: JAX lets 32 programs wait, and
        # then the host runs at the device's pace.
        first = min(16, self.launches)
        with providers.environment(self.provider):
            start = time.perf_counter()
            for launch in range(self.launches):
                result = self.call()
                if launch == first - 1:
                    enqueued = time.perf_counter()
            providers.synchronise(self.provider, result)
            end = time.perf_counter()
        self.seconds.append((end - start) / self.launches)
        self.host_bound += (enqueued - start) / first > 0.85 * self.seconds[-1]

    def warm_up(self, target: float) -> None:
        """Two bursts, the second of which says how many launches fill `target` seconds."""
        self.burst()
        self.launches = 2
        self.burst()
        self.launches = max(1, min(500, round(target / max(self.seconds[-1], 1e-7))))
        self.seconds.clear()
        self.host_bound = 0


def build(workload, names, directions, report) -> list[Timed]:
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
    built = []
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        futures = {
            (name, direction): pool.submit(make)
            for name, direction, make in jobs
            if not providers.built_alone(name)
        }
    for name, direction, make in jobs:
        future = futures.get((name, direction))
        try:
            with providers.environment(name):
                call = future.result() if future else make()
            built.append(Timed(name, direction, call))
        except Exception as error:  # one call that cannot be built must not end the run
            report(f"  {name} {direction}: FAILED: {_first_line(error)}")
    return built


def agreeing(workload, timed, report) -> list[Timed]:
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


def measure(workload, names, directions, args, report) -> list[Timed]:
    timed = agreeing(workload, build(workload, names, directions, report), report)
    for entry in list(timed):
        try:
            entry.warm_up(args.target)
        except Exception as error:  # out of memory, say
            report(f"  {entry.provider} {entry.direction}: FAILED: {_first_line(error)}")
            timed.remove(entry)
    for _ in range(args.rounds):
        for entry in random.sample(timed, len(timed)):
            entry.burst()
    return timed


def matmul(args) -> Timed:
    """A large bf16 product: what the matrix units do in this very run."""
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (8192, 8192), jax.numpy.bfloat16) for key in keys)
    product = jax.jit(jax.numpy.matmul).lower(a, b).compile()
    entry = Timed("jax_nn_xla", "forward", lambda: product(a, b))
    entry.warm_up(args.target)
    for _ in range(args.rounds):
        entry.burst()
    return entry


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:150]


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", help="comma-separated shell patterns (default: by device)")
    others = [name for name in providers.PROVIDERS if name.startswith("jax_flash_")]
    default = ",".join(name for name in providers.PROVIDERS if name not in others)
    parser.add_argument("--twins", action="store_true", help="also their dense twins, beside them")
    parser.add_argument("--providers", default=default, help=f"also: {', '.join(others)}")
    parser.add_argument("--directions", default="", help=f"of {', '.join(providers.DIRECTIONS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--target", type=float, default=0.0, help="seconds of one burst")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds for the whole run")
    parser.add_argument("--out", default="", help="CSV to append to (default: by device)")
    parser.add_argument("--list", action="store_true", help="print the workloads and stop")
    args = parser.parse_args(argv)
    unknown = set(args.providers.split(",")) - set(providers.PROVIDERS)
    unknown |= set(filter(None, args.directions.split(","))) - set(providers.DIRECTIONS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return args


def main(argv=None) -> int:
    args = parse(argv)
    if args.list:
        for workload in workloads.WORKLOADS.values():
            print(f"{workload.name:32s} {workload.flops('forward') / 1e12:8.3f} TFLOP forward")
        return 0
    begin = time.monotonic()
    on_gpu = jax.default_backend() == "gpu"
    args.target = args.target or (0.03 if on_gpu else 0.5)
    chosen = workloads.select(args.workloads or ("grid/*" if on_gpu else "cpu/*"))
    if args.twins:
        chosen = workloads.with_twins(chosen)
    directions = args.directions or ("forward,backward" if on_gpu else "forward,forward_backward")
    directions = directions.split(",")
    names = args.providers.split(",")

    device = evidence.device_name()
    path = args.out or evidence.device_folder(device) / "attention.csv"
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    shared = dict(
        run=now.strftime("%Y%m%dT%H%M%S"),
        device=device,
        date=now.strftime("%Y-%m-%d"),
        commit=evidence.commit(),
        source=evidence.source_hash()[:12],
    )
    print(f"{device}, {len(chosen)} workloads -> {path}", flush=True)
    wrong = []
    with open(path, "a", newline="") as file:
        rows = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if file.tell() == 0:
            rows.writeheader()

        def write(workload, provider, version, entry, flops) -> None:
            seconds = statistics.median(entry.seconds)
            tflops = flops / seconds / 1e12
            spread = (max(entry.seconds) - min(entry.seconds)) / seconds
            host_bound = int(on_gpu and seconds < 4e-4 and entry.host_bound > args.rounds // 2)
            rows.writerow(
                shared
                | dict(
                    workload=workload,
                    provider=provider,
                    version=version,
                    direction=entry.direction,
                    ms=f"{seconds * 1e3:.4f}",
                    tflops=f"{tflops:.3f}" if tflops < 10 else f"{tflops:.1f}",
                    spread=f"{spread:.3f}",
                    host_bound=host_bound,
                )
            )
            print(
                f"  {provider:14s} {entry.direction:16s} {seconds * 1e3:10.3f} ms "
                f"{tflops:8.2f} TFLOP/s{'  host-bound' if host_bound else ''}",
                flush=True,
            )

        if on_gpu and any(workload.group == "grid" for workload in chosen):
            print(CEILING, flush=True)
            write(CEILING, "jax_matmul", providers.version("jax_flash"), matmul(args), 2 * 8192**3)
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
                flops = workload.flops(entry.direction)
                write(workload.name, entry.provider, version, entry, flops)
            file.flush()
            del timed
    if wrong:
        print(f"not measured, or outputs differ: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
