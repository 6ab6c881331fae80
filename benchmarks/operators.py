"""Time the fused operators on this machine's JAX device: rows go to results/<device>/operators.csv.

    python -m benchmarks.operators                                  # all, all providers
    python -m benchmarks.operators --workloads 'softmax/*' --providers jax_flash,xla
    python -m benchmarks.operators --dry                            # tiny sizes: checks the script

Clock and options are those of benchmarks.run (benchmarks/clock.py). Rows have GB/s of the fewest
bytes that the operator must move, or TFLOP/s, and stand beside the device's copy and its product of
matrices in the same run. Operators of less than half a gigabyte run several times in a launch, on
arrays of their own. The backward is timed alone, from what the forward saved; where it may write
its result over that or over the cotangent, a launch is given copies to use up; so is packed rotary
in both directions. Rotary of queries and keys is the layer's, which turns both. For plain jnp
("xla") it is the time of forward and backward in one program less that of the forward. Rivals in
torch are recorded as CUDA graphs, so that none waits for Python. Liger's cross-entropy has no
backward of its own: there all have a row of both directions together.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory as well

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import clock, evidence, operator_providers, providers, workloads
from benchmarks.operator_providers import BACKWARD_BY_DIFFERENCE, PROVIDERS
from benchmarks.operator_workloads import WORKLOADS, Workload
from benchmarks.rows import CEILING, COPY_CEILING

COLUMNS = clock.columns("gbs", "tflops")


def build(workload: Workload, names, directions, report) -> list[clock.Timed]:
    """Compile every call of a workload; what cannot be built is reported."""
    data = jax.block_until_ready(workload.data())
    prepared = {}
    for name in names:
        try:
            prepared[name] = operator_providers.prepare(name, workload, data)
        except providers.Unsupported as reason:
            report(f"  {name}: not measured: {reason}")
    # Who has no backward of its own is compared in both directions together.
    together = "backward" in directions and any("backward" not in x for x in prepared.values())
    jobs = []
    for name, makers in prepared.items():
        wanted = dict.fromkeys((*directions, *(["forward_backward"] if together else [])))
        if name in BACKWARD_BY_DIFFERENCE and "backward" in wanted:
            del wanted["backward"]
            wanted |= dict.fromkeys(("forward", "forward_backward"))
        jobs += [(name, way, makers[way]) for way in wanted if way in makers]
    return clock.build(jobs, report, operator_providers.built_alone)


def _samples(entry: clock.Timed) -> list[np.ndarray]:
    """Some elements of each result of one call, or of the one to compare in its place."""
    result = getattr(entry.call, "compared", entry.call)()
    if entry.calls > 1:
        result = result[0]
    found = []
    for x in jax.tree.leaves(result):
        step = max(1, x.nbytes >> 21) | 1  # odd: not one column of a matrix
        x = x.reshape(-1)[::step]
        found.append(x.detach().cpu().float().numpy() if hasattr(x, "cpu") else np.asarray(x))
    return [x.astype(np.float32) for x in found]


def agreeing(workload: Workload, timed: list[clock.Timed], report) -> list[clock.Timed]:
    """The calls whose results are those of the first provider: a wrong kernel has no time.

    Every result of every direction counts. Where all rivals differ, ours is wrong and nothing is
    left. Dropout draws other bits in every library, so that there is nothing to compare.
    """
    if workload.dropout_rate or not timed:
        return timed
    bound = 1e-5 if workload.dtype == "float32" else 2e-2
    ours = timed[0].provider
    expected, rivals, wrong = {}, set(), set()
    for entry in timed:
        name, direction = entry.provider, entry.direction
        try:
            samples = _samples(entry)
        except Exception as error:  # one call that cannot run must not end the run
            report(f"  {name} {direction}: FAILED: {clock.first_line(error)}")
            wrong.add(name)
            continue
        if name == ours:
            expected[direction] = samples
        elif direction in expected:
            rivals.add(name)
            pairs = zip(samples, expected[direction], strict=True)
            error = max(float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs)
            if not error < bound:
                text = f"{name} and {ours} differ by {error:.2e} (bound {bound:g})"
                report(f"  MISMATCH: {direction}: {text}")
                wrong.add(name)
    if rivals and rivals <= wrong:
        return []
    return [entry for entry in timed if entry.provider not in wrong]


def with_differences(timed: list[clock.Timed]) -> list[clock.Timed]:
    """Beside what was timed: backwards as the difference of two times of the same round."""
    found = {(entry.provider, entry.direction): entry for entry in timed}
    for name in BACKWARD_BY_DIFFERENCE:
        pair = [found.get((name, way)) for way in ("forward_backward", "forward")]
        if all(pair):
            both, forward = (entry.seconds for entry in pair)
            seconds = [max(b - f, 1e-9) for b, f in zip(both, forward, strict=True)]
            host_bound = max(entry.host_bound for entry in pair)
            timed = [
                *timed,
                clock.Timed(name, "backward", None, 1, seconds, host_bound, pair[0].calls),
            ]
    return timed


def ceilings(dry: bool):
    """(name, what it does, GB, TFLOP) of the device's own limits: a copy, and bare products."""
    keys = jax.random.split(jax.random.key(0), 3)

    def normal(key, *shape):
        return jax.random.normal(key, [n // (64 if dry else 1) for n in shape], jnp.bfloat16)

    x = normal(keys[0], 16384, 32768)
    yield COPY_CEILING, "jax_copy", providers.compiled_with(jnp.copy, x), 2 * x.nbytes / 1e9, None
    for name, sizes in ((CEILING, (8192,) * 3), ("ceiling/matmul_mlp", (16384, 4096, 16384))):
        a, b = normal(keys[1], *sizes[:2]), normal(keys[2], *sizes[1:])
        tflop = 2 * a.size * b.shape[1] / 1e12
        yield name, "jax_matmul", providers.compiled_with(jnp.matmul, a, b), None, tflop


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    clock.add_arguments(parser, PROVIDERS, ",".join(PROVIDERS))
    parser.add_argument("--dry", action="store_true", help="tiny sizes, one round, no file kept")
    args = clock.parse(parser, argv, PROVIDERS)
    if args.dry:
        args.rounds, args.target = 1, 1e-3
    return args


def main(argv=None) -> int:
    args = parse(argv)
    if args.list:
        for workload in WORKLOADS.values():
            rate, unit = workload.gigabytes("forward"), "GB"
            rate, unit = (rate, unit) if rate else (workload.tflop("forward"), "TFLOP")
            print(f"{workload.name:32s} {rate:8.3f} {unit} forward")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        device = evidence.device_name()
        default = folder if args.dry else evidence.device_folder(device)
        return _run(args, device, args.out or os.path.join(default, "operators.csv"))


def _run(args, device: str, path) -> int:
    begin, wrong = time.monotonic(), []
    chosen = workloads.select(args.workloads or "*", WORKLOADS)
    directions = args.directions or ["forward", "backward"]
    print(f"{device}, {len(chosen)} workloads -> {path}", flush=True)

    def report(text: str) -> None:
        print(text, flush=True)

    with clock.RowFile(path, device, COLUMNS) as rows:

        def write(name, version, entry, gigabytes, tflop) -> None:
            done = {"gbs": gigabytes, "tflops": tflop}
            rates = {rate: x / entry.median() for rate, x in done.items() if x is not None}
            rows.write(name, version, entry, **rates)

        limits = list(ceilings(args.dry))
        entries = [clock.Timed(provider, "forward", call) for _, provider, call, *_ in limits]
        clock.time_all(list(entries), args.rounds, args.target, report)
        for (name, *_, gigabytes, tflop), entry in zip(limits, entries, strict=True):
            report(name)
            write(name, providers.library_version("jax"), entry, gigabytes, tflop)
        for index, workload in enumerate(chosen):
            if time.monotonic() - begin > args.budget:
                report(f"out of time, not measured: {', '.join(w.name for w in chosen[index:])}")
                break
            report(workload.name)
            workload = workload.small() if args.dry else workload
            timed = build(workload, args.providers, directions, report)
            timed = agreeing(workload, timed, report)
            timed = clock.time_all(timed, args.rounds, args.target, report)
            ours = {entry.direction for entry in timed if entry.provider == args.providers[0]}
            if not ours.issuperset(directions):
                wrong.append(workload.name)
            for entry in with_differences(timed):
                version = operator_providers.version(entry.provider)
                amounts = workload.gigabytes(entry.direction), workload.tflop(entry.direction)
                write(workload.name, version, entry, *amounts)
            del timed
    if wrong:
        print(f"not measured, or outputs differ: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
