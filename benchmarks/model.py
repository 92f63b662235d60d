"""A whole encoder over a padded batch: plain `torch.compile`, our flag, packing by hand, and the limit.

    python benchmarks/model.py [--device cuda|cpu] [--config NAME ...] [--mode default|reduce-overhead]
                               [--phase forward|forward+backward] [--output FOLDER]

``wall_ms`` is a step with the device idle before and after it, ``queued_ms`` one of many that are enqueued one after another, as
in training. ``difference`` is how far results at valid positions are from those of plain `torch.compile`, relative to their norm.
The *limit* is the padded time multiplied by the share of valid tokens, as if all cost scaled with tokens. *By hand* packs tokens
once with PyTorch's own ``varlen_attn`` (CUDA) inside the compiled model, its token count from ``nonzero``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import interleaved_wall_ms, queued_ms, save
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    name: str
    batch: int
    length: int
    width: int
    heads: int
    layers: int
    kind: str = "encoder"
    """Or Hugging Face's BERT: "masked language model" (returns logits of the whole vocabulary) or "classification"."""
    lengths: str = "uniform"
    """Or those of paragraphs of Python's documentation in words ("text"), or no padding at all ("full")."""


PHASES = ("forward", "forward+backward")
MLM, CLASSIFICATION = "masked language model", "classification"
CONFIGS = {
    "cuda": (
        Config("B32 S512", 32, 512, 768, 12, 12),
        Config("B8 S2048", 8, 2048, 1024, 16, 8),
        Config("HF BERT-base", 32, 512, 768, 12, 12, MLM),
        Config("all valid", 32, 512, 768, 12, 12, lengths="full"),
    ),
    "cpu": (
        Config("B8 S256 E768", 8, 256, 768, 12, 2),
        Config("HF BERT, labels", 64, 128, 384, 6, 6, CLASSIFICATION, "text"),
        Config("HF BERT, MLM", 16, 128, 384, 6, 6, MLM, "text"),
        Config("all valid", 8, 256, 768, 12, 2, lengths="full"),
    ),
}


