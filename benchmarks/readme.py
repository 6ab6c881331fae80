"""Rewrites the README's measured tables from the committed rows (make readme).

    python -m benchmarks.readme            # rewrite
    python -m benchmarks.readme --check    # exit 1 if the README is not up to date

A table stands between `<!-- measured: NAME -->` and `<!-- end -->`; nothing else is touched.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Sequence

from benchmarks import evidence, operator_workloads
from benchmarks.operator_providers import PROVIDERS
from benchmarks.rows import LABELS, ModelRows, Rows, load_all, load_models, load_operators
from benchmarks.workloads import WORKLOADS, Workload

README = evidence.ROOT / "README.md"
_BLOCK = re.compile(r"(<!-- measured: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
GROUPS = "dropout gqa gqa8 mqa varlen window deterministic blocksparse long".split()
_SHORT = {
    "jax.nn, cuDNN": "jc",
    "jax.nn, XLA": "jx",
    "torch, flash": "tf",
    "torch, cuDNN": "tc",
    "FlashAttention-3": "f3",
    "FlashAttention-4": "f4",
    "tokamax": "tm",
}
DIRECTIONS = {
    "forward": "forward",
    "backward": "backward",
    "forward_backward": "forward + backward",
}


def _table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _caption(rows: Rows | ModelRows) -> str:
    path = rows.path.relative_to(evidence.ROOT).as_posix()
    dates = " to ".join(dict.fromkeys((rows.dates[0], rows.dates[-1])))
    return f"{rows.device}, {dates}, {', '.join(rows.versions)} ([rows]({path})).\n\n"


def _milliseconds(time: float | None) -> str:
    if not time:
        return "-"
    return f"{time:.0f}" if time >= 100 else f"{time:.3g}"


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _grid_names(rows: Rows, direction: str) -> dict[str, Workload]:
    return {
        name: WORKLOADS[name]
        for name, way in rows.ms
        if way == direction and name.startswith("grid/") and name in WORKLOADS
    }


def _line(head_dim: int, mask: str, seqs: list[int]) -> list[str]:
    return [f"grid/h{head_dim}/t{seq}/{mask}" for seq in seqs]


def grid(rows: Rows) -> str:
    """TFLOP/s over the sequence length, with the ratio to each rival's time as geometric mean."""
    text = ""
    for direction in ("forward", "backward"):
        names = _grid_names(rows, direction)
        if not names:
            continue
        seqs = sorted({workload.seq for workload in names.values()})
        rivals = {
            LABELS[rival]: functools.partial(rows.ratio, rival=rival)
            for rival in rows.providers("grid/")
            if rival != "jax_flash"
        }
        if rows.other:
            rivals["FlashAttention-3 *"] = functools.partial(
                rows.other_ratio, rival="flash_attention_3"
            )
        header = [f"TFLOP/s {direction}", *(f"T={seq}" for seq in seqs)]
        header += [f"over {rival}" for rival in rivals]
        lines = []
        for head_dim in sorted({workload.head_dim for workload in names.values()}):
            for mask in ("full", "causal"):
                line_names = _line(head_dim, mask, seqs)
                values = [
                    rows.tflops.get((name, direction), {}).get("jax_flash") for name in line_names
                ]
                cells = [f"{value:.0f}" if value else "" for value in values]
                for ratio in rivals.values():
                    ratios = [ratio(name, direction) for name in line_names]
                    ratios = [ratio for ratio in ratios if ratio]
                    cells.append(f"{_mean(ratios):.2f}x" if ratios else "")
                if any(cells):
                    lines.append([f"H={head_dim}, {mask}", *cells])
        text += _table(header, lines) + "\n"
    return text


