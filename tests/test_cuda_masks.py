"""The CUDA kernels' choice of tiles and element masks, compiled for the host: needs no GPU."""

import pathlib
import shutil
import subprocess

import pytest

CSRC = pathlib.Path(__file__).parent.parent / "csrc"


def test_tiles_and_masks_agree_with_the_definition(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not CSRC.is_dir():
        pytest.skip("no C++ compiler or no sources here")
    program = tmp_path / "masks_test"
    flags = ["-std=c++20", "-O2", "-Wall", "-Wno-unknown-pragmas", f"-I{CSRC}"]
    source = CSRC / "testing" / "masks_test.cc"
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
