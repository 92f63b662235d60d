"""Every CUDA kernel that is installed, against the reference; one that cannot run a problem is skipped with its reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attention_cases import LENGTHS, WINDOWS, check_against_reference, make_case
from varlen_inductor.ops.attention import split_arguments
from varlen_inductor.ops.backends import BACKENDS
from varlen_inductor.ops.problem import Problem

KERNELS = {backend.name: backend for backend in BACKENDS if backend.name not in ("cpu", "math")}
every_kernel = pytest.mark.parametrize("kernels", KERNELS)


def check(kernels: str, *lengths: Any, lse_gradient: bool = True, **options: Any) -> None:
    case = make_case(*lengths, kernels=kernels, device="cuda", **options)
    layout, rule, _ = split_arguments(case.query, *case.operands[3:], **case.options)
    reason = KERNELS[kernels].supports(Problem.of(*case.operands[:3], layout, rule))
    if reason is not None:
        pytest.skip(reason)
    check_against_reference(case, lse_gradient=lse_gradient)


@every_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths(lengths: str, window: str, dtype: torch.dtype, kernels: str) -> None:
    check(kernels, *LENGTHS[lengths], heads=(4, 2), dims=(64, 64), window=WINDOWS[window], dtype=dtype, tail=5)


@every_kernel
@pytest.mark.parametrize("dims", [(16, 16), (32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (64, 128)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (8, 1)], ids=str)
def test_heads_and_dims(heads: tuple[int, int], dims: tuple[int, int], kernels: str) -> None:
    check(kernels, (130, 1, 517, 64), heads=heads, dims=dims, window=(-1, 0), dtype=torch.bfloat16, lse_gradient=False)


@every_kernel
@pytest.mark.parametrize("window", ["full", "causal"])
def test_more_than_64k_tokens(window: str, kernels: str) -> None:
    """Many short sequences: more rows than 16 bits count, and more sequences than some kernels sort."""
    check(kernels, (220, 3) * 300, heads=(2, 1), dims=(64, 64), window=WINDOWS[window], dtype=torch.bfloat16)
