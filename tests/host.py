"""Runs a test of csrc/testing that needs no GPU: compiled for the host, it says what is wrong."""

import pathlib
import shutil
import subprocess

import pytest

CSRC = pathlib.Path(__file__).parent.parent / "csrc"


def run(name: str, folder: pathlib.Path) -> None:
    """Compiles csrc/testing/<name>.cc in `folder`, runs it, and fails with what it prints."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not CSRC.is_dir():
        pytest.skip("no C++ compiler or no sources here")
    program = folder / name
    flags = ["-std=c++20", "-O2", "-Wall", "-Wno-unknown-pragmas", f"-I{CSRC}"]
    source = CSRC / "testing" / f"{name}.cc"
    subprocess.run([compiler, *flags, str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
