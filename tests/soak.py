"""Random calls, forward and backward, against the float64 definition, by the thousand.

    python -m tests.soak --cases 10000 --seed 1 --seconds 300
    python -m tests.soak --seed 1 --only 4711          # one case of that run again, by itself
    python -m tests.soak --labels 'varlen,!dropout'    # signatures with and without an option

Every case draws a compiled signature (shapes, types, static options: tests/soak_cases.py) and
fresh data for it: tensors, lengths, offsets, cu_seqlens that may be garbage, keys of dropout, block
masks, NaN in rows that do not exist. The rule of error is the suite's (tests/helpers.py). Each of
the worker processes (tests/soak_worker.py) has a share of the signatures, which no other compiles:
the device runs ours and the plain form of the same type, a core beside it the definition. A case
that hangs ends the run. The report is benchmarks/results/<device>/soak.json.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import datetime
import json
import multiprocessing.connection
import os
import pathlib
import sys
import threading
import time


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=20261120)
    parser.add_argument("--seconds", type=float, default=1e9, help="no new case after so long")
    parser.add_argument("--signatures", type=int, default=200, help="programs to compile")
    parser.add_argument("--labels", default="", help="as in the report's counts, of signatures")
    parser.add_argument("--implementation", default=None, help="default: cuda on a GPU, else cpu")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="0: a thread")
    parser.add_argument("--hang", type=float, default=60, help="seconds without a case: give up")
    parser.add_argument("--max-failures", type=int, default=20, help="give up after so many")
    parser.add_argument("--only", type=int, help="run the case of this index alone")
    parser.add_argument("--out", default="", help="report (default: by device, on a GPU)")
    return parser.parse_args(argv)


# Of worker processes: numpy on one core, and no pages given back that the next case asks for again
# (25 ms a case for 30: AMD EPYC, 2026-11-28).
WORKER = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
}


@dataclasses.dataclass
class Worker:
    """One process that runs cases, as seen by the one that hands them out."""

    connection: multiprocessing.connection.Connection
    process: multiprocessing.Process | None  # None: a thread
    share: collections.deque[int]  # cases of its signatures that nobody has run
    running: int | None = None
    since: float = dataclasses.field(default_factory=time.monotonic)  # it was last sent something
    is_done: bool = False

    def send(self, index: int | None) -> None:
        self.running, self.since, self.is_done = index, time.monotonic(), index is None
        with contextlib.suppress(OSError):  # it died: its end of the pipe will say so
            self.connection.send(index)


def start(args, plan) -> list[Worker]:
    """The workers; a signature's cases are all in one share."""
    from tests import soak_worker

    alone = args.only is not None or args.workers == 0
    shares = [collections.deque() for _ in range(1 if alone else args.workers)]
    for index in range(args.cases) if args.only is None else [args.only]:
        shares[plan.order[index] % len(shares)].append(index)
    before = {name: os.environ.get(name) for name in WORKER}
    os.environ.update(WORKER)
    context, workers = multiprocessing.get_context("spawn"), []
    for share in shares:
        here, there = multiprocessing.Pipe()
        job = dict(target=soak_worker.work, args=(there, plan, args.implementation), daemon=True)
        process = None if alone else context.Process(**job)
        (process or threading.Thread(**job)).start()
        if process:
            there.close()  # the worker has its own: when it ends, so does the pipe
        workers.append(Worker(here, process, share))
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    return workers


def hand_out(args, plan, workers: list[Worker], tally: Tally) -> list[int | None]:
    """Runs the cases, until all are done or too many have failed -> the hanging ones, if any."""
    alive = {worker.connection: worker for worker in workers}
    while alive:
        for connection in multiprocessing.connection.wait(list(alive), timeout=args.hang / 8):
            worker = alive[connection]
            try:
                result = connection.recv()
            except (EOFError, OSError):
                del alive[connection]
                if not worker.is_done:
                    tally.lost(plan, worker.running)
                continue
            if worker.running is not None:
                tally.add(plan.case(worker.running), *result)
            # Who has no more of its own takes from who has most.
            share = worker.share or max((other.share for other in workers), key=len)
            over = tally.full or tally.seconds > args.seconds
            worker.send(share.popleft() if share and not over else None)
        oldest = time.monotonic() - args.hang
        if late := [worker.running for worker in alive.values() if worker.since < oldest]:
            return late
    return []


