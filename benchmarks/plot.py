"""Plots of the JSON files in docs/benchmarks (or the folder given): bars of speed over the padded baseline.

python benchmarks/plot.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common import RESULTS


def bars(path: Path, groups: Mapping[str, Mapping[str, float]], title: str, environment: Mapping[str, str]) -> None:
    """One group of bars for each configuration, one bar for each variant; heights are speedups."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    variants = list(dict.fromkeys(variant for values in groups.values() for variant in values))
    figure, axes = plt.subplots(figsize=(1.6 * len(groups) + 3.0, 4.2))
    width = 0.8 / len(variants)
    for i, variant in enumerate(variants):
        places = [g + (i - (len(variants) - 1) / 2) * width for g, values in enumerate(groups.values()) if variant in values]
        heights = [values[variant] for values in groups.values() if variant in values]
        drawn = axes.bar(places, heights, width * 0.94, label=variant)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axes.set_ylabel("speed, padded = 1")
    axes.set_title(f"{title}\n{environment['device']}, torch {environment['torch']}", fontsize=10)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.18)  # room for the legend
    axes.legend(fontsize=7, ncols=2, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def attention(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        for key, label in (("forward_speedup", "forward"), ("forward_backward_speedup", "forward\n+ backward")):
            groups.setdefault(f"{row['config']}\n{label}", {})[row["variant"]] = row[key]
    return groups


def model(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        mode = "" if row["mode"] == "default" else f"\n{row['mode']}"
        phase = row["phase"].replace("+", "\n+ ")
        groups.setdefault(f"{row['config']}\n{phase}{mode}", {})[row["variant"]] = row["speedup"]
    return groups


def compile_time(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        groups.setdefault(row["phase"].replace("+", "\n+ "), {})[row["variant"]] = 1.0 / row["ratio"]
    return groups


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    for kind, read, title in (
        ("attention", attention, "One attention over a padded batch"),
        ("model", model, "A whole model over a padded batch"),
        ("compile", compile_time, "Compiling a 12-layer BERT"),
    ):
        for path in sorted(folder.glob(f"{kind}-*.json")):
            content = json.loads(path.read_text())
            bars(path.with_suffix(".png"), read(content["results"]), title, content["environment"])
            print("wrote", path.with_suffix(".png"))


if __name__ == "__main__":
    main()
