"""Which kernel is the fastest: times of all of them, measured once on each generation of devices, kept as data.

``measured.json`` is written by ``benchmarks/kernels.py``. For each compute capability it has rows of times, forward and backward,
of every backend that could run a shape; a problem is answered by the row most like it. Whatever was not measured comes after what
was, in the order of the list of backends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from varlen_inductor.ops.backends.base import Backend
from varlen_inductor.ops.problem import Problem

TABLE = Path(__file__).with_name("measured.json")
UNKNOWN_LENGTH = 512
"""What a bound of the lengths is taken for when it is a symbol."""


@cache
def rows_for(capability: tuple[int, int]) -> tuple[dict[str, Any], ...]:
    """The rows measured on devices of this compute capability."""
    tables = json.loads(TABLE.read_text())["devices"]
    found = tables.get(f"{capability[0]}.{capability[1]}", {})
    return tuple(found.get("rows", ()))


def by_time(problem: Problem, backward: bool, backends: Sequence[Backend]) -> tuple[Backend, ...] | None:
    """The backends, the one with the shortest time first; None if nothing like the problem was measured."""
    row = _row(problem)
    if row is None:
        return None
    times = _times(row, problem.dropout_p > 0.0, backward)
    return tuple(sorted(backends, key=lambda backend: times.get(backend.name, math.inf)))


def _row(problem: Problem) -> dict[str, Any] | None:
    if problem.device.type != "cuda" or torch.version.hip is not None or problem.dtype not in (torch.float16, torch.bfloat16):
        return None
    rows = rows_for(torch.cuda.get_device_capability(problem.device))
    causal = problem.window_right == 0
    asked = (causal, problem.dropout_p > 0.0, problem.seqused_k)
    alike = [row for row in rows if (row["causal"], row["dropout"], row["in_place"]) == asked]
    if not alike:
        return None
    dim = max(problem.head_dim, problem.head_dim_v)
    length = problem.length or UNKNOWN_LENGTH
    # Kernels are made for a few head dims, and run others as the next larger one.
    return min(alike, key=lambda row: (row["head_dim"] < dim, abs(row["head_dim"] - dim), abs(math.log2(row["length"] / length))))


def _times(row: dict[str, Any], dropout: bool, backward: bool) -> dict[str, float]:
    if not dropout:
        return row["backward_us"] if backward else row["forward_us"]  # type: ignore[no-any-return]
    # Each kernel draws in its own way, so the backward must be the forward's: what counts is both together.
    both = row["forward_us"].keys() & row["backward_us"].keys()
    return {name: row["forward_us"][name] + row["backward_us"][name] for name in both}
