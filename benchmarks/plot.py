"""Draws figures from the committed rows: TFLOP/s over the sequence length, and ratios to rivals.

python -m benchmarks.plot      # benchmarks/results/<device>/{grid,ratios}.png
"""

from __future__ import annotations

import sys

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.rows import LABELS, Rows, load_all
from benchmarks.workloads import WORKLOADS

COLORS = {
    "jax_flash": "#c0392b",
    "jax_flash_xla": "#e59866",
    "jax_nn_xla": "#7f8c8d",
    "jax_nn_cudnn": "#2471a3",
    "torch_flash": "#1e8449",
    "torch_cudnn": "#7d3c98",
}
DIRECTIONS = ("forward", "backward")


def grid(rows: Rows) -> None:
    """One panel a (direction, mask, head dim): lines over T, ours on top."""
    names = [name for name, _ in rows.ms if name.startswith("grid/") and name in WORKLOADS]
    dims = sorted({WORKLOADS[name].head_dim for name in names})
    figure, axes = pyplot.subplots(
        4, len(dims), figsize=(4 * len(dims), 10), sharex=True, squeeze=False
    )
    panels = [(direction, mask) for direction in DIRECTIONS for mask in ("full", "causal")]
    for line, (direction, mask) in zip(axes, panels, strict=True):
        for axis, head_dim in zip(line, dims, strict=True):
            for provider in reversed(rows.providers("grid/")):
                points = []
                for name in dict.fromkeys(names):
                    workload = WORKLOADS[name]
                    value = rows.tflops.get((name, direction), {}).get(provider)
                    masked = "causal" if workload.is_causal else "full"
                    if value and workload.head_dim == head_dim and masked == mask:
                        points.append((workload.seq, value))
                if points:
                    axis.plot(
                        *zip(*sorted(points), strict=True),
                        marker="o",
                        markersize=3,
                        color=COLORS[provider],
                        label=LABELS[provider],
                        linewidth=2 if provider == "jax_flash" else 1,
                    )
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
    """Bars: how many times faster than each rival, workload by workload."""
    keys = [key for key in rows.ms if len(rows.ms[key]) > 1]
    rivals = [provider for provider in rows.providers("") if provider != "jax_flash"]
    figure, axis = pyplot.subplots(figsize=(7, 1 + 0.16 * len(keys) * max(1, len(rivals))))
    for index, key in enumerate(keys):
        for offset, rival in enumerate(rivals):
            ratio = rows.ratio(*key, rival)
            if ratio:
                place = index + (offset - (len(rivals) - 1) / 2) * 0.8 / len(rivals)
                axis.barh(place, ratio, 0.8 / len(rivals), color=COLORS[rival])
    for rival in rivals:
        axis.barh(0, 0, color=COLORS[rival], label=f"over {LABELS[rival]}")
    axis.set_yticks(range(len(keys)), [f"{name} {way}" for name, way in keys], fontsize=6)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_xlabel("times faster (time of the rival / time of jax_flash)")
    axis.legend(frameon=False, fontsize=7)
    axis.set_title(f"{rows.device}, {rows.dates[-1]}", fontsize=10)
    figure.tight_layout()
    figure.savefig(rows.path.with_name("ratios.png"), dpi=110)
    pyplot.close(figure)


def main() -> int:
    for rows in load_all():
        if any(name.startswith("grid/") for name, _ in rows.ms):
            grid(rows)
        ratios(rows)
        print(f"drawn: {rows.path.parent}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
