"""benchmarks.variants without a GPU: what it builds can be loaded and takes its Call."""

import ctypes
import os
import shutil

import pytest

from benchmarks.variants import __main__ as variants


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
