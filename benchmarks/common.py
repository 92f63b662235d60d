"""What the benchmarks share: machines, timing, results."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

KERNEL_PACKAGES = ("nvidia-cudnn-frontend", "flash-attn", "flash-attn-3", "flash-attn-4", "nvidia-cutlass-dsl")
RESULTS = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"


def device_name(device: str) -> str:
    """The name of the accelerator, or of the processor and its core count."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def environment(device: str) -> dict[str, str]:
    """What a number depends on besides the code."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    found = {
        "device": device_name(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": _command(),
        "commit": commit,
    }
    if device == "cuda":
        import triton

        found["triton"] = triton.__version__
        found["cudnn"] = str(torch.backends.cudnn.version())
        for package in KERNEL_PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[package] = importlib.metadata.version(package)
        found["kernels that run"] = _kernels()
    return found


def _kernels() -> str:
    """A package that is installed may still not be importable."""
    from varlen_inductor.ops.backends import BACKENDS
    from varlen_inductor.ops.problem import Problem

    problem = Problem(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, 8, 8, 64, 64, length=512)
    return ", ".join(backend.name for backend in BACKENDS if backend.supports(problem) is None)


def _command() -> str:
    """The command line, but for where the results go: that is nobody else's."""
    words = ["python", *sys.argv]
    if "--output" in words:
        at = words.index("--output")
        words[at : at + 2] = []
    return shlex.join(words)


def median_ms(
    function: Callable[[], Any], device: str, *, repeat: int = 30, warmup: int = 5, device_ms: tuple[int, int] = (100, 400)
) -> float:
    """Median time of one call in milliseconds: device events on CUDA (``do_bench``), the wall clock on the CPU.

    Args:
        device_ms: for how long to warm up and to measure on CUDA.
    """
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(function, warmup=device_ms[0], rep=device_ms[1], return_mode="median"))
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def ahead_ms(function: Callable[[], Any], *, repeat: int = 10, wait_cycles: int = 8_000_000) -> float:
    """Median time of one call in milliseconds by CUDA's events, all of it launched while the device still waits; caches cold.

    So is a step timed whose host is ahead of its device, and so are kernels, with what is between them, on a host that is busy.

    Args:
        wait_cycles: for how long the device waits, in its clock: four milliseconds.

    Raises:
        RuntimeError: in most calls the host was not done when the device began, or they wait for the device.
    """
    cache = torch.empty(2**28, dtype=torch.uint8, device="cuda")  # more than a second level cache
    function()
    times = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
        torch.cuda._sleep(wait_cycles)
        start.record()
        function()
        end.record()
        late = start.query()
        end.synchronize()
        if not late:
            times.append(start.elapsed_time(end))
    if 2 * len(times) < repeat:
        raise RuntimeError(f"of {repeat} calls {repeat - len(times)} were still being launched after {wait_cycles} cycles")
    return statistics.median(times)


def wall_ms(function: Callable[[], Any], device: str, *, repeat: int = 30, warmup: int = 5) -> float:
    """Median wall time of one call in milliseconds, the device idle before and after."""

    def synced() -> None:
        function()
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(warmup):
        synced()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        synced()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def interleaved_wall_ms(
    functions: dict[str, Callable[[], Any]], device: str, *, repeat: int = 20, warmup: int = 3
) -> dict[str, float]:
    """Median wall times of several functions that take turns, so that drift of the machine meets all alike."""

    def once(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for function in functions.values():
        for _ in range(warmup):
            once(function)
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeat):
        for name, function in functions.items():
            times[name].append(once(function))
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def queued_ms(functions: dict[str, Callable[[], Any]], device: str, *, repeat: int = 20, rounds: int = 3) -> dict[str, float]:
    """Median over rounds of the time per call of functions that are called ``repeat`` times in a row, the device never waited for.

    This is how training runs: the host works on the next step while the device works on this one.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(repeat):
                function()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / repeat)
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}


def save(name: str, device: str, rows: Any, output: Path | None = None) -> Path:
    """Write results as JSON, beside what they depend on."""
    folder = output or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(device), "results": rows}, indent=1) + "\n")
    return path
