"""From which size and density on does packing pay: the default of ``config.min_positions`` and ``config.max_density``.

    python benchmarks/when_to_pack.py [--device cuda|cpu] [--output FOLDER]

The encoder of ``model.py`` with 4 layers, packed whatever it costs, against plain ``torch.compile``: a step with the device idle
around it (``alone``) and steps enqueued one after another (``queued``), for batches of few to many positions at two densities.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import interleaved_wall_ms, queued_ms, save
from model import Config, Encoder, steps
from torch import Tensor

from varlen_inductor.backend import varlen_inductor as backend

SIZES = {"cuda": ((4, 128), (16, 128), (32, 128)), "cpu": ((2, 32), (2, 64), (2, 128), (4, 128))}
DENSITIES = (0.5, 0.85)
ALWAYS = {"varlen.max_density": 1.0, "varlen.min_positions": 0, "varlen.round_tokens": 64}


def batch_of(batch: int, length: int, density: float, device: str) -> tuple[dict[str, Tensor], Tensor]:
    """Token ids and a mask, the lengths spread evenly around ``density``; the first row is full."""
    spread = min(density, 1.0 - density)
    lengths = (torch.linspace(density + spread, density - spread, batch) * length).round().clamp(1, length)
    mask = (torch.arange(length)[None] < lengths[:, None]).to(device)
    return {"input_ids": torch.randint(5, 30000, mask.shape, device=device), "attention_mask": mask.long()}, mask


def measure(batch: int, length: int, density: float, device: str, programs: dict[str, Any], model: Any) -> list[dict[str, Any]]:
    inputs, mask = batch_of(batch, length, density, device)
    config = Config("", batch, length, 0, 0, 0)
    rows = []
    for phase in ("forward", "forward+backward"):
        model.train(phase != "forward")
        todo: dict[str, Callable[[], None]] = {
            name: steps(config, model, program, inputs, mask, "default")[phase] for name, program in programs.items()
        }
        alone = interleaved_wall_ms(todo, device, repeat=15)
        queued = queued_ms(todo, device, repeat=10)
        gains = {how: times["plain"] / times["packed"] for how, times in (("alone", alone), ("queued", queued))}
        rows.append({"batch": batch, "length": length, "density": float(mask.float().mean()), "phase": phase, **gains})
        shown = " ".join(f"{how} {gain:.2f}" for how, gain in gains.items())
        print(f"B {batch:3} S {length:4} density {rows[-1]['density']:.2f} {phase:17} {shown}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    device = options.device
    rows = []
    for batch, length in SIZES[device]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Encoder(Config("", batch, length, 768, 12, 4)).to(device, torch.bfloat16 if device == "cuda" else torch.float32)
        programs = {"plain": torch.compile(model), "packed": torch.compile(model, backend=backend, options=ALWAYS)}
        for density in DENSITIES:
            rows += measure(batch, length, density, device, programs, model)
    print("wrote", save(f"when-to-pack-{device}", device, rows, options.output))


if __name__ == "__main__":
    main()
