"""Runs nvcc and fails if ptxas reports spills, a stack frame or a serialised wgmma (C75xx).

Up to ALLOWED bytes of spills pass: where a kernel uses all 255 registers, one version of ptxas
places the last few and the next does not, and a store and a load a tile cannot be measured.

Usage: check_ptxas.py nvcc ARGUMENTS...   (CMake's CUDA_COMPILER_LAUNCHER)
"""

import pathlib
import re
import subprocess
import sys

COMPILING = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
PROPERTIES = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
NOISE = re.compile(r"^(ptxas info\s*:|\s*\d+ bytes (stack frame|gmem)|$)")
ALLOWED = 16  # bytes a thread: four registers


def faults(report: str) -> list[str]:
    """One line for each kernel with spills or a stack frame, and for each C75xx message."""
    found, kernel = [], "?"
    for line in report.splitlines():
        if match := COMPILING.search(line):
            kernel = f"{match[1]} ({match[2]})"
        elif (match := PROPERTIES.search(line)) and any(int(n) > ALLOWED for n in match.groups()):
            found.append(f"{kernel}: {match[0]}")
        elif re.search(r"\bC75\d\d\b", line):
            found.append(line.strip())
    return found


def main(command: list[str]) -> int:
    run = subprocess.run(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    lines = (line for line in run.stdout.splitlines() if not NOISE.match(line))
    for line in lines:
        print(line, flush=True)
    if run.returncode != 0:
        return run.returncode
    found = faults(run.stdout)
    for fault in found:
        print(f"error: ptxas: {fault}", file=sys.stderr)
    if found and "-o" in command:
        pathlib.Path(command[command.index("-o") + 1]).unlink(missing_ok=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
