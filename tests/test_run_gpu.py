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
    result = run_gpu.run_sanitizer("memcheck", ["-k", "nothing"])
    assert result["errors"] == errors
    assert result["selection"].startswith("-m gpu") and result["selection"].endswith("-k nothing")
    assert run_gpu.is_clean(result) is False  # no test passed under this tool
    assert run_gpu.is_clean(result | {"passed": 1}) == (errors == 0)
