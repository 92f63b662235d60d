"""Which kernel is fastest, found by running them: what `max_autotune` means for varlen attention.

When Inductor compiles with ``max_autotune`` each attention of the graph is timed, forward and backward, with every backend that
can run it and that ``config.kernels`` allows, on random operands of the sizes that the graph was traced with and sequences of
ragged lengths that fill them. The backends in the order of their times then stand in the graph as the operator's ``kernels``:

    before                                                     after
    %o = varlen_attn(%q, %k, %v, ..., kernels="auto")          %o = varlen_attn(%q, %k, %v, ..., kernels="triton,aten_flash")

So the choice is part of what Inductor's caches keep. Times are kept beside these caches as well, and found there by later compiles
and other processes. Inductor's own autotuning is for operators with one output.

Each kernel drops other weights, so with dropout the forward and the backward are timed together and get the same order.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varlen_inductor import _compat, _compat_inductor, inductor_pass
from varlen_inductor.ops.backends import BACKENDS, fallback, kept, named
from varlen_inductor.ops.backends.base import Backend
from varlen_inductor.ops.problem import Layout, Problem, Rule

log = logging.getLogger(__name__)


class Question(NamedTuple):
    """What is timed. Equal questions have one answer."""

    problem: Problem
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    sequences: int
    max_q: int
    max_k: int
    one_layout: bool
    part: str
    """``"forward"``, ``"backward"``, or ``"both"``."""
    candidates: tuple[str, ...]


_answers: dict[Question, dict[str, float]] = {}


def ranking(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule, kernels: str, *, backward: bool) -> str | None:
    """The value for ``kernels`` that names the backends from fast to slow; None if there is nothing to time.

    Args:
        query, key, value, layout: fakes, as a graph is traced with.
        kernels: as ``config.kernels``.
    """
    if not _compat_inductor.inductor_setting("max_autotune") or layout.block_table is not None:
        return None  # keys in pages are for decoding, whose lengths nothing here tells
    # Forward and backward must have one answer, which both find only to the same question.
    layout = layout._replace(seeds=None)
    problem = Problem.of(query, key, value, layout, rule)
    candidates = _candidates(problem, kernels, backward)
    if len(candidates) < 2:
        return None
    part = "both" if rule.dropout_p > 0.0 else "backward" if backward else "forward"
    question = _question(problem, (query, key, value), layout, part, candidates)
    if question is None:
        log.debug("varlen_attn is not timed: its sizes are known only when the graph runs")
        return None
    times = _answer(question, layout, rule)
    return ",".join(sorted(times, key=times.__getitem__)) or None


def forget() -> None:
    """Drop the times in memory; those on disk stay."""
    _answers.clear()


def _candidates(problem: Problem, kernels: str, backward: bool) -> tuple[str, ...]:
    forced, forbidden = named(kernels)
    without = forbidden | fallback.failed(problem, backward)
    able = [b for b in BACKENDS if (not forced or b.name in forced) and b.name not in without and b.supports(problem) is None]
    if problem.device.type != "cpu" and not all(backend.reads_lengths for backend in able):
        # Those that wait for the device at every call are no choice where others are.
        able = [backend for backend in able if not backend.reads_lengths]
    return tuple(backend.name for backend in able)


def _question(
    problem: Problem, operands: tuple[Tensor, Tensor, Tensor], layout: Layout, part: str, candidates: tuple[str, ...]
) -> Question | None:
    hints = [_compat.hint(n) for x in operands for n in (*x.shape, *x.stride())]
    hints += [_compat.hint(n) for n in (layout.cu_seq_q.shape[0], layout.max_q, layout.max_k)]
    if any(n is None for n in hints):
        return None
    numbers = [int(n) for n in hints if n is not None]
    query, stride_q, key, stride_k, value, stride_v = (tuple(numbers[i : i + 3]) for i in range(0, 18, 3))
    strides, (entries, max_q, max_k) = (stride_q, stride_k, stride_v), numbers[18:]
    one_layout = layout.cu_seq_q is layout.cu_seq_k
    return Question(problem, query, key, value, strides, entries - 1, max_q, max_k, one_layout, part, candidates)


def _answer(question: Question, layout: Layout, rule: Rule) -> dict[str, float]:
    """The time of each candidate in milliseconds, but of those that failed."""
    times = _answers.get(question)
    if times is None:
        path = _file(question, rule)
        times = _read(path)
        if times is None:
            times = _time(question, layout, rule)
            _write(path, times)
            _compat.counters()["autotuned"] += 1
        _answers[question] = times
    return times


# --- timing ----------------------------------------------------------------------------------------------------------


def _time(question: Question, layout: Layout, rule: Rule) -> dict[str, float]:
    times = {}
    with _compat_inductor.measuring(question.problem.device):
        try:
            operands, real = _operands(question), _layout(question, layout)
            gradient = torch.randn_like(operands[0].new_empty(*question.query[:2], question.value[2]))
        except torch.OutOfMemoryError:
            log.debug("varlen_attn is not timed: there is no memory for its operands")
            return {}
        for backend in BACKENDS:
            if backend.name in question.candidates:
                try:
                    run = _runner(backend, operands, real, rule, question.part, gradient)
                    times[backend.name] = _compat_inductor.benchmark(run, question.problem.device)
                except Exception as error:
                    log.debug("varlen_attn, %s: %s raised %s: %s", question.part, backend.name, type(error).__name__, error)
    shown = ", ".join(f"{name} {time:.4f} ms" for name, time in sorted(times.items(), key=lambda entry: entry[1]))
    shape = f"{question.query}, {question.key}, {question.sequences} sequences, {question.problem.dtype}"
    log.debug("varlen_attn, %s of %s: %s", question.part, shape, shown)
    return times


def _runner(
    backend: Backend, operands: tuple[Tensor, ...], layout: Layout, rule: Rule, part: str, gradient: Tensor
) -> Callable[[], Any]:
    query, key, value = operands
    if backend.lse_by_row and layout.tails_unread and layout.cu_seq_q is layout.cu_seq_k and layout.seqused_k is None:
        # As in a packed graph, whose layers share what is found out about the offsets.
        kept.never_written(layout.cu_seq_q)
        layout = layout._replace(lse_by_row=True)
    seeds = None
    if backend.takes_seeds and rule.dropout_p > 0.0:
        seeds = torch.randint(0, 2**31, (2,), device=query.device)  # which the kernel need not draw in a graph
    layout = layout._replace(seeds_at=0, seeds=seeds)

    def forward() -> tuple[Tensor, Tensor, Tensor]:
        out, lse, rng_state = backend.forward(query, key, value, layout, rule)
        return out, lse, rng_state if seeds is None else seeds

    results = forward()

    def backward() -> tuple[Tensor, Tensor, Tensor]:
        return backend.backward(gradient, None, *results, query, key, value, layout, rule)

    def both() -> tuple[Tensor, Tensor, Tensor]:
        return backend.backward(gradient, None, *forward(), query, key, value, layout, rule)

    return {"forward": forward, "backward": backward, "both": both}[part]


def _operands(question: Question) -> tuple[Tensor, ...]:
    shapes = (question.query, question.key, question.value)
    device, dtype = question.problem.device, question.problem.dtype
    made = [torch.empty_strided(shape, stride, dtype=dtype, device=device) for shape, stride in zip(shapes, question.strides)]
    return tuple(x.normal_() for x in made)


def _layout(question: Question, layout: Layout) -> Layout:
    """Sequences that fill the rows, in the place of the fakes of ``layout``."""
    device = question.problem.device
    lengths_q = lengths(question.query[0], question.sequences, question.max_q)
    lengths_k = lengths_q if question.one_layout else lengths(question.key[0], question.sequences, question.max_k)
    cu_seq_q = _offsets(lengths_q, device)
    real = layout._replace(
        cu_seq_q=cu_seq_q,
        cu_seq_k=cu_seq_q if question.one_layout else _offsets(lengths_k, device),
        max_q=question.max_q,
        max_k=question.max_k,
    )
    if layout.seqused_k is not None:
        real = real._replace(seqused_k=torch.tensor(lengths_k, dtype=torch.int32, device=device))
    if layout.position_q is not None and layout.position_k is not None:
        position_q = _positions(lengths_q, question.query[0]).to(device, layout.position_q.dtype)
        position_k = _positions(lengths_k, question.key[0]).to(device, layout.position_k.dtype)
        real = real._replace(position_q=position_q, position_k=position_k)
    return real


def lengths(tokens: int, sequences: int, longest: int) -> list[int]:
    """Ragged lengths, from about half to one and a half times their mean and at most ``longest``, that add up to ``tokens``.

    If they cannot, because ``tokens`` is more than ``sequences * longest``, all are ``longest``.
    """
    shares = [0.5 + i * 0.6180339887 % 1.0 for i in range(sequences)]
    found = [min(int(tokens * share / sum(shares)), longest) for share in shares]
    missing = tokens - sum(found)
    for i in range(sequences):
        more = min(missing, longest - found[i])
        found[i] += more
        missing -= more
    return found


def _offsets(lengths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def _positions(lengths: list[int], tokens: int) -> Tensor:
    rest = torch.zeros(tokens - sum(lengths), dtype=torch.int64)
    return torch.cat([*(torch.arange(length) for length in lengths), rest])


# --- keeping the times -----------------------------------------------------------------------------------------------


def _file(question: Question, rule: Rule) -> Path | None:
    folder = _compat_inductor.autotune_cache_folder()
    if folder is None:
        return None
    device = question.problem.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {torch.get_num_threads()}"
    key = repr((inductor_pass.source_hash(), torch.__version__, machine, question, rule))
    return Path(folder) / "varlen_inductor" / f"{hashlib.sha256(key.encode()).hexdigest()}.json"


def _read(path: Path | None) -> dict[str, float] | None:
    try:
        return None if path is None else dict(json.loads(path.read_text()))
    except (OSError, ValueError):
        return None


def _write(path: Path | None, times: dict[str, float]) -> None:
    if path is None or not times:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under another name first, so that nobody reads half a file.
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(times))
        part.replace(path)
    except OSError as error:
        log.debug("the times of varlen_attn are not kept: %s", error)
