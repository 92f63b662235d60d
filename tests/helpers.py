"""Small things that several test files need."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).parent.parent


class MaskedAttention(nn.Module):
    """Self-attention under a key padding mask, between two linears: the smallest model that the passes are for."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """``x``: (B, S, E); ``valid``: bool (B, S). Returns (B, S, E)."""
        batch, length, width = x.shape
        query, key, value = (part.view(batch, length, self.heads, -1).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=valid[:, None, None, :])
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


def padded_batch(batch: int = 3, length: int = 8, width: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ``x`` (B, S, E) and a mask ``valid`` (B, S) with rows of different lengths, none of them empty."""
    lengths = torch.arange(batch) * max(1, length // batch) + 1
    return torch.randn(batch, length, width), torch.arange(length) < lengths[:, None]


@contextmanager
def stub_driver(
    compile_graph: Callable[..., Any] | None = None, rewrite_in_place: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Replace the passes, so that what is around them can be tested alone."""
    import varlen_inductor

    driver = types.ModuleType("varlen_inductor.driver")
    driver.compile_graph = compile_graph or (lambda gm, inputs, inner, route: inner.compile(gm, inputs))
    driver.rewrite_in_place = rewrite_in_place
    real = sys.modules.get(driver.__name__)
    with mock.patch.object(varlen_inductor, "driver", driver, create=True):
        # Not `mock.patch.dict`: it would also forget every module that is imported meanwhile.
        sys.modules[driver.__name__] = driver
        try:
            yield
        finally:
            if real is None:
                del sys.modules[driver.__name__]
            else:
                sys.modules[driver.__name__] = real


def run_python(code: str, **env: str) -> str:
    """Run a program in a fresh interpreter from the root of the checkout; its standard output, stripped.

    Raises:
        AssertionError: it failed; the message is its standard error.
    """
    drop = {"VARLEN_INDUCTOR", "TORCH_LOGS", "TORCH_TRACE", "PYTEST_XDIST_WORKER"}
    full = {name: value for name, value in os.environ.items() if name not in drop}
    full |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=full, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-4000:]}"
    return done.stdout.strip()