class Block(nn.Module):
    """A pre-norm transformer block over padded rows (B, S, E) or, with offsets, over packed tokens (T, E)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def attend(self, h: Tensor, mask: Tensor | None, offsets: Tensor | None, longest: int) -> Tensor:
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        if offsets is not None:
            from torch.nn.attention.varlen import varlen_attn

            return varlen_attn(q, k, v, offsets, offsets, longest, longest).flatten(-2)  # type: ignore[union-attr]
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return y.transpose(1, 2).flatten(-2)

    def forward(self, x: Tensor, mask: Tensor | None, offsets: Tensor | None = None, longest: int = 0) -> Tensor:
        x = x + self.out(self.attend(self.norm1(x), mask, offsets, longest))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Token ids and a mask to hidden states (B, S, E)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(30522, config.width), nn.Embedding(config.length, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.token(input_ids) + self.position(torch.arange(input_ids.shape[1], device=input_ids.device))
        mask = attention_mask[:, None, None, :].bool()
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class ByHand(nn.Module):
    """The same encoder, rewritten by hand to run on packed tokens."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        e, (batch, length) = self.encoder, input_ids.shape
        index = attention_mask.reshape(-1).nonzero().squeeze(1)
        offsets = F.pad(attention_mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        x = e.token(input_ids.reshape(-1)[index]) + e.position(index % length)
        for block in e.blocks:
            x = block(x, None, offsets, length)
        y = e.norm(x)
        return y.new_zeros(batch * length, y.shape[-1]).index_copy(0, index, y).view(batch, length, -1)


def make(config: Config, device: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """The model, a batch, and the mask of valid positions."""
    generator = torch.Generator().manual_seed(1)
    if config.lengths == "text":
        from varlen_inductor.demo import paragraphs

        words = torch.tensor([len(text.split()) for text in paragraphs()])
        lengths = words[torch.randperm(len(words), generator=generator)[: config.batch]].clamp(max=config.length)
    elif config.lengths == "full":
        lengths = torch.full((config.batch,), config.length)
    else:
        lengths = torch.randint(1, config.length + 1, (config.batch,), generator=generator)
    mask = (torch.arange(config.length)[None] < lengths[:, None]).to(device)
    ids = torch.randint(5, 30000, mask.shape, device=device)
    torch.manual_seed(0)
    if config.kind == "encoder":
        model: nn.Module = Encoder(config)
    else:
        import transformers

        shape = transformers.BertConfig(
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            max_position_embeddings=max(512, config.length),
        )
        model = (transformers.BertForMaskedLM if config.kind == MLM else transformers.BertForSequenceClassification)(shape)
    model = model.to(device=device, dtype=dtype)
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    if config.kind == CLASSIFICATION:
        batch["labels"] = torch.randint(2, (config.batch,), device=device)
    if config.kind == MLM:
        batch["labels"] = torch.where(mask & (torch.rand(mask.shape, device=device) < 0.15), ids, -100)
    return model, batch, mask


def programs(config: Config, model: nn.Module, device: str, mode: str) -> dict[str, Callable[..., Any]]:
    from varlen_inductor.backend import varlen_inductor as backend

    chosen = None if mode == "default" else mode
    found: dict[str, Callable[..., Any]] = {
        "plain torch.compile": torch.compile(model, mode=chosen),
        "our flag": torch.compile(model, backend=backend, mode=chosen),
    }
    if device == "cpu" or (config.name == "B8 S2048" and mode == "default"):
        found["our flag, attention only"] = torch.compile(model, backend=backend, options={"varlen.packing": "attention"})
    if config.kind == "encoder" and device == "cuda" and mode == "default":
        torch._dynamo.config.capture_dynamic_output_shape_ops = True
        found["packed by hand"] = torch.compile(ByHand(model), fullgraph=True)  # type: ignore[arg-type]
    return found


def steps(
    config: Config, model: nn.Module, program: Callable[..., Any], batch: dict[str, Tensor], mask: Tensor, mode: str
) -> dict[str, Any]:
    """The two things that are timed."""
    weight = mask[..., None]
    parameters = list(model.parameters())  # once, as an optimizer does

    def forward() -> None:
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            program(**batch)

    def train() -> None:
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        out = program(**batch)
        loss = out.loss if config.kind != "encoder" else (out * weight).float().square().mean()
        loss.backward()
        for p in parameters:
            p.grad = None

    return {"forward": forward, "forward+backward": train}


def results(program: Callable[..., Any], batch: dict[str, Tensor], mask: Tensor) -> Tensor:
    """What the program gives at valid positions (or for each sequence), to be compared."""
    torch.compiler.cudagraph_mark_step_begin()
    with torch.no_grad():
        out = program(**batch)
    found = out if isinstance(out, Tensor) else out.logits
    return (found[mask] if found.shape[:2] == mask.shape else found).float().clone()


def memory_of(step: Callable[[], None]) -> float | None:
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def gpu_busy_ms(step: Callable[[], None]) -> float | None:
    """The time that kernels run during one step."""
    if not torch.cuda.is_available():
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(e.self_device_time_total for e in profile.key_averages()) / 1e3


def run(config: Config, device: str, dtype: torch.dtype, mode: str, repeat: int, phases: Sequence[str]) -> list[dict[str, Any]]:
    """Every time first, then what a profiler says: once there was one in a process, its launches take longer."""
    from varlen_inductor import report

    model, batch, mask = make(config, device, dtype)
    density = float(mask.float().mean())
    rows: list[dict[str, Any]] = []
    to_profile: list[tuple[str, dict[str, Any], Callable[[], None]]] = []
    for phase in phases:
        model.train(phase != "forward")
        compiled = programs(config, model, device, mode)
        todo: dict[str, Callable[[], None]] = {}
        first: dict[str, float] = {}
        kernels: dict[str, list[str]] = {}
        for name, program in compiled.items():
            todo[name] = steps(config, model, program, batch, mask, mode)[phase]
            report.forget()
            start = time.perf_counter()
            todo[name]()
            first[name] = time.perf_counter() - start
            kernels[name] = sorted({site.kernel for compiled in report.recent() for site in compiled.sites if site.kernel})
        times = interleaved_wall_ms(todo, device, repeat=repeat)
        queued = queued_ms(todo, device, repeat=repeat)
        expected = results(compiled["plain torch.compile"], batch, mask) if phase == "forward" else None
        base = times["plain torch.compile"]
        times["limit (padded x density)"] = base * density
        queued["limit (padded x density)"] = queued["plain torch.compile"] * density
        for name, ms in times.items():
            row = {
                "config": config.name,
                "phase": phase,
                "mode": mode,
                "density": round(density, 3),
                "variant": name,
                "wall_ms": ms,
                "speedup": base / ms,
                "queued_ms": queued[name],
                "queued_speedup": queued["plain torch.compile"] / queued[name],
            }
            if name in todo:
                row |= {"first_call_s": first[name], "kernels": "; ".join(kernels[name]), "peak_mib": memory_of(todo[name])}
                if expected is not None:
                    difference = results(compiled[name], batch, mask) - expected
                    row["difference"] = float(difference.norm() / expected.norm())
                to_profile.append((phase, row, todo[name]))
            rows.append(row)
    for phase, row, step in to_profile:
        model.train(phase != "forward")
        row["gpu_busy_ms"] = gpu_busy_ms(step)
    return rows


def in_a_process(*args: Any) -> list[dict[str, Any]]:
    """`run` in a process of its own, which no other configuration has left anything in."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, *args).result()


def show(rows: list[dict[str, Any]]) -> None:
    numbers = (("wall_ms", 2), ("speedup", 2), ("queued_ms", 2), ("queued_speedup", 2), ("gpu_busy_ms", 2), ("peak_mib", 0))
    columns = (*numbers, ("first_call_s", 1), ("difference", 7))
    print(f"{'config':14} {'phase':17} {'mode':16} {'variant':26}", *(f"{name:>14}" for name, _ in columns))
    for r in rows:
        cells = ["" if r.get(name) is None else f"{r[name]:.{digits}f}" for name, digits in columns]
        print(f"{r['config']:14} {r['phase']:17} {r['mode']:16} {r['variant']:26}", *(f"{cell:>14}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--config", nargs="*", default=None, help="names of configurations; all by default")
    parser.add_argument("--mode", nargs="*", default=["default"], choices=("default", "reduce-overhead"))
    parser.add_argument("--phase", nargs="*", default=PHASES, choices=PHASES)
    parser.add_argument("--repeat", type=int, default=None)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    repeat = options.repeat or (40 if options.device == "cuda" else 10)
    rows: list[dict[str, Any]] = []
    for mode in options.mode:
        for config in CONFIGS[options.device]:
            if options.config is None or config.name in options.config:
                found = in_a_process(config, options.device, dtype, mode, repeat, options.phase)
                show(found)
                rows += found
                # So far, for long runs that are cut off.
                saved = save(f"model-{options.device}", options.device, rows, options.output)
    print()
    show(rows)
    print("wrote", saved)


if __name__ == "__main__":
    main()
