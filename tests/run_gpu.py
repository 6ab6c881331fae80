"""Runs the whole suite on this machine's NVIDIA GPU, then under compute-sanitizer, and reports.

    python -m tests.run_gpu                          # make gpu-test: all three parts
    python -m tests.run_gpu --parts tests -x         # one part; the rest goes to pytest
    python -m tests.run_gpu --parts memcheck -k varlen
    python -m tests.run_gpu --parts failed --dist loadfile    # what failed in the report, once more

The parts: `tests` is the suite, gpu-marked tests and all others; `failed` runs the tests again that
the report names as failed (an illegal instruction in one takes all later ones of its process with
it) and puts the new results in place of the old; `memcheck` and `racecheck` repeat
gpu-marked tests under compute-sanitizer, every buffer an allocation of its own so that a stray
access cannot land in a neighbour. The report, benchmarks/results/<device>/gpu_tests.json, carries
the hash of the sources (benchmarks/evidence.py); parts run at different times gather in one report
as long as the sources are the same.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence

from benchmarks import evidence

# racecheck costs some hundred times the run time: one shape of every kernel, forward and backward.
RACECHECK = "racecheck"
BATCH = 12  # tests a process of compute-sanitizer, at most


def run_pytest(arguments: list[str], wrapper: Sequence[str] = (), env: dict | None = None) -> dict:
    """pytest in a process of its own -> its counts, exit code and seconds."""
    with tempfile.NamedTemporaryFile(suffix=".xml") as report:
        command = [*wrapper, sys.executable, "-m", "pytest", f"--junitxml={report.name}"]
        begin = time.monotonic()
        print("+", *command, *arguments, flush=True)
        code = subprocess.run(
            command + arguments, cwd=evidence.ROOT, env=os.environ | (env or {}), check=False
        ).returncode
        seconds = time.monotonic() - begin
        try:
            suite = ElementTree.parse(report.name).getroot().find("testsuite")
            total, failures, errors, skipped = (
                int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")
            )
            failed_tests = [
                f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}"
                for case in suite.iter("testcase")
                if case.find("failure") is not None or case.find("error") is not None
            ]
        except ElementTree.ParseError:  # pytest died before it could write
            total = failures = errors = skipped = 0
            failed_tests = []
    failed = failures + errors
    return dict(
        passed=total - failed - skipped,
        failed=failed,
        skipped=skipped,
        exit_code=code,
        seconds=round(seconds),
        failed_tests=failed_tests,
    )


def run_again(before: dict, workers: str, arguments: list[str]) -> dict:
    """The failed tests of `before` once more -> its counts with the new results in their place."""
    tests = before.get("failed_tests", [])
    if not tests:
        return before
    result = run_pytest([*tests, "-n", workers, *arguments])
    ran = result["passed"] + result["failed"] + result["skipped"]
    if ran != len(tests):
        print(f"failed: {ran} of {len(tests)} tests ran: the report stays as it is", flush=True)
        return before | dict(exit_code=result["exit_code"] or 1)
    again = before.get("ran_again", []) + tests
    return before | dict(
        passed=before["passed"] + result["passed"],
        failed=result["failed"],
        skipped=before["skipped"] + result["skipped"],
        exit_code=result["exit_code"],
        seconds=before["seconds"] + result["seconds"],
        failed_tests=result["failed_tests"],
        ran_again=again,
    )


def collect(arguments: list[str]) -> list[str]:
    """The ids of the gpu-marked tests that pytest would run with `arguments`."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu", *arguments]
    run = subprocess.run(command, cwd=evidence.ROOT, capture_output=True, text=True, check=False)
    return [line for line in run.stdout.splitlines() if line.startswith("tests/") and "::" in line]


