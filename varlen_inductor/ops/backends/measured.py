"""Which kernel is the fastest: times of all of them, measured once on each generation of devices, kept as data.

``measured.json`` is written by ``benchmarks/kernels.py``. For each compute capability it has rows of times, forward and backward,
of every backend that could run a shape; a problem is answered by the row most like it. What counts is the time of the kernel and,
added to it, the time that its call takes the host. In packed graphs that is all of it: packed steps of short sequences are bound
by the host, and with long ones the kernel is so much the larger that nothing changes. Calls outside of
packed graphs, from eager code or a model that calls varlen attention itself, count it less (``UNPACKED_HOST``): there the host has
usually got ahead. It is larger there (``"forward, tails"``), for rows behind the last sequence matter, and some kernels need help
with them. In graphs that are recorded once and replayed the host does not count. Whatever was not measured comes after what was,
in the order of the list.
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
UNPACKED_HOST = 0.25
"""The weight of the host's time outside of packed graphs. In a row of calls on a H200 (benchmarks/attention.py: 64 sequences of up
to 512 tokens, 12 heads of 64) cuDNN's forward took 115 us and Triton's 126, though cuDNN's call takes the host twice as long."""
UNKNOWN_LENGTH = 512
"""What a bound of the lengths is taken for when it is a symbol."""


@cache
def table_for(capability: tuple[int, int]) -> dict[str, Any]:
    """What was measured on devices of this compute capability: ``rows``, and ``host_us`` by backend and direction."""
    devices = json.loads(TABLE.read_text())["devices"]
    return devices.get(f"{capability[0]}.{capability[1]}", {"rows": [], "host_us": {}})  # type: ignore[no-any-return]


def by_time(
    problem: Problem, backward: bool, backends: Sequence[Backend], host_counts: bool = True
) -> tuple[Backend, ...] | None:
    """The backends, the one with the shortest time first; None if nothing like the problem was measured.

    Args:
        host_counts: whether what a call takes the host is added to the kernel's time.
    """
    if problem.device.type != "cuda" or torch.version.hip is not None or problem.dtype not in (torch.float16, torch.bfloat16):
        return None
    table = table_for(torch.cuda.get_device_capability(problem.device))
    row = _most_like(problem, table["rows"])
    if row is None:
        return None
    # Each kernel drops weights in its own way, so the backward must be the forward's: what counts is both together.
    directions = ("forward", "backward") if problem.dropout_p > 0.0 else ("backward",) if backward else ("forward",)

    def time(name: str, direction: str) -> float:
        kernel: float = row[f"{direction}_us"].get(name, math.inf)
        return kernel + _host(table["host_us"].get(name, {}), direction, problem.tails_unread) if host_counts else kernel

    times = {b.name: sum(time(b.name, direction) for direction in directions) for b in backends}
    return tuple(sorted(backends, key=lambda backend: times[backend.name]))


def _most_like(problem: Problem, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    asked = (problem.window_right == 0, problem.dropout_p > 0.0, problem.seqused_k)
    alike = [row for row in rows if (row["causal"], row["dropout"], row["in_place"]) == asked]
    if not alike:
        return None
    dim = max(problem.head_dim, problem.head_dim_v)
    length = problem.length or UNKNOWN_LENGTH
    # Kernels are made for a few head dims, and run others as the next larger one.
    return min(alike, key=lambda row: (row["head_dim"] < dim, abs(row["head_dim"] - dim), abs(math.log2(row["length"] / length))))


def _host(of_backend: dict[str, float], direction: str, tails_unread: bool) -> float:
    """What a call takes the host, as far as it counts."""
    host = of_backend.get(direction, 0.0)
    return host if tails_unread else of_backend.get(f"{direction}, tails", host) * UNPACKED_HOST