class Tally:
    """What the cases so far have shown."""

    def __init__(self, limit: int):
        self.cases, self.failures, self.limit = 0, [], limit
        self.worst, self.worst_case = 0.0, None
        self.counts = collections.Counter()
        self.begin = time.monotonic()

    def add(self, case, ratio: float, complaints: list[str]) -> None:
        self.cases += 1
        self.counts.update(case.labels())
        if ratio > self.worst:
            self.worst, self.worst_case = ratio, case.index
        if complaints:
            self.failures.append(dict(case=case.index, complaints=complaints[:5]))
            print(f"case {case.index}: {'; '.join(complaints)}", flush=True)
            print(f"    {case.data}, NaN: {case.poisoned}, {case.signature}", flush=True)
            for name, value in case.operands.items():
                if name != "block_mask":
                    print(f"    {name} = {value.tolist()}", flush=True)
        if self.cases % 1000 == 0:
            print(
                f"{self.cases} cases, {len(self.failures)} failed, worst {self.worst:.3f}, "
                f"{self.seconds:.0f} s",
                flush=True,
            )

    def lost(self, plan, index: int | None) -> None:
        """A worker died: in this case, or before its first."""
        if index is None:
            print("a worker died before its first case", flush=True)
            self.failures.append(dict(case=None, complaints=["a worker died before its first"]))
        else:
            self.add(plan.case(index), 0.0, ["its worker died"])

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begin

    @property
    def full(self) -> bool:
        return len(self.failures) >= self.limit


def main(argv=None) -> int:
    args = parse(argv)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # Plain forms are compiled to run a few times: a search for their fastest matmul takes minutes.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    )
    from benchmarks import evidence
    from tests import soak_cases

    labels = [name for name in args.labels.split(",") if name]
    plan = soak_cases.Plan(args.seed, args.cases, args.signatures, labels)
    tally = Tally(args.max_failures)
    workers = start(args, plan)
    device = evidence.device_name()  # now: a GPU that hangs would not answer
    try:
        hung = hand_out(args, plan, workers, tally)
    finally:
        for worker in workers:
            if worker.process:
                worker.process.kill()
    if hung:
        print(f"HUNG: cases {hung} run for more than {args.hang} s", flush=True)
    report(args, device, tally, hung)
    return 3 if hung else 1 if tally.failures or not tally.cases else 0


def report(args, device: str, tally: Tally, hung) -> None:
    import jax

    from benchmarks import evidence

    on_gpu = jax.default_backend() == "gpu"
    content = dict(
        device=device,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        commit=evidence.commit(),
        source_hash=evidence.source_hash(),
        jax=jax.__version__,
        implementation=args.implementation or ("cuda" if on_gpu else "cpu"),
        kernels=os.environ.get("JAX_FLASH_CUDA_KERNELS", "") or "as dispatched",
        seed=args.seed,
        signatures=args.signatures,
        labels=args.labels,
        cases=tally.cases,
        failed=len(tally.failures),
        failures=tally.failures,
        hung=hung,
        worst_ratio=round(tally.worst, 4),
        worst_case=tally.worst_case,
        seconds=round(tally.seconds),
        counts=dict(sorted(tally.counts.items())),
    )
    print(json.dumps(content, indent=2), flush=True)
    path = args.out or (evidence.device_folder(device) / "soak.json" if on_gpu else "")
    if path and args.only is None:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        pathlib.Path(path).write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a thread that hangs is not waited for
