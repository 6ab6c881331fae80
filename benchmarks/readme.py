"""Rewrites the README's measured tables from the committed rows (make readme).

    python -m benchmarks.readme            # rewrite
    python -m benchmarks.readme --check    # exit 1 if the README is not up to date

A table stands between `<!-- measured: NAME -->` and `<!-- end -->`; nothing else is touched.
"""

from __future__ import annotations

import math
import re
import sys

from benchmarks import evidence
from benchmarks.rows import LABELS, Rows, load_all
from benchmarks.workloads import WORKLOADS

README = evidence.ROOT / "README.md"
_BLOCK = re.compile(r"(<!-- measured: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
DIRECTIONS = {
    "forward": "forward",
    "backward": "backward",
    "forward_backward": "forward + backward",
}


def _table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _caption(rows: Rows) -> str:
    path = rows.path.relative_to(evidence.ROOT).as_posix()
    dates = " to ".join(dict.fromkeys((rows.dates[0], rows.dates[-1])))
    return f"{rows.device}, {dates}, {', '.join(rows.versions)} ([rows]({path})).\n\n"


def _milliseconds(time: float | None) -> str:
    if not time:
        return "-"
    return f"{time:.0f}" if time >= 100 else f"{time:.3g}"


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def grid(rows: Rows) -> str:
    """TFLOP/s over the sequence length, with the ratio to each rival's time as geometric mean."""
    text = ""
    for direction in ("forward", "backward"):
        names = {
            name: WORKLOADS[name]
            for name, way in rows.ms
            if way == direction and name.startswith("grid/") and name in WORKLOADS
        }
        if not names:
            continue
        seqs = sorted({workload.seq for workload in names.values()})
        rivals = [provider for provider in rows.providers("grid/") if provider != "jax_flash"]
        header = [f"TFLOP/s {direction}", *(f"T={seq}" for seq in seqs)]
        header += [f"over {LABELS[rival]}" for rival in rivals]
        lines = []
        for head_dim in sorted({workload.head_dim for workload in names.values()}):
            for mask in ("full", "causal"):
                cells, line_names = [], []
                for seq in seqs:
                    name = f"grid/h{head_dim}/t{seq}/{mask}"
                    value = rows.tflops.get((name, direction), {}).get("jax_flash")
                    cells.append(f"{value:.0f}" if value else "")
                    line_names.append(name)
                for rival in rivals:
                    ratios = [rows.ratio(name, direction, rival) for name in line_names]
                    ratios = [ratio for ratio in ratios if ratio]
                    cells.append(f"{_mean(ratios):.2f}x" if ratios else "")
                if any(cells):
                    lines.append([f"H={head_dim}, {mask}", *cells])
        text += _table(header, lines) + "\n"
    return text


def options(rows: Rows, groups: tuple[str, ...]) -> str:
    """Milliseconds of single workloads, the measured directions side by side: ours and rivals'."""
    keys = [key for key in rows.ms if key[0].split("/")[0] in groups]
    if not keys:
        return ""
    measured = {name for name, _ in keys}
    directions = [way for way in DIRECTIONS if any(way == key[1] for key in keys)]
    found = {provider for key in keys for provider in rows.ms[key]}
    names = [provider for provider in LABELS if provider in found]
    lines = []
    for name in [name for name in WORKLOADS if name in measured]:
        cells = []
        for provider in names:
            times = [rows.ms.get((name, way), {}).get(provider) for way in directions]
            texts = [_milliseconds(time) for time in times]
            cells.append(" / ".join(texts) if any(times) else "")
        lines.append([f"`{name}`", *cells])
    header = "ms " + " / ".join(DIRECTIONS[way] for way in directions)
    return _table([header, *(LABELS[provider] for provider in names)], lines) + "\n"


def attention_gpu() -> str:
    parts = []
    for rows in load_all():
        text = grid(rows) + options(
            rows, ("dropout", "gqa", "mqa", "varlen", "window", "blocksparse", "long")
        )
        if text:
            parts.append(_caption(rows) + text)
    return "".join(parts) or "Not measured yet.\n"


def attention_cpu() -> str:
    parts = [(rows, options(rows, ("cpu",))) for rows in load_all()]
    return "".join(_caption(rows) + text for rows, text in parts if text) or "Not measured yet.\n"


def gpu_tests() -> str:
    lines = []
    for report in evidence.gpu_reports():
        sanitizers = ", ".join(
            f"{run['tool']}: {run['errors']} errors in {run['passed']} tests, "
            f"{len(run['unfinished'])} unfinished"
            for run in report["sanitizers"]
        )
        # Of pytest's arguments, those that leave tests out: a count means nothing without them.
        left_out = re.findall(r"(?:--deselect \S+|-[km] .*)", report["tests"]["selection"])
        lines.append(
            [report["device"], report["date"], f"jax {report['jax']}"]
            + [str(report["tests"][key]) for key in ("passed", "failed", "skipped")]
            + [f"`{' '.join(left_out)}`" if left_out else "all"]
            + [sanitizers or "not run", f"`{report['source_hash'][:12]}`"]
        )
    header = ["device", "date", "jax", "passed", "failed", "skipped"]
    header += ["tests", "compute-sanitizer", "source"]
    return _table(header, lines) if lines else "Not run yet.\n"


def soak() -> str:
    lines = []
    for report in evidence.soak_reports():
        cells = [report["device"], report["date"], report["seed"], report["cases"]]
        cells += [report["signatures"], report["failed"], len(report["hung"])]
        cells += [f"{report['worst_ratio']:.2f}", f"`{report['source_hash'][:12]}`"]
        lines.append([str(cell) for cell in cells])
    header = ["device", "date", "seed", "cases", "programs", "failed", "hung"]
    header += ["largest error over what is allowed", "source"]
    return _table(header, lines) if lines else "Not run yet.\n"


TABLES = {
    "attention-gpu": attention_gpu,
    "attention-cpu": attention_cpu,
    "gpu-tests": gpu_tests,
    "soak": soak,
}


def rewritten(text: str) -> str:
    """`text` with every measured block made anew.

    Raises:
      KeyError: a block names no table.
    """
    return _BLOCK.sub(
        lambda found: found[1] + "\n" + TABLES[found[2]]().rstrip("\n") + "\n\n" + found[3], text
    )


def main(argv: list[str]) -> int:
    text = README.read_text()
    new = rewritten(text)
    if argv == ["--check"]:
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
