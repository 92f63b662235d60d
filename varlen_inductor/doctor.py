"""``python -m varlen_inductor doctor``: what this machine can run, and why it cannot run the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from collections.abc import Iterator

import torch

PACKAGES = ("torch", "triton", "transformers", "nvidia-cudnn-frontend", "flash-attn-4", "flash-attn-3", "flash-attn")


def main(argv: list[str] | None = None) -> int:
    """Print the diagnosis; 1 if the backend cannot be used at all."""
    argparse.ArgumentParser(prog="varlen_inductor doctor", description=__doc__).parse_args(argv)
    print("\n\n".join((machine(), *devices(), switches())))
    return 0 if "varlen_inductor" in torch._dynamo.list_backends() else 1


def machine() -> str:
    """Versions of what we depend on."""
    lines = [f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines += [f"{package:<22} {version(package)}" for package in ("varlen-inductor", *PACKAGES)]
    return "\n".join(lines)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> Iterator[str]:
    """For each device, which kernels can run a plain attention there, and why the others cannot."""
    from varlen_inductor.ops.backends import BACKENDS, choose
    from varlen_inductor.ops.problem import Problem
    from varlen_inductor.report import table

    for device, name, dtypes in _present():
        problems = [Problem(device, dtype, num_heads=8, num_heads_k=8, head_dim=64, head_dim_v=64, length=512) for dtype in dtypes]
        first = [choose(problem).backend for problem in problems]
        rows = []
        for backend in BACKENDS:
            reasons = [backend.supports(problem) for problem in problems]
            yes = ["yes, the first choice" if backend is chosen else "yes" for chosen in first]
            rows.append((backend.name, *(y if reason is None else reason for y, reason in zip(yes, reasons))))
        header = ("kernel", *(str(dtype).removeprefix("torch.") for dtype in dtypes))
        yield f"{name}: attention with 8 heads of 64, up to 512 tokens\n{table(header, rows)}"


def _present() -> Iterator[tuple[torch.device, str, tuple[torch.dtype, ...]]]:
    yield torch.device("cpu"), f"CPU, {torch.get_num_threads()} threads", (torch.float32, torch.bfloat16)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        name = f"cuda:{index}, {properties.name}, compute capability {properties.major}.{properties.minor}"
        yield torch.device("cuda", index), name, (torch.bfloat16, torch.float16, torch.float32)


def switches() -> str:
    """How the package is turned on here, and which knobs are not at their default."""
    from varlen_inductor import config, switch

    listed = "varlen_inductor" in torch._dynamo.list_backends()
    lines = [
        'torch.compile(backend="varlen_inductor"): '
        + ("found" if listed else "not found: install the package (pip install -e .), it is only on the path"),
        f'VARLEN_INDUCTOR={os.environ.get("VARLEN_INDUCTOR", "")!r}: every backend="inductor" compile is '
        + ("rewritten" if switch.is_enabled() else "left alone"),
    ]
    for name, value in config.get_config_copy().items():
        problem = config.problem_with(name, value)
        if problem is not None:
            lines.append(f"config.{name}: {problem}")
        elif value != config.default_of(name):
            lines.append(f"config.{name} = {value!r} (default {config.default_of(name)!r})")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