def sanitize(tool: str, tests: Sequence[str]) -> dict:
    """One process of compute-sanitizer over our kernels in `tests` -> counts and errors found."""
    with tempfile.NamedTemporaryFile(suffix=".log", mode="r") as log:
        wrapper = ["compute-sanitizer", "--tool", tool, "--log-file", log.name]
        wrapper += ["--kernel-name", "kernel_substring=jax_flash", "--print-limit", "20"]
        env = {
            "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
            "JAX_FLASH_TESTS_PLAIN_ON_CPU": "1",
            "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer=",
        }
        result = run_pytest([*tests, "-q", "-p", "no:xdist", "--timeout=3000"], wrapper, env)
        text = log.read()
    summaries = re.findall(r"(?:ERROR SUMMARY: (\d+)|RACECHECK SUMMARY: (\d+))", text)
    # No summary: the tool did not get to its end, which is no clean bill of health.
    result["errors"] = sum(int(a or b) for a, b in summaries) if summaries else None
    if result["errors"]:
        print("\n".join(text.splitlines()[-40:]), flush=True)
    return result


def run_sanitizer(tool: str, arguments: list[str], workers: int = 4) -> dict:
    """compute-sanitizer over the selected gpu-marked tests, a few tests a process.

    The tool dies of itself now and then, the sooner the more a process compiles. The tests of such
    a batch run again alone; those that it never finishes are `unfinished`.
    """
    selection = [*arguments]
    if tool == "racecheck" and "-k" not in arguments:
        selection += ["-k", RACECHECK]
    tests = collect(selection or ["tests"])
    count = min(len(tests), max(workers, -(-len(tests) // BATCH)))
    batches = [tests[i::count] for i in range(count)]
    total = dict.fromkeys(("passed", "failed", "skipped", "errors"), 0)
    unfinished: list[str] = []
    begin = time.monotonic()

    def run(batch: list[str]) -> list[tuple[list[str], dict]]:
        result = sanitize(tool, batch)
        if result["errors"] is not None or len(batch) == 1:
            return [(batch, result)]
        return [pair for test in batch for pair in run([test])]

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for pairs in pool.map(run, batches):
            for batch, result in pairs:
                if result["errors"] is None:
                    unfinished += batch
                    continue
                for name in total:
                    total[name] += result[name]
    return dict(
        tool=tool,
        selection=" ".join(selection) or "all",
        **total,
        unfinished=unfinished,
        seconds=round(time.monotonic() - begin),
    )


def is_clean(result: dict) -> bool:
    """Tests ran, none failed, the tool finished each of them and found nothing."""
    wrong = result["failed"] or result["errors"] or result["unfinished"]
    return result["passed"] > 0 and not wrong


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="tests,memcheck,racecheck")
    parser.add_argument("--workers", default="4", help="test processes of the first part")
    args, rest = parser.parse_known_args(argv)
    parts = args.parts.split(",")
    if unknown := set(parts) - {"tests", "failed", "memcheck", "racecheck"}:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the tests need the memory
    # Plain forms are compiled to run once: a search for their fastest matmul takes minutes.
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " --xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    )
    import jax

    if jax.default_backend() != "gpu":
        sys.exit("no GPU: JAX's default backend is " + jax.default_backend())
    device = evidence.device_name()
    path = evidence.device_folder(device) / "gpu_tests.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    if report.get("source_hash") != evidence.source_hash():
        report = {"source_hash": evidence.source_hash(), "tests": {}, "sanitizers": []}
    report |= dict(
        device=device,
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        commit=evidence.commit(),
        jax=jax.__version__,
        python=sys.version.split()[0],
    )
    good = True

    def save():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n")

    if "tests" in parts:
        report["tests"] = run_pytest(["tests", "-n", args.workers, *rest])
        report["tests"]["selection"] = " ".join(rest) or "all"
        good &= report["tests"]["exit_code"] == 0
        save()
    if "failed" in parts:
        report["tests"] = run_again(report["tests"], args.workers, rest)
        good &= report["tests"].get("exit_code") == 0
        save()
    for tool in ("memcheck", "racecheck"):
        if tool not in parts:
            continue
        if not shutil.which("compute-sanitizer"):
            print(f"{tool}: not run, compute-sanitizer is not on PATH", flush=True)
            continue
        result = run_sanitizer(tool, rest)
        report["sanitizers"] = [run for run in report["sanitizers"] if run["tool"] != tool]
        report["sanitizers"].append(result)
        good &= is_clean(result)
        save()
    print(json.dumps(report, indent=2))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
