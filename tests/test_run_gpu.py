"""The GPU runner itself, on any machine: what it counts and what it takes for a clean run."""

import stat

import pytest

from tests import run_gpu

SUITE = """
import pytest
def test_good(): pass
def test_bad(): assert False
@pytest.mark.skip(reason="why")
def test_skipped(): pass
@pytest.fixture
def broken(): raise ValueError
def test_error(broken): pass
"""


def test_counts_are_those_of_pytest(tmp_path):
    (tmp_path / "test_it.py").write_text(SUITE)
    counts = run_gpu.run_pytest([str(tmp_path), "-q", "-p", "no:cacheprovider"])
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 2, 1)
    assert counts["exit_code"] == 1
    names = [test.rsplit("::")[-1] for test in counts["failed_tests"]]
    assert names == ["test_bad", "test_error"]


def test_failed_tests_run_again_and_only_they(tmp_path, monkeypatch):
    """Their new results take the place of the old; what does not run at all changes nothing."""
    before = dict(passed=7, failed=2, skipped=1, exit_code=1, seconds=5, failed_tests=["a", "b"])
    seen = []

    def run_pytest(arguments):
        seen.append(arguments)
        return results.pop(0)

    monkeypatch.setattr(run_gpu, "run_pytest", run_pytest)
    again = dict(passed=1, failed=1, skipped=0, exit_code=1, seconds=2, failed_tests=["b"])
    results = [again, dict(again, passed=0, failed=0), dict(again, failed=0, exit_code=0)]
    after = run_gpu.run_again(before, "2", ["-q"])
    assert seen == [["a", "b", "-n", "2", "-q"]]
    assert (after["passed"], after["failed"], after["skipped"]) == (8, 1, 1)
    assert (after["failed_tests"], after["ran_again"]) == (["b"], ["a", "b"])
    nothing_ran = run_gpu.run_again(after, "2", [])
    assert (nothing_ran["passed"], nothing_ran["failed"]) == (8, 1) and nothing_ran["exit_code"]
    good = run_gpu.run_again(after, "2", [])
    assert (good["passed"], good["failed"], good["exit_code"]) == (9, 0, 0)


def test_pytest_that_cannot_start_is_no_success(tmp_path):
    counts = run_gpu.run_pytest(["--no-such-option"])
    assert counts["passed"] == 0 and counts["exit_code"] != 0


@pytest.mark.parametrize(
    "log, errors",
    [
        ("========= ERROR SUMMARY: 0 errors", 0),
        ("========= Invalid __global__ write\n========= ERROR SUMMARY: 3 errors", 3),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 2),
        ("========= COMPUTE-SANITIZER", None),  # died on the way: nothing is known
    ],
)
def test_sanitizer_errors_are_read_from_its_log(log, errors, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\nprintf "%s" "{log}" > "$4"\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert run_gpu.sanitize("memcheck", ["tests/none.py"])["errors"] == errors


def test_a_batch_on_which_the_tool_dies_runs_again_test_by_test(monkeypatch):
    """Each test counts once, and what the tool never finishes is named and is not clean."""
    tests = [f"tests/test_it.py::test_{i}" for i in range(30)]
    calls = []

    def sanitize(tool, batch):
        calls.append(list(batch))
        # test_3 kills every process, test_4 only one that it shares.
        died = tests[3] in batch or (tests[4] in batch and len(batch) > 1)
        counts = dict(passed=len(batch), failed=0, skipped=0)
        return counts | {"errors": None if died else 0}

    monkeypatch.setattr(run_gpu, "collect", lambda arguments: tests)
    monkeypatch.setattr(run_gpu, "sanitize", sanitize)
    result = run_gpu.run_sanitizer("memcheck", [])
    assert result["passed"] == 29 and result["errors"] == 0
    assert result["unfinished"] == [tests[3]]
    assert sum(len(batch) == 1 for batch in calls) == 7 + 8  # the batches of both: one of four each
    assert not run_gpu.is_clean(result)
    assert run_gpu.is_clean(result | {"unfinished": []})


def test_clean_needs_tests_that_passed_and_nothing_found():
    good = dict(passed=5, failed=0, skipped=0, errors=0, unfinished=[])
    assert run_gpu.is_clean(good)
    for change in ({"passed": 0}, {"failed": 1}, {"errors": 2}):
        assert not run_gpu.is_clean(good | change)


def test_collect_finds_gpu_tests_alone():
    found = run_gpu.collect(["tests/test_racecheck.py", "-k", "varlen"])
    assert found == [
        f"tests/test_racecheck.py::test_racecheck_varlen[{dtype}]"
        for dtype in ("float16", "float32")
    ]
