"""All numbers of float16 or bfloat16, what GELU is of them, and the pass that writes it shorter where Inductor calls ours."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from varlen_inductor._compat_inductor import graph_pass_class
from varlen_inductor.lowering.short_erf import shorten_erf


class Shorter(graph_pass_class()):  # type: ignore[misc]
    def __init__(self, device_type: str) -> None:
        self.device_type = device_type
        self.changed: list[int] = []
        """How many places of each graph."""

    def __call__(self, graph: fx.Graph) -> None:
        self.changed.append(shorten_erf(graph, self.device_type))

    def uuid(self) -> None:
        return None  # not to be cached


def all_numbers(dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """(2^16,): every number, zeros of both signs, infinities and NaN among them."""
    return torch.arange(2**16, dtype=torch.int32, device=device).to(torch.int16).view(dtype)


def gelu_and_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    """GELU of ``x`` and its derivative there, in float64: x Phi(x), and Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi)."""
    x = x.detach().double()
    below = 0.5 * torch.special.erfc(-x * math.sqrt(0.5))
    return x * below, below + x * (-0.5 * x * x).exp() / math.sqrt(2 * math.pi)


def wrongly_rounded(x: Tensor, truth: Tensor) -> int:
    """How many of ``x`` are not the number of its dtype that is nearest to ``truth``, where that is finite."""
    return int(((x != truth.to(x.dtype)) & truth.isfinite()).sum())
