"""All numbers of float16 or bfloat16, and what GELU is of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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
