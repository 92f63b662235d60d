"""varlen_attn in Inductor: PyTorch's own FlashAttention operators where they are the kernel of choice, else a plain call.

Our operator is Python to the dispatcher; a packed training step calls it twice a layer, and is bound by the host. Where the choice
falls on the kernels of `aten_flash` and nothing has to be done around them, the node is decomposed into the ATen operator, which
the generated code calls without any Python of ours (and which AOTInductor can call, too). Everywhere else the node stays one node,
and the generated code calls the function behind the operator (`direct`), past the dispatcher, autograd and the checks that were
made when the graph was traced. Under ``max_autotune`` the kernels are timed first (`autotune`). A kernel that can is given the
seeds of its dropout, and in a packed graph leaves lse as it writes it. Where nothing is left to be drawn the operator says so.

    before                                                        after
    %o = varlen_inductor.varlen_attn(%q, %k, %v, %cu, %cu, ...)   %o = aten._flash_attention_forward(%q, %k, %v, %cu, %cu, ...)
    %o = varlen_inductor.varlen_attn(%q, %k, %v, %cu, %cu, ...)   %o = varlen_inductor.varlen_attn_drawn(%q, %k, %v, %cu, %cu, ...)
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from varlen_inductor import _compat_inductor, config, inductor_pass
from varlen_inductor.lowering import ahead, autotune
from varlen_inductor.ops.attention import drawn_from, split_arguments
from varlen_inductor.ops.backends import aten_flash, choose, fallback
from varlen_inductor.ops.backends.base import Backend
from varlen_inductor.ops.problem import Layout, Problem, Rule

_DRAWN_AGAIN = (
    "varlen_attn drops weights in a graph that is compiled with an activation_memory_budget below 1, or with "
    "aggressive_recomputation. AOTAutograd may compute it again in the backward, where other weights are dropped: gradients are "
    "then wrong, as those of any dropout in such a graph. Compile with a budget of 1, or without dropout. On CUDA a budget above 0 "
    'is good, too, with backend="varlen_inductor", without fallback_random, and with config.kernels that allow triton or cudnn.'
)

_log = logging.getLogger("varlen_inductor")
_ops = torch.ops.varlen_inductor
_aten = torch.ops.aten


@functools.cache
def _warn_once(text: str) -> None:
    _log.warning(text)


def _direct(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule, kernels: str | None, backward: bool = False
) -> bool:
    """Whether the ATen operator alone does what ours promises here."""
    ahead_of_time = _compat_inductor.compiles_ahead_of_time()
    if query.device.type != "cuda" or not layout.tails_unread:
        return False
    # A kernel of ours reads used keys faster; the backward of this one knows none.
    if layout.seqused_k is not None and (backward or not ahead_of_time or not layout.seqused_k.is_contiguous()):
        return False
    if query.shape[2] != value.shape[2] or query.shape[2] % 8:
        return False
    if layout.cu_seq_q.shape[0] - 1 > aten_flash.MAX_SEQUENCES:
        return False
    if not (layout.cu_seq_q.is_contiguous() and layout.cu_seq_k.is_contiguous()):
        return False
    if (rule.windowed and rule.window_right != 0) or (layout.max_q == 1 and query.shape[1] != key.shape[1]):
        return False
    problem = Problem.of(query, key, value, layout, rule)
    if ahead_of_time:
        return ahead.refusal(problem, kernels or config.kernels) is None
    return choose(problem, kernels or config.kernels, backward).backend.name == "aten_flash"


def _chosen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule, kernels: str | None) -> tuple[Backend, ...]:
    """The kernels of choice, forward and backward; none where that is found out when the graph runs.

    With dropout it never is, for then the backward must not find another.
    """
    if query.device.type != "cuda" or (rule.dropout_p == 0.0 and not isinstance(layout.max_q, int)):
        return ()
    problem, kernels = Problem.of(query, key, value, layout, rule), kernels or config.kernels
    return tuple([choose(problem, kernels, backward, fallback.failed(problem, backward)).backend for backward in (False, True)])


def _chosen_forward(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule, kernels: str | None, ours: bool
) -> tuple[Backend, ...]:
    """`_chosen` for a forward: where numbers may be drawn again, and seeds are kept, a kernel that takes them, if there is one.

    Only one that will be given seeds: of any other the backward, which asks without them, would find another.
    """
    if rule.dropout_p > 0.0 and _compat_inductor.may_compute_random_numbers_again() and _compat_inductor.keeps_seeds(ours):
        with contextlib.suppress(RuntimeError):
            chosen = _chosen(query, key, value, layout._replace(seeds=query), rule, kernels)  # any tensor asks for that
            if _by_seeds(chosen, layout, rule):
                return chosen
    return _chosen(query, key, value, layout, rule, kernels)


def _by_seeds(chosen: Sequence[Backend], layout: Layout, rule: Rule) -> bool:
    """Whether weights are dropped by seeds that are given, or will be, to the kernel that runs both ways: no other drops the same.

    Of the backward the layout is as `drawn_from` makes it.
    """
    return rule.dropout_p > 0.0 and layout.block_table is None and len(set(chosen)) == 1 and chosen[0].takes_seeds


def _is_one_launch(chosen: Sequence[Backend], layout: Layout, rule: Rule) -> bool:
    """Whether the kernels need nothing around them if they may leave lse as they write it: nobody but a backward reads it then."""
    if not _may_be_one_launch(layout):
        return False
    drawn = rule.dropout_p == 0.0 or _by_seeds(chosen, layout, rule)
    return drawn and bool(chosen) and all(backend.lse_by_row for backend in chosen)


def _may_be_one_launch(layout: Layout) -> bool:
    return layout.tails_unread and layout.seqused_k is None and layout.cu_seq_q is layout.cu_seq_k


def _is_turned(lse: Tensor) -> bool:
    """Whether lse (H, T) was given by row to begin with. (Nothing is asked of a symbol.)"""
    numbers = (lse.shape[0], *lse.stride())
    return all(isinstance(n, int) for n in numbers) and numbers[0] > 1 and numbers[1:] == (1, numbers[0])


def _again(turned: bool, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, *args: Any, **options: Any) -> Any:
    """The backward operator, given lse by row if it was by row before it was turned."""
    if turned:
        lse, grad_lse, options["lse_by_row"] = lse.t(), None if grad_lse is None else grad_lse.t(), True
    return _ops.varlen_attn_backward.default(grad_out, grad_lse, out, lse, *args, **options)


def _aligned(x: Tensor) -> Tensor:
    """As the kernels read it: 16 bytes at a time. (Values are usually slices of one projection; those are aligned.)"""
    good = x.stride(2) == 1 and x.stride(1) % 8 == x.stride(0) % 8 == x.storage_offset() % 8 == 0
    return x if good else x.contiguous()


def _nothing_drawn(device: torch.device) -> Tensor:
    """The random state of an attention that draws nothing. A graph has one, for equal constants become one."""
    return _aten.full.default([0], 0, dtype=torch.uint64, device=device)


def _windows(rule: Rule) -> dict[str, Any]:
    return {"scale": rule.scale, "window_size_left": rule.window_left, "window_size_right": rule.window_right}


def _forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
    layout, rule, kernels = split_arguments(query, *args, **options)
    ahead_of_time = _compat_inductor.compiles_ahead_of_time()
    ranking = autotune.ranking(query, key, value, layout, rule, kernels or config.kernels, backward=False)
    changed: dict[str, Any] = {} if ahead_of_time or ranking in (None, kernels) else {"kernels": ranking}
    if not ahead_of_time:
        # (To ask makes numbers of symbols, so it is not done for nothing.)
        asks, ours = rule.dropout_p > 0.0 or _may_be_one_launch(layout), inductor_pass.has_passes()
        chosen = _chosen_forward(query, key, value, layout, rule, ranking or kernels, ours) if asks else ()
        if not layout.lse_by_row and _is_one_launch(chosen, layout, rule):
            changed["lse_by_row"] = True
        if rule.dropout_p > 0.0 and chosen and kernels != chosen[0].name:
            changed["kernels"] = chosen[0].name  # as the backward will have it
        if layout.seeds is None and _by_seeds(chosen, layout, rule) and _compat_inductor.keeps_seeds(ours):
            # Inductor draws the seeds of a graph at once, and keeps them for what is computed again.
            changed["seeds"] = _compat_inductor.two_seeds(query.device, ours)
    if changed:
        out, lse, rng_state = _ops.varlen_attn.default(query, key, value, *args, **{**options, **changed})
        # The backward turns it again, and nothing is left of that: what is kept is contiguous, as some hooks on saved tensors want.
        return out, lse.t() if "lse_by_row" in changed else lse, changed.get("seeds", rng_state)
    if ahead_of_time and layout.lse_by_row:
        out, lse, rng_state = _forward(query, key, value, *args, **{**options, "lse_by_row": False})
        return out, lse.t().contiguous(), rng_state
    if layout.lse_by_row or not _direct(query, key, value, layout, rule, kernels):
        if ahead_of_time:
            return ahead.attention(query, key, value, layout, rule)
        if rule.dropout_p > 0.0 and layout.seeds is None:
            if _compat_inductor.may_compute_random_numbers_again():
                _warn_once(_DRAWN_AGAIN)
            return NotImplemented
        return *_ops.varlen_attn_drawn.default(query, key, value, *args, **options), _nothing_drawn(query.device)
    if rule.dropout_p > 0.0 and _compat_inductor.may_compute_random_numbers_again():
        _warn_once(_DRAWN_AGAIN)
    out, lse, rng_state, _, _ = _aten._flash_attention_forward.default(
        _aligned(query),
        _aligned(key),
        _aligned(value),
        layout.cu_seq_q,
        layout.cu_seq_k,
        layout.max_q,
        layout.max_k,
        rule.dropout_p,
        rule.causal,
        False,
        **_windows(rule),
        seqused_k=layout.seqused_k,
    )
    return out, lse, rng_state if rule.dropout_p > 0.0 else _nothing_drawn(query.device)


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **options: Any,
) -> Any:
    layout, rule, kernels = split_arguments(query, *args, **options)
    operands = (grad_out, grad_lse, out, lse, rng_state, query, key, value)
    turned = not layout.lse_by_row and _is_turned(lse)
    ranking = autotune.ranking(query, key, value, layout, rule, kernels or config.kernels, backward=True)
    if rule.dropout_p > 0.0:
        # That of the forward, which was found by the same question.
        chosen = _chosen(query, key, value, drawn_from(rng_state, layout), rule, ranking or kernels)
        kernel = chosen[0].name if chosen else ranking or kernels
        if kernels != kernel:
            return _again(turned, *operands, *args, **{**options, "kernels": kernel})
    if ranking is not None and ranking != kernels:
        return _again(turned, *operands, *args, **{**options, "kernels": ranking})
    if turned:
        return _again(turned, *operands, *args, **options)
    if rng_state.dtype == torch.int64:  # seeds: PyTorch's operator takes none
        return NotImplemented
    direct = _direct(query, key, value, layout, rule, kernels, backward=True)
    if grad_lse is not None or not direct:
        return NotImplemented
    return _aten._flash_attention_backward.default(
        _aligned(grad_out),
        _aligned(query),
        _aligned(key),
        _aligned(value),
        out,
        lse.t().contiguous() if layout.lse_by_row else lse,
        layout.cu_seq_q,
        layout.cu_seq_k,
        layout.max_q,
        layout.max_k,
        rule.dropout_p,
        rule.causal,
        rng_state,
        rng_state,  # not used by these kernels
        **_windows(rule),
    )


def register() -> None:
    """Register decompositions and lowerings with Inductor; further calls do nothing."""
    table: dict[Any, Callable[..., Any]] = {
        _ops.varlen_attn.default: _forward,
        _ops.varlen_attn_backward.default: _backward,
    }
    _compat_inductor.register_inductor_decompositions(table)
    # Where its decomposition declines, the operator is called.
    module = "varlen_inductor.lowering.direct"
    _compat_inductor.lower_to_call(_ops.varlen_attn.default, module, "forward")
    _compat_inductor.lower_to_call(_ops.varlen_attn_drawn.default, module, "drawn")
    _compat_inductor.lower_to_call(_ops.varlen_attn_backward.default, module, "backward", first_operand=5)
    _compat_inductor.lower_to_call(_ops.varlen_attn_backward_joined.default, module, "backward_joined", first_operand=5)
