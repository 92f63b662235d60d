"""Attention written out in PyTorch operations, one block of queries at a time: exact, on any device, never fast.

It runs what no kernel runs. Scores exist for one block of queries only, and a window or causality also cuts the keys that a
block looks at. Half precision operands are computed with in float32, float64 in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from varlen_inductor.ops.backends.base import Backend
from varlen_inductor.ops.backends.sequences import Run, runs
from varlen_inductor.ops.problem import UNBOUNDED, Layout, Problem, Rule, lse_dtype

BLOCK_SCORES = 1 << 21
"""How many scores are held at once, about."""

WINDOW_ROWS = 256
"""Queries in a block under a window: the fewer they are, the more keys lie outside the window of all of them."""

DROPOUT_STEPS = 1 << 16
"""Dropout probabilities are rounded to a multiple of one in so many."""


def supports(problem: Problem) -> str | None:
    """``None``: whatever the operator defines, this computes; but for keys in pages, which are gathered for it."""
    return "it does not read pages where they lie" if problem.paged else None


class Block(NamedTuple):
    """Queries ``q`` and keys ``k`` (slices within a sequence) of every sequence of a run, and who sees whom.

    ``visible`` is (count or 1, queries, keys), or ``None`` if every query sees every key.
    """

    q: slice
    k: slice
    visible: Tensor | None


def forward(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of every sequence; see ``Forward``."""
    out = query.new_zeros(query.shape[0], query.shape[1], value.shape[2])
    lse = query.new_full((query.shape[1], query.shape[0]), float("-inf"), dtype=lse_dtype(query.dtype))
    rng_state = new_rng_state(rule.dropout_p, query.device)
    generator = replay(rng_state)
    for run in runs(layout):
        if run.k_len > 0:
            run_forward(run, query, key, value, out, lse, layout, rule, generator)
    return out, lse, rng_state


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; see ``Backward``."""
    grads = query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    _differentiate(grads, grad_out, grad_lse, lse, rng_state, query, key, value, layout, rule)
    return grads


def backward_into(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: Rule,
) -> None:
    """The same into ``grads``; see ``BackwardInto``."""
    for grad in grads:
        grad.zero_()
    _differentiate(grads, grad_out, None, lse, rng_state, query, key, value, layout, rule)


def _differentiate(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    lse: Tensor,
    rng_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: Rule,
) -> None:
    """Writes ``grads``, which are zeros, where a query sees keys."""
    generator = replay(rng_state)
    for run in runs(layout):
        if run.k_len > 0:
            run_backward(run, grad_out, grad_lse, lse, query, key, value, grads, layout, rule, generator)


def run_forward(
    run: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
    rule: Rule,
    generator: torch.Generator | None,
) -> None:
    """Writes the rows of ``run`` in ``out`` (T_q, H, D_v) and ``lse`` (H, T_q)."""
    for part in _parts(run, query.shape[1]):
        _part_forward(part, query, key, value, out, lse, layout, rule, generator)


def _part_forward(
    run: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
    rule: Rule,
    generator: torch.Generator | None,
) -> None:
    groups = query.shape[1] // key.shape[1]
    queries, keys, values = run.queries(query), _by_head(run.keys(key)), _by_head(run.keys(value))
    outs, lses = run.queries(out), run.queries(lse.t())
    for block in _blocks(run, query.shape[1], layout, rule):
        scores = _scores(_by_head(queries[:, block.q], groups), keys[:, block.k], block, run.count, groups, rule)
        block_lse = scores.logsumexp(-1, keepdim=True)
        probabilities = _probabilities(scores, block_lse)
        dropout = _dropout(probabilities, rule, generator)
        if dropout is not None:
            probabilities *= dropout.kept
        block_out = torch.bmm(probabilities, values[:, block.k])
        if dropout is not None:
            block_out *= dropout.factor
        outs[:, block.q] = _by_row(block_out, run.count, groups).to(out.dtype)
        lses[:, block.q] = _by_row(block_lse, run.count, groups).squeeze(-1)


def run_backward(
    run: Run,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    layout: Layout,
    rule: Rule,
    generator: torch.Generator | None,
) -> None:
    """Writes the rows of ``run`` in each of ``grads`` (shaped as query, key, value)."""
    for part in _parts(run, query.shape[1]):
        _part_backward(part, grad_out, grad_lse, lse, query, key, value, grads, layout, rule, generator)


def _part_backward(
    run: Run,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    layout: Layout,
    rule: Rule,
    generator: torch.Generator | None,
) -> None:
    groups = query.shape[1] // key.shape[1]
    queries, keys, values = run.queries(query), _by_head(run.keys(key)), _by_head(run.keys(value))
    grad_outs, lses = run.queries(grad_out), run.queries(lse.t().unsqueeze(-1))
    grad_lses = None if grad_lse is None else run.queries(grad_lse.t().unsqueeze(-1))
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    for block in _blocks(run, query.shape[1], layout, rule):
        q, g = _by_head(queries[:, block.q], groups), _by_head(grad_outs[:, block.q], groups)
        k, v = keys[:, block.k], values[:, block.k]
        scores = _scores(q, k, block, run.count, groups, rule)
        # Behind a cap c * tanh(x / c) the gradient is 1 - tanh(x / c) ** 2 of that before it. (A hidden score's weight is 0.)
        slope = scores.div(rule.softcap).clamp_(min=-1.0).square_().neg_().add_(1.0) if rule.softcap > 0.0 else None
        p = _probabilities(scores, _by_head(lses[:, block.q], groups))
        dropout = _dropout(p, rule, generator)
        if dropout is not None:
            g = g * dropout.factor
        grad_values[:, block.k] += torch.bmm((p if dropout is None else p * dropout.kept).mT, g)
        grad_p = torch.bmm(g, v.mT)
        if dropout is not None:
            grad_p *= dropout.kept
        # out = p v gives p (grad_p - sum(p grad_p)); lse gives p grad_lse.
        grad_scores = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)
        if grad_lses is not None:
            grad_scores.addcmul_(p, _by_head(grad_lses[:, block.q], groups))
        if slope is not None:
            grad_scores *= slope
        grad_scores *= rule.scale
        grad_keys[:, block.k] += torch.bmm(grad_scores.mT, q)
        grad_queries = torch.bmm(grad_scores, k)
        run.queries(grads[0])[:, block.q] = _by_row(grad_queries, run.count, groups).to(query.dtype)
    run.keys(grads[1]).copy_(_by_row(grad_keys, run.count, 1))
    run.keys(grads[2]).copy_(_by_row(grad_values, run.count, 1))


def new_rng_state(dropout_p: float, device: torch.device) -> Tensor:
    """A seed drawn from the default generator of ``device``, as ``rng_state``; empty if nothing is dropped.

    From that one and no other: it is what PyTorch sets back where a forward is computed again.
    """
    if dropout_p == 0.0:
        return torch.empty(0, dtype=torch.uint64, device=device)
    return torch.randint(0, 2**62, (2,), dtype=torch.int64, device=device).view(torch.uint64)


def replay(rng_state: Tensor) -> torch.Generator | None:
    """A generator that draws what the forward drew, if blocks are visited in the same order; ``None`` without dropout."""
    if rng_state.numel() == 0:
        return None
    seed = int(rng_state.view(torch.int64)[0])
    return torch.Generator(rng_state.device).manual_seed(seed)


def _by_head(rows: Tensor, groups: int = 1) -> Tensor:
    """(count, rows, H, D) → (count * H / groups, groups * rows, D): query heads that share a key head follow one another."""
    count, length, heads, dim = rows.shape
    by_head = rows.unflatten(2, (heads // groups, groups)).permute(0, 2, 3, 1, 4)
    return by_head.reshape(count * (heads // groups), groups * length, dim).to(lse_dtype(rows.dtype))


def _by_row(heads: Tensor, count: int, groups: int) -> Tensor:
    """The inverse of ``_by_head``."""
    split = heads.unflatten(1, (groups, -1)).unflatten(0, (count, -1))
    return split.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _parts(run: Run, num_heads: int) -> Iterator[Run]:
    """So few of the sequences at once that a block can have the queries that it has for one: results depend on no neighbour."""
    most = max(1, BLOCK_SCORES // (num_heads * run.k_len * run.q_len))
    for start in range(0, run.count, most):
        q_start, k_start = run.q_start + start * run.q_len, run.k_start + start * run.k_step
        yield run._replace(count=min(most, run.count - start), q_start=q_start, k_start=k_start)


def _blocks(run: Run, num_heads: int, layout: Layout, rule: Rule) -> Iterator[Block]:
    rows = max(1, min(run.q_len, BLOCK_SCORES // (num_heads * run.k_len)))
    if rule.windowed and layout.position_q is None:
        rows = min(rows, WINDOW_ROWS)
    for start in range(0, run.q_len, rows):
        yield _block(run, slice(start, min(start + rows, run.q_len)), layout, rule)


def _block(run: Run, q: slice, layout: Layout, rule: Rule) -> Block:
    """The keys that queries ``q`` may see: those outside the window of every one of them are left out."""
    if not rule.windowed:
        return Block(q, slice(0, run.k_len), None)
    if layout.position_q is not None and layout.position_k is not None:
        visible = _in_window(run.queries(layout.position_q)[:, q], run.keys(layout.position_k), rule)
        return Block(q, slice(0, run.k_len), visible)
    shift = run.k_len - run.q_len  # the last query is level with the last key
    first, last = q.start + shift, q.stop - 1 + shift
    start = 0 if rule.window_left == UNBOUNDED else min(max(first - rule.window_left, 0), run.k_len)
    stop = run.k_len if rule.window_right == UNBOUNDED else min(max(last + rule.window_right + 1, start), run.k_len)
    at_q = torch.arange(first, last + 1, device=layout.cu_seq_q.device).unsqueeze(0)
    at_k = torch.arange(start, stop, device=layout.cu_seq_q.device).unsqueeze(0)
    return Block(q, slice(start, stop), _in_window(at_q, at_k, rule))


def _in_window(at_q: Tensor, at_k: Tensor, rule: Rule) -> Tensor:
    """Whether the query at position ``at_q`` (count, queries) sees the key at ``at_k`` (count, keys)."""
    distance = at_k.unsqueeze(-2) - at_q.unsqueeze(-1)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if rule.window_left != UNBOUNDED:
        visible &= distance >= -rule.window_left
    if rule.window_right != UNBOUNDED:
        visible &= distance <= rule.window_right
    return visible


def _scores(q: Tensor, k: Tensor, block: Block, count: int, groups: int, rule: Rule) -> Tensor:
    scores = torch.bmm(q, k.mT).mul_(rule.scale)
    if rule.softcap > 0.0:
        scores.div_(rule.softcap).tanh_().mul_(rule.softcap)
    if block.visible is not None:
        hidden = block.visible.logical_not()[:, None, None]
        scores.unflatten(1, (groups, -1)).unflatten(0, (count, -1)).masked_fill_(hidden, float("-inf"))
    return scores


def _probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse), in place; 0 for a query that sees no key, whose lse is -inf."""
    return scores.sub_(lse.masked_fill(lse == float("-inf"), 0.0)).exp_()


class Dropout(NamedTuple):
    """Which weights are ``kept``, and the ``factor`` that makes up for the others."""

    kept: Tensor
    factor: float


def _dropout(probabilities: Tensor, rule: Rule, generator: torch.Generator | None) -> Dropout | None:
    """Decides with 16 random bits for each weight: eight times as fast on the CPU as ``bernoulli_``.

    The probability is rounded to those bits, and the factor is that of the rounded one, so expectations are exact.
    """
    if generator is None:
        return None
    dropped = round(rule.dropout_p * DROPOUT_STEPS)
    if dropped == DROPOUT_STEPS:
        return Dropout(torch.zeros_like(probabilities, dtype=torch.bool), 0.0)
    count = probabilities.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=probabilities.device).random_(-(2**63), None, generator=generator)
    bits = words.view(torch.int16)[:count].view(probabilities.shape)
    return Dropout(bits >= dropped - DROPOUT_STEPS // 2, DROPOUT_STEPS / (DROPOUT_STEPS - dropped))


BACKEND = Backend("math", supports, forward, backward, backward_into=backward_into, reads_lengths=True)
