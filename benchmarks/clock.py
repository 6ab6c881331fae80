"""The clock that all benchmarks share, and the file that takes their rows.

A call is timed in bursts of back-to-back launches between two synchronisations. On a GPU a burst
of one launch stands before each, and is taken off it, with one launch: what it takes to start the
device and to hear from it, 0.2 to 0.4 ms, a program pays once, and a burst of short calls with all
of them. All calls of a workload are interleaved: every round visits each once, in random order. A
row is the median over the rounds. Rows of two runs are not comparable: clocks and power differ by
several percent.
"""

from __future__ import annotations

import collections
import concurrent.futures
import csv
import dataclasses
import datetime
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax

from benchmarks import evidence, providers

_WAITING_BYTES = 4 << 30  # of results that nobody has waited for


@dataclasses.dataclass
class Timed:
    """One (provider, direction) of a workload, and the seconds a call took in each round."""

    provider: str
    direction: str
    call: Any  # one launch; has `refill(launches)` if a launch uses up its arguments
    launches: int = 1
    seconds: list[float] = dataclasses.field(default_factory=list)
    host_bound: int = 0
    calls: int = 1  # of the operator in one launch
    waiting: int = 32  # launches at most, beside the one that runs: their results take memory
    less_start: bool = dataclasses.field(default_factory=lambda: jax.default_backend() == "gpu")
    starts: list[float] = dataclasses.field(default_factory=list)  # seconds of one launch alone

    def burst(self) -> None:
        alone = 1 if self.less_start else 0
        refill = getattr(self.call, "refill", None)
        if refill is not None:
            self.launches = max(1, refill(self.launches + 2 * alone) - 2 * alone)
        if alone:
            self.starts.append(self._launch(1)[0])
        seconds, for_host, first = self._launch(self.launches + alone)
        if alone:
            seconds = max(seconds - statistics.median(self.starts), 0.1 * seconds)
        self.seconds.append(seconds / self.launches / self.calls)
        self.host_bound += for_host / first / self.calls > 0.85 * self.seconds[-1]

    def _launch(self, count: int) -> tuple[float, float, int]:
        """Seconds of so many launches, and those of the host for the first so many."""
        # What the host needs for a launch shows in the first ones: JAX lets 32 programs wait, and
        # then the host runs at the device's pace.
        first = min(16, count, self.waiting)
        results: collections.deque = collections.deque()
        with providers.environment(self.provider):
            start = time.perf_counter()
            for launch in range(count):
                results.append(self.call())
                if len(results) > self.waiting:
                    jax.block_until_ready(results.popleft())  # torch's tensors are passed by
                if launch == first - 1:
                    enqueued = time.perf_counter()
            providers.synchronise(results[-1])
            end = time.perf_counter()
        results_bytes = sum(getattr(x, "nbytes", 0) for x in jax.tree.leaves(results[-1]))
        self.waiting = int(min(32, max(3, _WAITING_BYTES // max(1, results_bytes))))
        return end - start, enqueued - start, first

    def warm_up(self, target: float) -> None:
        """Bursts of 1, of 2, and of as many launches as should fill `target` seconds, until one did
        that needed no more memory than the burst before it.

        The first calls of a run wait for memory that the allocator takes from the device, in the
        first cell above all. What they took does not say how many launches fill a burst: with too
        few, what was timed was how a burst starts.
        """
        less_start, self.less_start = self.less_start, False
        self.burst()
        asked = self.launches = 2
        self.burst()
        is_again = False
        while (wanted := self._launches(target)) > 1.1 * asked or not is_again:
            is_again = wanted <= 1.1 * asked
            asked = self.launches = asked if is_again else wanted
            self.burst()
        self.launches, self.less_start = wanted, less_start
        self.seconds.clear()
        self.host_bound = 0

    def _launches(self, target: float) -> int:
        launch = max(self.seconds[-1] * self.calls, 1e-7)
        return max(1, min(500, round(target / launch)))

    def median(self) -> float:
        return statistics.median(self.seconds)

    def spread(self) -> float:
        return (max(self.seconds) - min(self.seconds)) / self.median()


def build(
    jobs: Iterable[tuple[str, str, Callable]],
    report: Callable[[str], None],
    built_alone: Callable[[str], bool] = providers.built_alone,
) -> list[Timed]:
    """Compile every (provider, direction, maker), a few at a time; failures are reported."""
    jobs = list(jobs)
    built = []
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        futures = {
            (name, direction): pool.submit(make)
            for name, direction, make in jobs
            if not built_alone(name)
        }
    for name, direction, make in jobs:
        future = futures.get((name, direction))
        try:
            with providers.environment(name):
                call = future.result() if future else make()
            built.append(Timed(name, direction, call, calls=getattr(call, "calls", 1)))
        except Exception as error:  # one call that cannot be built must not end the run
            report(f"  {name} {direction}: FAILED: {first_line(error)}")
    return built


def time_all(timed: list[Timed], rounds: int, target: float, report) -> list[Timed]:
    """Fills in the seconds of all, interleaved; what cannot run is reported and left out."""
    for entry in list(timed):
        try:
            entry.warm_up(target)
        except Exception as error:  # out of memory, say
            report(f"  {entry.provider} {entry.direction}: FAILED: {first_line(error)}")
            timed.remove(entry)
    for _ in range(rounds):
        for entry in random.sample(timed, len(timed)):
            entry.burst()
    return timed


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:150]


def columns(*rates: str) -> tuple[str, ...]:
    """Of a file of rows; `rates` stand between the milliseconds and the spread."""
    shared = ("run", "device", "date", "commit", "source")
    timed = ("workload", "provider", "version", "direction", "ms")
    return (*shared, *timed, *rates, "spread", "host_bound")


class RowFile:
    """Appends rows to a CSV file, each with its run, device and source; tells them on the way."""

    def __init__(self, path, device: str, columns: tuple[str, ...]):
        self.columns = columns
        now = datetime.datetime.now(datetime.UTC)
        self.shared = dict(
            run=now.strftime("%Y%m%dT%H%M%S"),
            device=device,
            date=now.strftime("%Y-%m-%d"),
            commit=evidence.commit(),
            source=evidence.source_hash()[:12],
        )
        self.path = os.path.abspath(path)

    def __enter__(self):
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        self.file = open(self.path, "a", newline="")
        self._rows = csv.DictWriter(self.file, self.columns, lineterminator="\n")
        if self.file.tell() == 0:
            self._rows.writeheader()
        return self

    def __exit__(self, *error):
        self.file.close()

    def write(self, workload: str, version: str, entry: Timed, **rates: float) -> None:
        """One row and one line of text; `rates` are what a second would hold (TFLOP, GB)."""
        seconds = entry.median()
        host_bound = int(
            jax.default_backend() == "gpu"
            and seconds * entry.calls < 1e-3  # longer ones leave the host time
            and entry.host_bound > len(entry.seconds) // 2
        )
        self._rows.writerow(
            self.shared
            | dict(workload=workload, provider=entry.provider, version=version)
            | dict(direction=entry.direction, ms=f"{seconds * 1e3:.4f}")
            | {name: f"{rate:.3f}" if rate < 10 else f"{rate:.1f}" for name, rate in rates.items()}
            | dict(spread=f"{entry.spread():.3f}", host_bound=host_bound)
        )
        self.file.flush()
        units = {"tflops": "TFLOP/s", "gbs": "GB/s"}
        text = " ".join(f"{rate:8.2f} {units[name]}" for name, rate in rates.items())
        print(
            f"  {entry.provider:14s} {entry.direction:16s} {seconds * 1e3:10.3f} ms "
            f"{text}{'  host-bound' if host_bound else ''}",
            flush=True,
        )


def add_arguments(parser, all_providers: Iterable[str], default: str) -> None:
    """The options that every benchmark has."""
    others = [name for name in all_providers if name not in default.split(",")]
    parser.add_argument("--workloads", help="comma-separated shell patterns (default: by device)")
    parser.add_argument("--providers", default=default, help=f"also: {', '.join(others)}")
    parser.add_argument("--directions", default="", help=f"of {', '.join(providers.DIRECTIONS)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--target", type=float, default=0.0, help="seconds of one burst")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds for the whole run")
    parser.add_argument("--out", default="", help="CSV to append to (default: by device)")
    parser.add_argument("--list", action="store_true", help="print the workloads and stop")


def parse(parser, argv, all_providers: Iterable[str]):
    """`argv` parsed, names checked, --target and the lists filled in."""
    args = parser.parse_args(argv)
    args.providers = args.providers.split(",")
    args.directions = list(filter(None, args.directions.split(",")))
    unknown = set(args.providers) - set(all_providers)
    unknown |= set(args.directions) - set(providers.DIRECTIONS)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    args.target = args.target or (0.03 if jax.default_backend() == "gpu" else 0.5)
    return args
