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


def bars(
    path: Path, groups: Mapping[str, Mapping[str, float]], title: str, baseline: str, environment: Mapping[str, str]
) -> None:
    """One group of bars for each configuration, one bar for each variant; heights are speedups."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    variants = list(dict.fromkeys(variant for values in groups.values() for variant in values))
    inches = min(1.6 * len(groups) + 3.0, 20.0)
    figure, axes = plt.subplots(figsize=(inches, 4.2))
    width = 0.8 / len(variants)
    upright = 90 if width * inches / (len(groups) + 1) < 0.3 else 0  # where numbers would run into each other
    for i, variant in enumerate(variants):
        places = [g + (i - (len(variants) - 1) / 2) * width for g, values in enumerate(groups.values()) if variant in values]
        heights = [values[variant] for values in groups.values() if variant in values]
        drawn = axes.bar(places, heights, width * 0.94, label=variant)
        axes.bar_label(drawn, fmt="%.2f", fontsize=7, rotation=upright, padding=2)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axes.set_ylabel(f"speed, {baseline} = 1")
    axes.set_title(f"{title}\n{environment['device']}, torch {environment['torch']}", fontsize=10)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.25)  # room for the legend
    axes.legend(fontsize=7, ncols=2, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def attention(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """By the time with all launches made ahead, where it was measured: the host has no part in that."""
    groups: dict[str, dict[str, float]] = {}
    what = "ahead_ms" if any("forward_ahead_ms" in row for row in rows) else "ms"
    padded = {row["config"]: row for row in rows if row["variant"] == "padded SDPA"}
    for row in rows:
        for way, label in (("forward", "forward"), ("forward_backward", "forward\n+ backward")):
            key = f"{way}_{what}"
            groups.setdefault(f"{row['config']}\n{label}", {})[row["variant"]] = padded[row["config"]][key] / row[key]
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


def kernels(content: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Speed over PyTorch's own FlashAttention, forward and backward together."""
    groups: dict[str, dict[str, float]] = {}
    for row in content["rows"]:
        flags = "".join(f"\n{name}" for name in ("causal", "dropout", "in_place") if row[name])
        times = {name: row["forward_us"][name] + us for name, us in row["backward_us"].items()}
        group = groups.setdefault(f"D {row['head_dim']}\nS {row['length']}{flags}", {})
        group.update({name: times["aten_flash"] / time for name, time in times.items()})
    return groups


def when_to_pack(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    groups: dict[str, dict[str, float]] = {}
    for row in rows:
        group = groups.setdefault(f"B {row['batch']}, S {row['length']}\ndensity {row['density']:.2f}", {})
        group.update({f"{row['phase']}, {how}": row[how] for how in ("alone", "queued")})
    return groups


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    for kind, read, title, baseline in (
        ("attention", attention, "One attention over a padded batch", "padded"),
        ("model", model, "A whole model over a padded batch", "padded"),
        ("compile", compile_time, "Compiling a 12-layer BERT", "plain"),
        ("kernels", kernels, "One attention by each kernel, forward and backward", "aten_flash"),
        ("when-to-pack", when_to_pack, "An encoder of 4 layers, packed whatever it costs", "padded"),
    ):
        for path in sorted(folder.glob(f"{kind}-*.json")):
            content = json.loads(path.read_text())
            bars(path.with_suffix(".png"), read(content["results"]), title, baseline, content["environment"])
            print("wrote", path.with_suffix(".png"))


if __name__ == "__main__":
    main()
