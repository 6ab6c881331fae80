"""Random calls, forward and backward, against the float64 definition, by the thousand.

    python -m tests.soak --cases 10000 --seed 1 --seconds 300
    python -m tests.soak --seed 1 --only 4711          # one case of that run again, by itself
    python -m tests.soak --labels 'varlen,!dropout'    # signatures with and without an option

Every case draws a compiled signature (shapes, types, static options: tests/soak_cases.py) and
fresh data for it: tensors, lengths, offsets, cu_seqlens that may be garbage, keys of dropout, block
masks, NaN in rows that do not exist. The rule of error is the suite's (tests/helpers.py). Worker
processes compute the definition; the device runs ours and the plain form of the same type. A case
that hangs ends the run. The report is benchmarks/results/<device>/soak.json.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import datetime
import json
import multiprocessing
import os
import pathlib
import sys
import threading
import time

import numpy as np


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
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--hang", type=float, default=60, help="seconds without a case: give up")
    parser.add_argument("--max-failures", type=int, default=20, help="give up after so many")
    parser.add_argument("--only", type=int, help="run the case of this index alone")
    parser.add_argument("--out", default="", help="report (default: by device, on a GPU)")
    return parser.parse_args(argv)


class Programs:
    """The two compiled programs of each signature: ours, and the plain form."""

    def __init__(self, implementation: str):
        self.implementation = implementation
        self.locks = collections.defaultdict(threading.Lock)
        self.compiled = {}

    def get(self, signature):
        import jax

        with self.locks[signature]:
            if signature not in self.compiled:
                ours = jax.jit(lambda *args: self._ours(signature, *args))
                plain = jax.jit(lambda *args: self._plain(signature, *args))
                self.compiled[signature] = ours, plain
            return self.compiled[signature]

    def _call(self, s, operands, q, k, v):
        """(out, lse or None) of the public function, as a user would write the call."""
        import jax
        import jax.numpy as jnp

        import jax_flash

        options = dict(
            scale=s.scale,
            is_causal=s.is_causal,
            causal_offset=operands.get("causal_offset", 0),
            local_window_size=s.window,
            deterministic=s.deterministic,
            return_lse=s.lse,
            implementation=self.implementation,
        )
        if s.offset == "bottom_right":
            options["causal_offset"] = "bottom_right"
        if s.rate:
            key = jax.random.wrap_key_data(operands["dropout_key"])
            options |= dict(dropout_rate=s.rate, dropout_key=key)
        if s.sequences:
            q, k, v = q[0], k[0], v[0]
            cu_q, cu_k = operands["cu_seqlens_q"], operands["cu_seqlens_k"]
            if s.packing == "qkv":
                call = jax_flash.varlen_attention_qkvpacked
                result = call(jnp.stack([q, k, v], -3), cu_q, **options)
            elif s.packing == "kv":
                call = jax_flash.varlen_attention_kvpacked
                result = call(q, jnp.stack([k, v], -3), cu_q, cu_k, **options)
            else:
                result = jax_flash.varlen_attention(q, k, v, cu_q, cu_k, **options)
            result = jax.tree.map(lambda x: x[None], result)
        else:
            for name in ("query_seq_lengths", "key_value_seq_lengths"):
                options[name] = operands.get(name)
            if s.block_size is not None:
                options |= dict(block_mask=operands["block_mask"], block_size=s.block_size)
            if s.packing == "qkv":
                result = jax_flash.attention_qkvpacked(jnp.stack([q, k, v], -3), **options)
            elif s.packing == "kv":
                result = jax_flash.attention_kvpacked(q, jnp.stack([k, v], -3), **options)
            else:
                result = jax_flash.attention(q, k, v, **options)
        return result if s.lse else (result, None)

    def _ours(self, s, operands, q, k, v, dout, dlse):
        import jax

        (out, lse), pull = jax.vjp(lambda *qkv: self._call(s, operands, *qkv), q, k, v)
        return out, lse, *pull((dout, dlse if s.lse else None))

    def _plain(self, s, bits, q, k, v, dout, dlse):
        import jax.numpy as jnp

        from tests import helpers

        count = int(np.prod(s.scores))
        ok, keep = (
            None if x is None else jnp.unpackbits(x, count=count).reshape(s.scores).astype(bool)
            for x in bits
        )
        dlse = jnp.where(ok.any(-1), dlse, 0) if s.lse else jnp.zeros_like(dlse)
        scale = s.head_dim**-0.5 if s.scale is None else s.scale
        (out, _), grads = helpers.plain_attention(
            (q, k, v), (dout, dlse), ok, keep, scale=scale, rate=s.rate
        )
        return out, None, *grads


def poisoned(case, arrays):
    """q, k, v, dO with NaN in the rows that lie outside lengths and sequences."""
    from tests import soak_cases

    rows_q, rows_k = soak_cases.existing_rows(case)
    found = []
    for array, rows in zip(arrays, (rows_q, rows_k, rows_k, rows_q), strict=True):
        array = array.copy()
        array[~rows] = np.nan
        found.append(array)
    return found


def run_case(case, seed, programs, device, submit) -> tuple[float, list[str]]:
    """One case on the device and its judgement -> (worst ratio, complaints)."""
    import jax

    from tests import helpers, soak_cases

    bits = submit(soak_cases.prepare, case)
    *arrays, dlse = soak_cases.tensors(case, seed)
    ok = np.unpackbits(bits[0], count=int(np.prod(case.signature.scores)))
    seen = ok.reshape(case.signature.scores).any(-1)
    seen_dlse = np.where(seen, dlse, np.float32(0))  # an empty row's lse has no derivative
    ours_program, plain_program = programs.get(case.signature)
    given = poisoned(case, arrays) if case.poisoned else arrays
    with jax.default_device(device):
        ours = jax.device_get(ours_program(case.operands, *given, seen_dlse))
        again = None
        if case.index % 8 == 0:
            again = jax.device_get(ours_program(case.operands, *given, seen_dlse))
    with helpers.plain_device() if device.platform == "gpu" else jax.default_device(device):
        plain = jax.device_get(plain_program(bits, *arrays, dlse))
    ratio, complaints = submit(soak_cases.judge, case, seed, bits, ours, plain)
    if again is not None:
        always = 5 if case.signature.deterministic else 2  # out and lse; else the gradients as well
        for name, a, b in list(zip(("out", "lse", "dq", "dk", "dv"), ours, again))[:always]:
            if a is not None and a.tobytes() != b.tobytes():
                complaints.append(f"{name}: other bits the second time")
    return ratio, complaints


class Watch:
    """Ends the process, with a report, when no case has been finished for too long."""

    def __init__(self, seconds: float, on_hang):
        self.seconds, self.on_hang, self.running = seconds, on_hang, {}
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.thread = threading.Thread(target=self._loop, daemon=True)
        self.thread.start()

    @contextlib.contextmanager
    def case(self, index: int):
        with self.lock:
            self.running[index] = time.monotonic()
        try:
            yield
        finally:
            with self.lock:
                del self.running[index]

    def _loop(self):
        while not self.stopped.wait(min(1, self.seconds / 4)):
            with self.lock:
                late = [i for i, t in self.running.items() if time.monotonic() - t > self.seconds]
            if late:
                self.on_hang(sorted(late))


class Tally:
    """What the cases so far have shown."""

    def __init__(self, limit: int):
        self.cases, self.failures, self.limit = 0, [], limit
        self.worst, self.worst_case = 0.0, None
        self.counts = collections.Counter()
        self.lock = threading.Lock()

    def add(self, case, ratio: float, complaints: list[str]) -> None:
        with self.lock:
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
    import jax

    from benchmarks import evidence
    from tests import helpers, soak_cases

    # Without this the plain form would run in TF32 on a GPU.
    jax.config.update("jax_default_matmul_precision", "highest")
    on_gpu = jax.default_backend() == "gpu"
    implementation = args.implementation or ("cuda" if on_gpu else "cpu")
    device = helpers.device(implementation)
    name = evidence.device_name()
    path = args.out or (evidence.device_folder(name) / "soak.json" if on_gpu else "")
    if args.only is not None:
        path = ""
    labels = [name for name in args.labels.split(",") if name]
    pool = soak_cases.signatures(args.seed, args.signatures, labels)
    order = np.random.default_rng((args.seed, 1)).integers(len(pool), size=args.cases)
    indices = range(args.cases) if args.only is None else [args.only]
    programs, tally = Programs(implementation), Tally(args.max_failures)
    begin = time.monotonic()

    def report(hung=()):
        seconds = time.monotonic() - begin
        content = dict(
            device=name,
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
            commit=evidence.commit(),
            source_hash=evidence.source_hash(),
            jax=jax.__version__,
            implementation=implementation,
            kernels=os.environ.get("JAX_FLASH_CUDA_KERNELS", "") or "as dispatched",
            seed=args.seed,
            signatures=args.signatures,
            labels=args.labels,
            cases=tally.cases,
            failed=len(tally.failures),
            failures=tally.failures,
            hung=list(hung),
            worst_ratio=round(tally.worst, 4),
            worst_case=tally.worst_case,
            seconds=round(seconds),
            counts=dict(sorted(tally.counts.items())),
        )
        print(json.dumps(content, indent=2), flush=True)
        if path:
            pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
            pathlib.Path(path).write_text(json.dumps(content, indent=2) + "\n")

    def give_up(late):
        print(f"HUNG: cases {late} run for more than {args.hang} s", flush=True)
        report(late)
        os._exit(3)

    with contextlib.ExitStack() as stack:
        if args.workers and args.only is None:
            # Workers that never touch the device, one thread each.
            limits = {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            before = {name: os.environ.get(name) for name in limits}
            os.environ.update(limits)
            executor = stack.enter_context(
                concurrent.futures.ProcessPoolExecutor(
                    args.workers, mp_context=multiprocessing.get_context("spawn")
                )
            )
            list(executor.map(abs, range(args.workers * 4)))  # all are started, with these limits
            for variable, value in before.items():
                os.environ.pop(variable) if value is None else os.environ.update({variable: value})
            threads = args.workers + 4

            def submit(function, *arguments):
                return executor.submit(function, *arguments).result()
        else:
            threads = 1

            def submit(function, *arguments):
                return function(*arguments)

        watch = Watch(args.hang, give_up)

        def one(index):
            if time.monotonic() - begin > args.seconds or tally.full:
                return
            case = soak_cases.draw_case(pool[order[index]], args.seed, index)
            with watch.case(index):
                try:
                    ratio, complaints = run_case(case, args.seed, programs, device, submit)
                except Exception as error:  # a call that raises has failed; the others go on
                    ratio, complaints = 0.0, [f"{type(error).__name__}: {str(error)[:500]}"]
            tally.add(case, ratio, complaints)
            if tally.cases % 1000 == 0:
                print(
                    f"{tally.cases} cases, {len(tally.failures)} failed, worst {tally.worst:.3f}, "
                    f"{time.monotonic() - begin:.0f} s",
                    flush=True,
                )

        with concurrent.futures.ThreadPoolExecutor(threads) as runners:
            list(runners.map(one, indices))
        watch.stopped.set()
    report()
    return 1 if tally.failures or not tally.cases else 0


if __name__ == "__main__":
    sys.exit(main())
