"""The time of every kernel backend on this GPU: the table by which one is chosen without autotuning.

    python benchmarks/kernels.py [--write] [--output FOLDER]

Random lengths with about 16k tokens in all, bfloat16, 1024 numbers a token over all heads. Times are of the backend's own call
(device events, median, caches cold), so of kernels and not of Python; how long the host takes for a call is measured apart.
With ``--write`` the rows replace those of this compute capability in ``varlen_inductor/ops/backends/measured.json``, which is part
of the package.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import environment, median_ms, save
from torch import Tensor

from varlen_inductor.ops import packing
from varlen_inductor.ops.backends import BACKENDS, kept
from varlen_inductor.ops.backends.measured import TABLE
from varlen_inductor.ops.problem import Layout, Problem, Rule

TOKENS = 16384
WIDTH = 1024
BRIEFLY = (25, 100)


class Shape(NamedTuple):
    head_dim: int
    length: int
    causal: bool = False
    dropout: bool = False
    in_place: bool = False


def shapes() -> Iterator[Shape]:
    for head_dim in (64, 128):
        for length in (512, 2048, 8192):
            for causal in (False, True):
                yield Shape(head_dim, length, causal)
        yield Shape(head_dim, 512, dropout=True)
        for causal in (False, True):
            yield Shape(head_dim, 2048, causal, in_place=True)


def operands(shape: Shape, tokens: int = TOKENS) -> tuple[list[Tensor], Layout, Rule]:
    """Query, key, value and a gradient of the output, where the sequences lie, and the rule."""
    generator = torch.Generator().manual_seed(shape.length)
    batch = max(2 * tokens // shape.length, 1)
    lengths = torch.randint(1, shape.length + 1, (batch,), generator=generator)
    lengths[0] = shape.length
    rows = batch * shape.length if shape.in_place else int(lengths.sum())
    heads = WIDTH // shape.head_dim
    tensors = [torch.randn(rows, heads, shape.head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    used = None
    if shape.in_place:
        mask = (torch.arange(shape.length)[None] < lengths[:, None]).cuda()
        _, _, offsets, used = packing.plan_in_place(mask)
    else:
        offsets = torch.zeros(batch + 1, dtype=torch.int32, device="cuda")
        offsets[1:] = lengths.cumsum(0)
    layout = Layout(offsets, offsets, shape.length, shape.length, used, tails_unread=True)
    rule = Rule(1.0 / math.sqrt(shape.head_dim), window_right=0 if shape.causal else -1, dropout_p=0.1 if shape.dropout else 0.0)
    return tensors, layout, rule


def measure(shape: Shape) -> dict[str, Any]:
    tensors, layout, rule = operands(shape)
    query, key, value, gradient = tensors
    problem = Problem.of(query, key, value, layout, rule)
    row: dict[str, Any] = {**shape._asdict(), "tokens": query.shape[0], "forward_us": {}, "backward_us": {}, "refused": {}}
    for backend in BACKENDS:
        reason = backend.supports(problem) if backend.name != "math" else "it is for what nothing else can run"
        if reason is not None:
            row["refused"][backend.name] = reason
            continue
        try:
            forward = partial(backend.forward, query, key, value, layout, rule)
            row["forward_us"][backend.name] = round(median_ms(forward, "cuda", device_ms=BRIEFLY) * 1e3, 1)
            backward = partial(backend.backward, gradient, None, *forward(), query, key, value, layout, rule)
            row["backward_us"][backend.name] = round(median_ms(backward, "cuda", device_ms=BRIEFLY) * 1e3, 1)
        except Exception as error:  # a kernel that fails is out of the table, with what it said
            row["refused"][backend.name] = f"{type(error).__name__}: {error}"[:200]
    return row


def measure_hosts() -> dict[str, dict[str, float]]:
    """What a call takes the host, in microseconds, by backend and direction: of a problem whose kernels are over at once.

    As in a packed graph; for a caller to whom rows behind the last sequence matter ("tails"); and as in a packed graph in which
    nobody reads lse, in inference ("alone").
    """
    (query, key, value, gradient), unread, rule = operands(Shape(64, 128), tokens=512)
    problem = Problem.of(query, key, value, unread, rule)
    offsets = unread.cu_seq_q.clone()
    kept.never_written(offsets)
    as_packed = unread._replace(cu_seq_q=offsets, cu_seq_k=offsets)
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for backend in BACKENDS:
        if backend.name == "math" or backend.supports(problem) is not None:
            continue
        packed = as_packed._replace(lse_by_row=backend.lse_by_row)
        for layout, suffix in ((packed, ""), (unread._replace(tails_unread=False), ", tails")):
            forward = partial(backend.forward, query, key, value, layout, rule)
            backward = partial(backend.backward, gradient, None, *forward(), query, key, value, layout, rule)
            backward()
            calls |= {(backend.name, f"forward{suffix}"): forward, (backend.name, f"backward{suffix}"): backward}
        if backend.forward_drawn is not None:
            drawn = partial(backend.forward_drawn, query, key, value, packed, rule)
            calls |= {(backend.name, "forward"): partial(drawn, True), (backend.name, "forward, alone"): partial(drawn, False)}
    times: dict[tuple[str, str], list[float]] = {name: [] for name in calls}
    # In turns, and the least of all: whatever else a host does makes a call longer, and does so for a while.
    for _ in range(12):
        for name, call in calls.items():
            times[name].append(host_us(call))
    found: dict[str, dict[str, float]] = {}
    for (backend_name, direction), measured in times.items():
        found.setdefault(backend_name, {})[direction] = round(min(measured), 1)
    return found


def host_us(function: Callable[[], Any], calls: int = 50) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls * 1e6


def show(row: dict[str, Any]) -> str:
    flags = " ".join(name for name in ("causal", "dropout", "in_place") if row[name])
    times = [f"{name} {row['forward_us'][name]:.0f}/{row['backward_us'].get(name, math.nan):.0f}" for name in row["forward_us"]]
    return f"D {row['head_dim']:3} length {row['length']:5} {flags:16} us forward/backward: " + ", ".join(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make the rows part of the package")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device: the table is for the choice between CUDA kernels")
    torch.manual_seed(0)
    hosts = measure_hosts()
    print("us of the host:", ", ".join(f"{name} {'/'.join(f'{us:.0f}' for us in times.values())}" for name, times in hosts.items()))
    rows: list[dict[str, Any]] = []
    for shape in shapes():
        rows.append(measure(shape))
        print(show(rows[-1]), flush=True)
        saved = save("kernels-cuda", "cuda", {"rows": rows, "host_us": hosts}, options.output)
        if options.write:
            write(rows, hosts)
    print("wrote", saved)


def write(rows: list[dict[str, Any]], hosts: dict[str, dict[str, float]]) -> None:
    """Make the rows those of this compute capability in the package's table."""
    table = json.loads(TABLE.read_text())
    major, minor = torch.cuda.get_device_capability()
    named = [{name: value for name, value in row.items() if name not in ("refused", "tokens")} for row in rows]
    table["devices"][f"{major}.{minor}"] = {"measured": environment("cuda"), "host_us": hosts, "rows": named}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