def best_rivals(rows: Rows) -> str:
    """Every cell of the grid against its fastest rival, and the geometric means over cuDNN."""
    seqs = sorted({w.seq for way in DIRECTIONS for w in _grid_names(rows, way).values()})
    lines, all_cells, means = [], {}, []
    for direction in ("forward", "backward"):
        names = _grid_names(rows, direction)
        for head_dim in sorted({workload.head_dim for workload in names.values()}):
            for mask in ("full", "causal"):
                found = [rows.best_rival(name, direction) for name in _line(head_dim, mask, seqs)]
                cells = [f"{pair[1]:.2f} {_SHORT[pair[0]]}" if pair else "" for pair in found]
                if any(cells):
                    lines.append([f"{direction}, H={head_dim}, {mask}", *cells])
                all_cells |= {
                    f"{direction} {name}": pair[1]
                    for name, pair in zip(_line(head_dim, mask, seqs), found, strict=True)
                    if pair
                }
        ratios = [rows.ratio(name, direction, "jax_nn_cudnn") for name in names]
        ratios = [ratio for ratio in ratios if ratio]
        if ratios:
            means.append(f"{direction} {_mean(ratios):.2f}x ({len(ratios)} cells)")
    if not all_cells:
        return ""
    behind = sum(ratio < 1 for ratio in all_cells.values())
    lowest = min(all_cells, key=all_cells.get)
    text = "How many times faster than the fastest rival of the cell, and which that is: "
    text += ", ".join(f"{short} {label}" for label, short in _SHORT.items()) + ".\n\n"
    text += _table(["ours over the best rival", *(f"T={seq}" for seq in seqs)], lines)
    text += f"\nOver jax.nn's cuDNN, geometric means: {', '.join(means)}. "
    text += f"Behind the best rival: {behind} of {len(all_cells)} cells; the lowest is "
    text += f"`{lowest}` at {all_cells[lowest]:.2f}.\n"
    if rows.other:
        path = rows.path.with_name("other_call.csv").relative_to(evidence.ROOT).as_posix()
        text += (
            f"\n\\* FlashAttention-3, FlashAttention-4 and tokamax by [their lead]({path}) over "
            "jax.nn's cuDNN, measured on an H200 2026-11-20, same shapes, other call.\n"
        )
    return text + "\n"


def option_costs(rows: Rows) -> str:
    """What an option costs: our time over that of the dense twin in the same run."""
    lines = []
    for name, workload in WORKLOADS.items():
        twin = workload.twin()
        if twin is None:
            continue
        share = workload.share()
        costs = [rows.cost(name, twin.name, way) for way in ("forward", "backward")]
        if not any(costs):
            continue
        cells = [f"{100 * (cost / share - 1):+.0f}%" if cost else "" for cost in costs]
        lines.append([f"`{name}`", f"`{twin.name}`", f"{share:.3g}", *cells])
    if not lines:
        return ""
    header = ["option", "dense twin", "its share of the work", "forward", "backward"]
    return (
        "What options cost: our time over our time for the dense twin in the same run, less the "
        "share of the work that is left (pairs; tiles of 128 x 128 for windows).\n\n"
        + _table(header, lines)
        + "\n"
    )


def model(rows: ModelRows) -> str:
    """A training step of a GPT, and where its time goes."""
    lines = []
    for row in rows.latest():
        cells = [LABELS.get(row["attention"], row["attention"]), f"{float(row['step_ms']):.1f}"]
        cells += [f"{float(row['tokens_per_s']):.0f}", f"{float(row['memory_gb']):.1f}"]
        cells.append(
            " / ".join(f"{float(row[name]):.1f}" for name in ("forward_ms", "backward_ms"))
        )
        lines.append(cells)
    header = ["attention", "ms a step", "tokens/s", "memory, GB", "all layers' attention alone, ms"]
    text = rows.latest()[0]["model"] + ":\n\n" + _table(header, lines)

    kinds = ("forward", "backward", "products", "rest")
    profiled = rows.latest(with_value="step_forward_ms")
    if not profiled:
        return text
    lines = [
        [LABELS.get(row["attention"], row["attention"]), f"{float(row['step_ms']):.1f}"]
        + [f"{float(row[f'step_{kind}_ms']):.1f}" for kind in kinds]
        for row in profiled
    ]
    header = ["attention", "ms a step", *(f"in the step: {kind}" for kind in kinds)]
    caption = f"\nWhere a step's time goes, by the profiler ({profiled[0]['date']}):\n\n"
    return text + caption + _table(header, lines)


