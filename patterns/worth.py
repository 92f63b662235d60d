"""Whether packing a region can pay, and from which size of batch on.

A region that holds nothing but attentions is not worth a plan. Where there is more, a packed step saves work and costs a wait for
the number of tokens; on a GPU a small batch has no work to save: its kernels are over before the host has launched the next. What
decides is how long a linear runs, against the time that it takes to launch one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import fx

from .nodes import arguments, aten, overload_packet, tensor
from .oprules import op_name
from .regions import Choice
from .site import attention_of

HEAVY = frozenset({"linear", "matmul", "mm", "bmm", "einsum"})
LEAST_WORK = 1.2e10
"""Multiply-adds of a padded linear, in the mean, from which on packing pays on a GPU: between the largest batch that lost and the
smallest that gained by it on one H100 with width 768 (B 32, S 128 in benchmarks/when_to_pack.py; B 32, S 512 in
benchmarks/model.py)."""
WITH_CUDA_GRAPHS = 0.25
"""So much less where nothing is launched one by one. A guess: nothing was measured."""

_WEIGHTS = {aten.linear: "weight", aten.addmm: "mat2", aten.mm: "mat2", aten.matmul: "other"}
"""What is called the weight. (Of the other operands one may have two dims as well: rows of tokens.)"""


def worth_packing(choice: Choice) -> bool:
    """Whether some region holds more than its attentions."""
    return any(attention_of(node) is None and op_name(node) in HEAVY for node in _packed(choice))


def smallest_batch(choice: Choice, cuda_graphs: bool) -> int:
    """The number of positions, padded ones included, from which on packing these regions pays; 0 on the CPU.

    Args:
        cuda_graphs: whether the compiled graphs are to be recorded.
    """
    sizes = [size for node in _packed(choice) if (size := _outputs_times_inputs(node)) is not None]
    if not sizes:
        return 0
    work = LEAST_WORK * (WITH_CUDA_GRAPHS if cuda_graphs else 1.0)
    return math.ceil(work * len(sizes) / sum(sizes))


def _packed(choice: Choice) -> Iterable[fx.Node]:
    return (node for region in choice.regions for node in region.nodes)


def _outputs_times_inputs(node: fx.Node) -> int | None:
    """The size of the weight of a linear on a GPU."""
    name = _WEIGHTS.get(overload_packet(node))
    weight = None if name is None else tensor(arguments(node)[name])
    if weight is None or weight.dim() != 2 or weight.device.type != "cuda" or not _known(weight):
        return None
    return weight.numel()


def _known(x: torch.Tensor) -> bool:
    return all(isinstance(n, int) for n in x.shape)
