"""How long the first step of a 12-layer BERT takes to compile: plain `torch.compile` and our flag, nothing cached.

    python benchmarks/compile_time.py [--device cuda|cpu] [--repeat 3] [--output FOLDER]

Each measurement is a process of its own with empty caches: the time of the first step less that of the second. The batch is small,
because what is compiled does not depend on it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import save

VARIANTS = ("plain torch.compile", "our flag")
PHASES = ("forward", "forward+backward")


def measure(variant: str, phase: str, device: str) -> float:
    """Seconds that compiling takes in this process."""
    import transformers

    from varlen_inductor.backend import varlen_inductor as backend

    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(transformers.BertConfig(num_hidden_layers=12)).to(device).train(phase != "forward")
    mask = torch.arange(64, device=device) < torch.tensor([[64], [20], [33], [9], [50], [12], [40], [5]], device=device)
    ids = torch.randint(5, 30000, mask.shape, device=device)
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.where(mask, ids, -100)}
    compiled = torch.compile(model) if variant == VARIANTS[0] else torch.compile(model, backend=backend)

    def step() -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(phase != "forward"):
            loss = compiled(**batch).loss
            if phase != "forward":
                loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step() - step()


def in_a_fresh_process(variant: str, phase: str, device: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": str(Path(folder) / "triton")}
        command = [sys.executable, __file__, "--device", device, "--one", variant, phase]
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return float(output.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "PHASE"), help="measure one in this process and print seconds")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    if options.one:
        print(measure(*options.one, options.device))
        return
    rows: list[dict[str, Any]] = []
    for phase in PHASES:
        times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        for _ in range(options.repeat):
            for variant in VARIANTS:
                times[variant].append(in_a_fresh_process(variant, phase, options.device))
        base = statistics.median(times[VARIANTS[0]])
        for variant, seconds in times.items():
            median = statistics.median(seconds)
            rows.append({"phase": phase, "variant": variant, "compile_s": median, "all_s": seconds, "ratio": median / base})
            print(f"{phase:17} {variant:20} {median:7.1f} s  {median / base:5.2f}", flush=True)
    print("wrote", save(f"compile-{options.device}", options.device, rows, options.output))


if __name__ == "__main__":
    main()