_PROGRAMS = {"jax_flash": "fused layers", "jax_nn_cudnn": "plain Flax, jax.nn's cuDNN attention"}


def fused_model(rows: ModelRows) -> str:
    """A training step of the fused layers and of plain Flax, model by model."""
    parts = []
    for name in rows.names():
        latest = rows.latest(name)
        times = {row["program"]: float(row["step_ms"]) for row in latest}
        lines = []
        for row in latest:
            cells = [_PROGRAMS[row["program"]], f"{float(row['step_ms']):.1f}"]
            cells.append(f"{times['jax_nn_cudnn'] / float(row['step_ms']):.2f}x")
            cells += [f"{float(row['tokens_per_s']):.0f}", f"{float(row['memory_gb']):.1f}"]
            inside = [row[f"step_{kind}_ms"] for kind in ("attention", "products", "rest")]
            cells += [f"{float(value):.1f}" if value else "" for value in inside]
            lines.append(cells)
        header = ["program", "ms a step", "speed", "tokens/s", "memory, GB"]
        header += [f"in the step: {kind}" for kind in ("attention", "products", "rest")]
        parts.append(f"{name}:\n\n" + _table(header, lines))
    return "\n".join(parts)


def options(rows: Rows, groups: Sequence[str]) -> str:
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


def operators(rows: Rows) -> str:
    """GB/s or TFLOP/s of every operator, beside the ceiling of its run, and over every rival."""
    rivals = [name for name in rows.providers("") if not name.startswith("jax_flash")]
    rivals = [name for name in rivals if name in PROVIDERS]  # ceilings are none
    lines, behind, compared = [], [], 0
    for name in operator_workloads.WORKLOADS:
        for direction in DIRECTIONS:
            rates, ceiling = rows.rate(name, direction), rows.ceiling_beside(name, direction)
            ours = rates.get("jax_flash")
            if ours is None:
                continue
            unit = "GB/s" if rows.gbs.get((name, direction)) else "TFLOP/s"
            cells = [f"`{name}`", DIRECTIONS[direction], f"{ours:.0f} {unit}"]
            cells.append(f"{100 * ours / ceiling:.0f}%" if ceiling else "")
            ratios = [rows.ratio(name, direction, rival) for rival in rivals]
            cells += [f"{ratio:.2f}x" if ratio else "" for ratio in ratios]
            lines.append(cells)
            if best := rows.best_rival(name, direction):
                compared += 1
                if best[1] < 1:
                    behind.append((best[1], f"`{name}` {cells[1]} {best[1]:.2f} ({best[0]})"))
    header = ["operator", "direction", "jax_flash", "of the ceiling"]
    text = _table([*header, *(f"over {LABELS[rival]}" for rival in rivals)], lines)
    if compared:
        named = ", ".join(word for _, word in sorted(behind)) or "none"
        text += f"\nBehind the fastest rival of their run, {len(behind)} of {compared}: {named}.\n"
    return text


def fused_operators() -> str:
    parts = [_caption(rows) + operators(rows) for rows in load_operators()]
    return "\n".join(parts) or "Not measured yet.\n"


def attention_gpu() -> str:
    parts = []
    for rows in load_all():
        text = grid(rows) + best_rivals(rows) + option_costs(rows) + options(rows, GROUPS)
        if text:
            parts.append(_caption(rows) + text)
    return "".join(parts) or "Not measured yet.\n"


def models() -> str:
    parts = [_caption(rows) + model(rows) for rows in load_models()]
    return "\n".join(parts) or "Not measured yet.\n"


def fused_models() -> str:
    parts = [_caption(rows) + fused_model(rows) for rows in load_models("fused_model.csv")]
    return "\n".join(parts) or "Not measured yet.\n"


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
    "fused-model": fused_models,
    "gpu-tests": gpu_tests,
    "model": models,
    "operators": fused_operators,
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
