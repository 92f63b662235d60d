"""The kernel backends, and the choice between them.

To add one, write its file and put it in ``BACKENDS``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from varlen_inductor.ops.backends import aten_flash, cpu, math, triton_kernel
from varlen_inductor.ops.backends.base import Backend
from varlen_inductor.ops.problem import Problem

BACKENDS: tuple[Backend, ...] = (
    aten_flash.BACKEND,
    triton_kernel.BACKEND,
    cpu.BACKEND,
    math.BACKEND,  # runs everything everywhere, slowly: it comes last
)
"""Every backend, the preferred first."""


class Choice(NamedTuple):
    """The backend that runs a problem, and why each of the others does not."""

    backend: Backend
    refused: dict[str, str]


def backend_names() -> list[str]:
    return [backend.name for backend in BACKENDS]


def _order(problem: Problem, backward: bool) -> tuple[Backend, ...]:
    """The backends in the order in which they are asked.

    Measured on one H200 (benchmarks/kernels.py): the Triton forward takes 0.73 to 0.87 of FlashAttention 2's time with head dims
    64 and 128, its backward 1.15 to 1.7 times as long. Both kernels write the same lse, so one can follow the other, but for
    dropout, which each draws its own way. With short sequences the launch costs more than the kernel saves.
    """
    triton_first = (triton_kernel.BACKEND, *(b for b in BACKENDS if b is not triton_kernel.BACKEND))
    if problem.seqused_k:
        # It reads the keys in use where they lie; FlashAttention's backward would make sequences of the others.
        return triton_first
    measured = problem.head_dim == problem.head_dim_v and problem.head_dim in (64, 128) and problem.dtype != torch.float32
    if not backward and problem.long and measured and problem.dropout_p == 0.0 and triton_kernel.was_measured_on(problem.device):
        return triton_first
    return BACKENDS


@lru_cache(maxsize=1024)
def choose(problem: Problem, kernels: str = "auto", backward: bool = False) -> Choice:
    """The first backend that supports ``problem``, for its forward or its backward.

    ``kernels`` is the knob ``varlen_inductor.config.kernels``: ``"auto"``, or the name of the one to use.
    Raises ``ValueError`` for a name that no backend has, ``RuntimeError`` if the one that was asked for cannot run the
    problem.
    """
    if kernels != "auto" and kernels not in backend_names():
        raise ValueError(f"config.kernels is {kernels!r}; it must be 'auto' or one of {', '.join(backend_names())}")
    chosen: Backend | None = None
    refused: dict[str, str] = {}
    for backend in _order(problem, backward):
        if kernels not in ("auto", backend.name):
            refused[backend.name] = f"config.kernels asks for {kernels}"
            continue
        reason = backend.supports(problem)
        if reason is not None:
            refused[backend.name] = reason
        elif chosen is None:
            chosen = backend
        else:
            refused[backend.name] = f"{chosen.name} comes first"
    if chosen is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise RuntimeError(f"varlen_attn: no kernel can run this attention ({reasons})")
    return Choice(chosen, refused)
