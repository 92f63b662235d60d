"""One attention over a padded batch: what padding costs, and what a varlen call makes of it.

    python benchmarks/attention.py [--device cuda|cpu] [--output FOLDER]

For each configuration: the padded masked SDPA that PyTorch picks, PyTorch's own `varlen_attn` on packed tokens (CUDA), ours, ours
with each kernel that there is, flash-attn-4's own function where it is installed, and the padded SDPA compiled with our flag
(attention-only form, pack and unpack included). TFLOP/s count useful work only:
4 · H · D · Σ len², halved when causal, times 3.5 for forward and backward. Short calls are bound by the host, and hosts are noisy:
all variants are measured several times in turn. On CUDA there are also the time with all launches made ahead, in which the host has
no part, and the sum of the times of the kernels, without what is between them.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import ahead_ms, median_ms, save

import varlen_inductor
from varlen_inductor.ops.backends import BACKENDS, choose
from varlen_inductor.ops.problem import Problem, length_class


@dataclass(frozen=True)
class Config:
    name: str
    batch: int
    length: int
    heads: int
    head_dim: int
    causal: bool = False
    multiple: int = 1

    def lengths(self) -> torch.Tensor:
        """Random lengths; the first row is full."""
        generator = torch.Generator().manual_seed(1)
        high = self.length // self.multiple
        lengths = torch.randint(1, high + 1, (self.batch,), generator=generator) * self.multiple
        lengths[0] = self.length
        return lengths


CUDA_CONFIGS = (
    Config("seed", 8, 2048, 16, 64, multiple=64),
    Config("d128", 8, 4096, 16, 128),
    Config("d128c", 8, 4096, 16, 128, causal=True),
    Config("bert", 64, 512, 12, 64),
)
OURS = "ours on packed tokens"
OURS_WITH = "ours, "
"""What the name of a variant begins with that goes on with the kernel to be used."""
CPU_CONFIGS = (Config("bert", 8, 256, 12, 64), Config("bert causal", 8, 256, 12, 64, causal=True))


def variants(config: Config, device: str, dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], list[torch.Tensor]]]:
    """Each variant as a function and the tensors it is differentiated by."""
    lengths = config.lengths().to(device)
    mask = (torch.arange(config.length, device=device)[None] < lengths[:, None])[:, None, None, :]
    if config.causal:
        mask = mask & torch.ones(config.length, config.length, dtype=torch.bool, device=device).tril()
    shape = (config.batch, config.length, config.heads, config.head_dim)
    # One projection of the same tokens, as in self-attention: (B, S, 3, H, D).
    padded = torch.randn((*shape[:2], 3, *shape[2:]), device=device, dtype=dtype, requires_grad=True)
    tokens = int(lengths.sum())
    packed = [torch.randn((tokens, *shape[2:]), device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    cu_seqlens = torch.zeros(config.batch + 1, dtype=torch.int32, device=device)
    cu_seqlens[1:] = lengths.cumsum(0)
    window = (-1, 0) if config.causal else (-1, -1)

    def attend(qkv: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    def from_padding(qkv: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        position = torch.arange(config.length, device=device)
        valid = (position[None] < lengths[:, None])[:, None, None, :]
        if config.causal:
            valid = valid & (position[None] <= position[:, None])
        return attend(qkv, valid)

    def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return varlen_inductor.varlen_attn(q, k, v, cu_seqlens, cu_seqlens, config.length, config.length, window_size=window)

    from varlen_inductor.backend import varlen_inductor as backend

    compiled = torch.compile(from_padding, backend=backend, options={"varlen.packing": "attention"}, fullgraph=True)
    found: dict[str, tuple[Callable[..., Any], list[torch.Tensor]]] = {
        "padded SDPA": (lambda: attend(padded, mask), [padded]),
        OURS: (lambda: ours(*packed), packed),
        "padded SDPA under our flag": (lambda: compiled(padded, lengths), [padded]),
    }
    if device == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        found["torch varlen_attn"] = (
            lambda: varlen_attn(*packed, cu_seqlens, cu_seqlens, config.length, config.length, window_size=window),
            packed,
        )
        for name in kernels_for(packed[0], config):
            found[OURS_WITH + name] = (lambda: ours(*packed), packed)
        if importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
            from flash_attn.cute import flash_attn_varlen_func

            options = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "causal": config.causal}
            options |= {"max_seqlen_q": config.length, "max_seqlen_k": config.length}
            found["flash-attn-4 itself"] = (lambda: first(flash_attn_varlen_func(*packed, **options)), packed)
    return found


def first(results: Any) -> torch.Tensor:
    return results[0] if isinstance(results, tuple) else results


def problem_of(device: torch.device, dtype: torch.dtype, config: Config) -> Problem:
    heads, dim = config.heads, config.head_dim
    right = 0 if config.causal else -1
    return Problem(device, dtype, heads, heads, dim, dim, window_right=right, length=length_class(config.length))


def kernels_for(query: torch.Tensor, config: Config) -> list[str]:
    """The CUDA backends that can run the configuration."""
    problem = problem_of(query.device, query.dtype, config)
    return [backend.name for backend in BACKENDS if backend.name not in ("cpu", "math") and backend.supports(problem) is None]


def chosen_for(device: str, dtype: torch.dtype, config: Config) -> str:
    """The kernel of choice, of the forward and of the backward."""
    problem = problem_of(torch.zeros((), device=device).device, dtype, config)
    return ", ".join(choose(problem, backward=backward).backend.name for backward in (False, True))


class Calls(NamedTuple):
    """A forward without gradients, a forward with its backward, and ``config.kernels`` for both."""

    forward: Callable[[], Any]
    forward_backward: Callable[[], Any]
    kernels: str

    def each(self, measure: Callable[[Callable[[], Any]], float]) -> tuple[float, float]:
        with varlen_inductor.config.patch(kernels=self.kernels):
            return measure(self.forward), measure(self.forward_backward)


def calls_of(function: Callable[..., Any], inputs: list[torch.Tensor], kernels: str) -> Calls:
    with varlen_inductor.config.patch(kernels=kernels):
        gradient = torch.randn_like(function())

    def forward() -> Any:
        with torch.no_grad():
            return function()

    return Calls(forward, lambda: torch.autograd.grad(function(), inputs, gradient), kernels)


def run(config: Config, device: str, dtype: torch.dtype, rounds: int) -> tuple[list[dict[str, Any]], list[Calls]]:
    """A row of times for each variant, and its calls. They take turns, so that a slow moment of the host meets all alike."""
    lengths = config.lengths()
    flops = 4 * config.heads * config.head_dim * float((lengths.double() ** 2).sum()) * (0.5 if config.causal else 1.0)
    found: dict[str, Calls] = {}
    for name, (function, inputs) in variants(config, device, dtype).items():
        found[name] = calls_of(function, inputs, name.removeprefix(OURS_WITH) if name.startswith(OURS_WITH) else "auto")
    measure = partial(median_ms, device=device, repeat=10, warmup=2, device_ms=(25, 100))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    ahead: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for _ in range(rounds):
        for name, calls in found.items():
            times[name].append(calls.each(measure))
            if device == "cuda":
                ahead[name].append(calls.each(ahead_ms))
    medians = {name: [statistics.median(ms) for ms in zip(*both)] for name, both in times.items()}
    base_forward, base_backward = medians["padded SDPA"]
    rows: list[dict[str, Any]] = []
    for name, (forward, backward) in medians.items():
        rows.append(
            {
                "config": config.name,
                "variant": name,
                "tokens": int(lengths.sum()),
                "density": round(float(lengths.sum()) / (config.batch * config.length), 3),
                "forward_ms": forward,
                "forward_backward_ms": backward,
                "forward_tflops": flops / forward / 1e9,
                "forward_backward_tflops": 3.5 * flops / backward / 1e9,
                "forward_speedup": base_forward / forward,
                "forward_backward_speedup": base_backward / backward,
                "forward_ms_of_rounds": [round(ms, 4) for ms, _ in times[name]],
                "forward_backward_ms_of_rounds": [round(ms, 4) for _, ms in times[name]],
            }
        )
        if ahead[name]:
            both = (statistics.median(ms) for ms in zip(*ahead[name]))
            rows[-1]["forward_ahead_ms"], rows[-1]["forward_backward_ahead_ms"] = both
        if name == OURS:
            rows[-1]["kernels"] = chosen_for(device, dtype, config)
    return rows, list(found.values())


def device_ms(call: Callable[[], Any], repeat: int = 10) -> float:
    """The time that kernels run during one call."""
    call()  # what was compiled may have been forgotten since
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeat):
            call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e3 / repeat


def show(rows: list[dict[str, Any]]) -> None:
    head = f"{'config':12} {'variant':28} {'fwd ms':>9} {'TFLOP/s':>8} {'x':>6} {'f+b ms':>9} {'TFLOP/s':>8} {'x':>6}"
    print(head, "  launched ahead, ms     kernels run, ms")
    for r in rows:
        more = (f"{way}_{what}_ms" for what in ("ahead", "device") for way in ("forward", "forward_backward"))
        print(
            f"{r['config']:12} {r['variant']:28} {r['forward_ms']:9.3f} {r['forward_tflops']:8.1f} {r['forward_speedup']:6.2f}"
            f" {r['forward_backward_ms']:9.3f} {r['forward_backward_tflops']:8.1f} {r['forward_backward_speedup']:6.2f}",
            *(f"{r[name]:9.3f}" for name in more if name in r),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--rounds", type=int, default=7, help="how often each variant is measured; the median counts")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.manual_seed(0)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    rows: list[dict[str, Any]] = []
    calls: list[Calls] = []
    for config in CUDA_CONFIGS if options.device == "cuda" else CPU_CONFIGS:
        torch._dynamo.reset()
        more_rows, more_calls = run(config, options.device, dtype, options.rounds)
        rows, calls = rows + more_rows, calls + more_calls
        saved = save(f"attention-{options.device}", options.device, rows, options.output)
    if options.device == "cuda":
        # All times first: once there was a profiler in a process, its launches take longer.
        for row, each in zip(rows, calls):
            row["forward_device_ms"], row["forward_backward_device_ms"] = each.each(device_ms)
        saved = save(f"attention-{options.device}", options.device, rows, options.output)
    show(rows)
    print("wrote", saved)


if __name__ == "__main__":
    main()
