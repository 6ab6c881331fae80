"""benchmarks.variants without a GPU: what it builds can be loaded and takes its Call."""

import ctypes
import os
import shutil

import numpy as np
import pytest

from benchmarks.variants import __main__ as variants
from benchmarks.variants import sanitize


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_variant_builds_and_takes_the_same_call(direction, tmp_path):
    if not (shutil.which("nvcc") or os.path.exists("/usr/local/cuda/bin/nvcc")):
        pytest.skip("no nvcc")
    csrc = variants.evidence.ROOT / "csrc"
    said = variants.build(tmp_path, "mine", csrc, direction, 128, fp16=False)
    assert "C75" not in said  # no serialised wgmma
    module = ctypes.CDLL(str(variants.library(tmp_path, "mine", direction, 128)))
    assert module.call_bytes() == ctypes.sizeof(variants.Call)
    assert variants.load(tmp_path, "mine", direction, 128) is not None
    assert variants.load(tmp_path, "other", direction, 128) is None


def test_sizes_cannot_hide_a_transpose():
    """Most problems have T != S or rows that fill no tile, and several heads and batch entries."""
    for direction in ("forward", "backward"):
        shapes = [problem.shape for problem, _ in variants.problems(64, direction)]
        assert any(s["seq_q"] != s["seq_k"] for s in shapes)
        assert any(s["seq_q"] % 64 for s in shapes) and any(s["seq_k"] < 64 for s in shapes)
        assert any(s["heads"] != s["kv_heads"] > 1 for s in shapes)
        assert any(s["batch"] > 1 < s["heads"] != s["batch"] for s in shapes)


@pytest.mark.parametrize(
    "said, code",
    [
        ("0 of 3 calls failed\n========= ERROR SUMMARY: 0 errors", 0),
        ("0 of 3 calls failed\n========= ERROR SUMMARY: 10 errors", 1),
        ("1 of 3 calls failed\n========= ERROR SUMMARY: 0 errors", 1),
        ("0 of 0 calls failed\n========= ERROR SUMMARY: 0 errors", 1),
        ("0 of 3 calls failed\n========= RACECHECK SUMMARY: 0 hazards displayed", 0),
        ("0 of 3 calls failed", 1),  # the tool died
        ("========= ERROR SUMMARY: 0 errors", 1),  # the calls did
    ],
)
def test_sanitized_is_clean_when_all_ran_and_nothing_was_found(said, code, tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\nprintf '{said}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "mine_forward_64.so").touch()
    assert sanitize.main(["--name", "mine", "--folder", str(tmp_path)]) == code


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_sanitized_calls_have_what_their_pointers_name(direction):
    for problem, options in variants.problems(64, direction):
        arrays = sanitize.host_arrays(problem, direction, options.get("fp16", False))
        assert arrays["q"].shape[1] == problem.shape["seq_q"]
        assert arrays["k"].shape == arrays["v"].shape
        results = ("o", "lse") if direction == "forward" else ("dq", "dk", "dv")
        for name, array in arrays.items():
            if array.dtype.kind not in "iu":
                assert bool(np.isnan(array.astype(np.float32)).all()) == (name in results), name
