"""Draws figures from the committed rows: TFLOP/s over the sequence length, and ratios to rivals.

python -m benchmarks.plot      # benchmarks/results/<device>/{grid,ratios,operators}.png
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.rows import LABELS, OTHER_LABELS, Rows, load_all, load_operators
from benchmarks.workloads import WORKLOADS

COLORS = {
    "jax_flash": "#c0392b",
    "jax_flash_sm80": "#d98880",
    "jax_flash_xla": "#e59866",
    "jax_nn_xla": "#7f8c8d",
    "jax_nn_cudnn": "#2471a3",
    "torch_flash": "#1e8449",
    "torch_cudnn": "#7d3c98",
    "flash_attention_3": "#17202a",
    "xla": "#7f8c8d",
    "torch_compile": "#1e8449",
    "tokamax": "#2471a3",
    "liger": "#7d3c98",
    "quack": "#17202a",
}
DIRECTIONS = ("forward", "backward")


def grid(rows: Rows) -> None:
    """One panel a (direction, mask, head dim): lines over T, ours on top, under the matrix units'
    own rate. FlashAttention-3 by its lead over cuDNN in another call."""
    names = [name for name, _ in rows.ms if name.startswith("grid/") and name in WORKLOADS]
    dims = sorted({WORKLOADS[name].head_dim for name in names})
    figure, axes = pyplot.subplots(
        4, len(dims), figsize=(4 * len(dims), 10), sharex=True, squeeze=False
    )
    panels = [(direction, mask) for direction in DIRECTIONS for mask in ("full", "causal")]
    for line, (direction, mask) in zip(axes, panels, strict=True):
        for axis, head_dim in zip(line, dims, strict=True):
            providers = [*rows.providers("grid/"), *(["flash_attention_3"] if rows.other else [])]
            for provider in reversed(providers):
                points = []
                for name in dict.fromkeys(names):
                    workload = WORKLOADS[name]
                    measured = rows.tflops.get((name, direction), {})
                    value = measured.get(provider)
                    if provider in OTHER_LABELS and "jax_nn_cudnn" in measured:
                        lead = rows.other.get((name, direction), {}).get(provider)
                        value = lead and measured["jax_nn_cudnn"] * lead
                    masked = "causal" if workload.is_causal else "full"
                    if value and workload.head_dim == head_dim and masked == mask:
                        points.append((workload.seq, value))
                if points:
                    axis.plot(
                        *zip(*sorted(points), strict=True),
                        marker="o",
                        markersize=3,
                        color=COLORS[provider],
                        label=(LABELS | OTHER_LABELS)[provider],
                        linewidth=2 if provider == "jax_flash" else 1,
                        linestyle="--" if provider in OTHER_LABELS else "-",
                    )
            axis.set_visible(bool(axis.lines))  # nothing measured: no empty frame
            if ceiling := rows.ceiling():
                axis.axhline(ceiling, color="black", linestyle=":", linewidth=0.8)
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            axis.set_title(f"{direction}, {mask}, H={head_dim}", fontsize=10)
        line[0].set_ylabel("TFLOP/s")
    for axis in axes[-1]:
        axis.set_xlabel("T (16384 tokens in all)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.suptitle(f"Attention, bf16, {rows.device}, {rows.dates[-1]}")
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(rows.path.with_name("grid.png"), dpi=110)
    pyplot.close(figure)


def ratios(rows: Rows) -> None:
    """Bars, a panel a direction: how many times faster than each rival, outside the grid."""
    keys = [key for key, row in rows.ms.items() if len(row) > 1 and not key[0].startswith("grid/")]
    if not keys:
        return
    names = list(dict.fromkeys(name for name, _ in keys))
    directions = list(dict.fromkeys(direction for _, direction in keys))
    rivals = [p for p in LABELS if p != "jax_flash" and any(p in rows.ms[key] for key in keys)]
    height = 1.5 + 0.09 * len(names) * (len(rivals) + 1)
    figure, axes = pyplot.subplots(
        1, len(directions), figsize=(2 + 4 * len(directions), height), sharey=True, squeeze=False
    )
    width = 1 / (len(rivals) + 1)
    for axis, direction in zip(axes[0], directions, strict=True):
        for offset, rival in enumerate(rivals):
            values = [rows.ratio(name, direction, rival) or 0 for name in names]
            places = [
                index + (offset - (len(rivals) - 1) / 2) * width for index in range(len(names))
            ]
            axis.barh(places, values, width, color=COLORS[rival], label=LABELS[rival])
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(direction.replace("_", " + "), fontsize=9)
        axis.set_xlabel("the rival's time over ours", fontsize=8)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=7)
    axes[0, 0].invert_yaxis()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower left", ncols=len(rivals), frameon=False, fontsize=7)
    figure.suptitle(f"{rows.device}, {rows.dates[-1]}", fontsize=10)
    figure.tight_layout()
    figure.savefig(rows.path.with_name("ratios.png"), dpi=110)
    pyplot.close(figure)


def operators(rows: Rows) -> None:
    """Bars, a panel a direction and unit: what each provider reaches, beside the ceiling."""
    kinds = [("GB/s", rows.gbs, "a copy"), ("TFLOP/s", rows.tflops, "a bare product")]
    kinds = [kind for kind in kinds if any(kind[1].values())]
    named = [
        list(dict.fromkeys(n for (n, _), row in rates.items() if row)) for _, rates, _ in kinds
    ]
    found = [provider for provider in LABELS if any(provider in row for row in rows.ms.values())]
    figure, axes = pyplot.subplots(
        len(kinds),
        2,
        figsize=(11, 2 + 0.11 * sum(map(len, named)) * (len(found) + 1)),
        height_ratios=[len(names) + 1 for names in named],
        squeeze=False,
    )
    width = 1 / (len(found) + 1)
    for line, (unit, rates, limit), names in zip(axes, kinds, named, strict=True):
        for axis, direction in zip(line, DIRECTIONS, strict=True):
            for offset, provider in enumerate(found):
                values = [rates.get((name, direction), {}).get(provider, 0) for name in names]
                places = [i + (offset - (len(found) - 1) / 2) * width for i in range(len(names))]
                axis.barh(places, values, width, color=COLORS[provider], label=LABELS[provider])
            ceilings = [rows.ceiling_beside(name, direction) for name in names]
            for i, ceiling in enumerate(ceilings):
                if ceiling:
                    axis.plot((ceiling, ceiling), (i - 0.5, i + 0.5), color="black", linewidth=0.8)
            axis.set_title(f"{direction}, {unit}; the line is {limit} in the same run", fontsize=9)
            axis.set_yticks(range(len(names)), names if axis is line[0] else [], fontsize=7)
            axis.invert_yaxis()
            axis.margins(y=0.01)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(found), frameon=False, fontsize=8)
    figure.suptitle(f"Fused operators, {rows.device}, {rows.dates[-1]}", fontsize=10)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(rows.path.with_name("operators.png"), dpi=110)
    pyplot.close(figure)


def main() -> int:
    for rows in load_all():
        if any(name.startswith("grid/") for name, _ in rows.ms):
            grid(rows)
        ratios(rows)
        print(f"drawn: {rows.path.parent}")
    for rows in load_operators():
        operators(rows)
        print(f"drawn: {rows.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
