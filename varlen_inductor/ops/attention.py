"""Registers ``varlen_inductor::varlen_attn`` and its backward with PyTorch.

A call passes through autocast (casts as scaled dot product attention does), autograd (one ``autograd.Function``) and the
dispatch to a backend. Tracers record it as one node; the fake kernels say what comes out.

Schema of ``varlen_attn``::

    query (T_q, H, D), key (T_k, H_k, D), value (T_k, H_k, D_v); any strides; H a multiple of H_k
    cu_seq_q, cu_seq_k   (N + 1,) int32: sequence i has the rows cu_seq[i] to cu_seq[i + 1]; the last entry may be below T
    max_q, max_k         bounds of the sequence lengths
    scale                of the scores; None is 1 / sqrt(D)
    window_left/right    query i of a sequence with lq queries and lk keys sees the keys j with
                         i + lk - lq - left <= j <= i + lk - lq + right; -1 is no limit; (-1, 0) is causal
    dropout_p            probability with which an attention weight is dropped
    seqused_k            (N,) int32: sequence i has only this many keys, the first of its rows
    position_q/k         (T_q,), (T_k,) int: with both, query i sees the keys j with
                         position_q[i] - left <= position_k[j] <= position_q[i] + right
    softcap              if above 0, scores (behind the scale) become softcap * tanh(scores / softcap); then come window and softmax
    block_table          (N, pages of a sequence) int32: key (pages, page_size, H_k, D) and value (pages, page_size, H_k, D_v) are
                         pages; sequence i has those that its row names, in that order, and uses seqused_k[i] rows of them, which
                         must be given; cu_seq_k is not read then (pass cu_seq_q), there are no positions and no gradient
    batch_invariant      a sequence's result is the same bit by bit whatever the others of its batch are
    kernels              as ``varlen_inductor.config.kernels``, which is meant by None
    tails_unread         the caller reads no row behind the last sequence, neither of the results nor of the gradients, and no
                         lse: such rows may then hold anything (packed graphs never read them, so a kernel is saved); and in
                         the operands and the gradient of out they hold finite numbers, for then they may be read
    lse_by_row           lse and its gradient are (T_q, H), as some kernels write and read it
    seeds                (n,) int64: dropout is drawn from two of these numbers, by kernels that need not draw them then (forward
                         only); the backward gets them as its rng_state
    seeds_at             where in seeds the first of the two is; they may be one tensor for many calls

    -> out (T_q, H, D_v), contiguous; lse (H, T_q), contiguous, natural logarithm, float64 for float64 operands and float32 else;
       rng_state (2,) uint64 from which the backward draws the same dropout again, empty if dropout_p is 0 or seeds are given
       (in compiled graphs the seeds, int64, where these are drawn for the kernel)

Rows at and behind ``cu_seq_q[-1]``, and queries that see no key, have out 0 and lse -inf, and give no gradient. What rows
outside of every sequence hold shows nowhere, but for ``tails_unread``. (With one kernel, ``flash4``, NaN there can show in how the
last sequences are rounded, unless algorithms must be deterministic.)

``varlen_attn_drawn`` is the same without ``rng_state``, for calls that draw nothing: without dropout, or with ``seeds``. PyTorch
is not told of random numbers, which it would see to where a forward is computed again. It is what graphs have behind autograd
(`lowering`), and has no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from varlen_inductor import _compat_operators, config
from varlen_inductor.ops.backends import choose, fallback
from varlen_inductor.ops.backends.base import backward_by, forward_by, with_lse_as_asked
from varlen_inductor.ops.pages import gather_pages
from varlen_inductor.ops.problem import UNBOUNDED, Layout, Problem, Rule, lse_dtype
from varlen_inductor.ops.validate import check_lengths, check_operands, check_seeds

OPTIONS = (
    "*, float? scale=None, SymInt window_left=-1, SymInt window_right=-1, float dropout_p=0.0, Tensor? seqused_k=None, "
    "Tensor? position_q=None, Tensor? position_k=None, str? kernels=None, bool tails_unread=False, "
    "float softcap=0.0, Tensor? block_table=None, bool batch_invariant=False"
)
OF_GRAPHS = "bool lse_by_row=False, int seeds_at=0"
OPERANDS = "Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor cu_seq_k, SymInt max_q, SymInt max_k"
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)

# The library must live as long as the operators.
LIBRARY = torch.library.Library("varlen_inductor", "FRAGMENT")
LIBRARY.define(
    f"varlen_attn({OPERANDS}, {OPTIONS}, {OF_GRAPHS}, Tensor? seeds=None) "
    "-> (Tensor out, Tensor lse, Tensor rng_state)",
    tags=(*TAGS, torch.Tag.nondeterministic_seeded),
)
LIBRARY.define(
    f"varlen_attn_drawn({OPERANDS}, {OPTIONS}, {OF_GRAPHS}, Tensor? seeds=None) -> (Tensor out, Tensor lse)",
    tags=TAGS,
)
LIBRARY.define(
    "varlen_attn_backward(Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor rng_state, "
    f"{OPERANDS}, {OPTIONS}, {OF_GRAPHS}) -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    tags=TAGS,
)
varlen_attn = torch.ops.varlen_inductor.varlen_attn.default
varlen_attn_drawn = torch.ops.varlen_inductor.varlen_attn_drawn.default
varlen_attn_backward = torch.ops.varlen_inductor.varlen_attn_backward.default


debug = _compat_operators.knob_reader(config, "debug")
default_kernels = _compat_operators.knob_reader(config, "kernels")


# --- kernels ---------------------------------------------------------------------------------------------------------


def split_arguments(
    query: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_left: int = UNBOUNDED,
    window_right: int = UNBOUNDED,
    dropout_p: float = 0.0,
    seqused_k: Tensor | None = None,
    position_q: Tensor | None = None,
    position_k: Tensor | None = None,
    kernels: str | None = None,
    tails_unread: bool = False,
    softcap: float = 0.0,
    block_table: Tensor | None = None,
    batch_invariant: bool = False,
    lse_by_row: bool = False,
    seeds_at: int = 0,
    seeds: Tensor | None = None,
) -> tuple[Layout, Rule, str | None]:
    """What the operators are called with behind query, key and value, sorted. (PyTorch leaves out what is at its default.)"""
    lengths = (cu_seq_q, cu_seq_k, max_q, max_k, seqused_k)
    layout = Layout(*lengths, position_q, position_k, tails_unread, block_table, lse_by_row, seeds_at, seeds)
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[2] or 1)
    return layout, Rule(scale, window_left, window_right, dropout_p, softcap, batch_invariant), kernels


def _forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    layout, rule, kernels = split_arguments(query, *args, **options)
    check_operands(query, key, value, layout, rule)
    if debug():
        check_lengths(layout, query, key)
    return run_forward(query, key, value, layout, rule, default_kernels() if kernels is None else kernels)


def _drawn(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    layout, rule, _ = split_arguments(query, *args, **options)
    _check_drawn(layout, rule)
    out, lse, _ = _forward(query, key, value, *args, **options)
    return out, lse


def _check_drawn(layout: Layout, rule: Rule) -> None:
    if _rng_size(layout, rule):
        raise ValueError(f"varlen_attn_drawn: dropout_p is {rule.dropout_p} and no seeds are given; use varlen_attn, or give seeds")


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
) -> tuple[Tensor, Tensor, Tensor]:
    layout, rule, kernels = split_arguments(query, *args, **options)
    kernels = default_kernels() if kernels is None else kernels
    layout = drawn_from(rng_state, layout)
    check_seeds(layout.seeds, layout.seeds_at, query.device)
    return run_backward(grad_out, grad_lse, out, lse, rng_state, query, key, value, layout, rule, kernels)


def drawn_from(rng_state: Tensor, layout: Layout) -> Layout:
    """The layout of a backward, with the seeds that its forward was given, if it was (they are int64, and others are not).

    So the kernel that was chosen for the forward is for the backward: no other drops the same.
    """
    return layout._replace(seeds=rng_state) if rng_state.dtype == torch.int64 else layout


def kernel_of_both(problem: Problem, kernels: str) -> str:
    """The kernel of a forward that drops weights, as ``kernels`` for its backward: no other drops the same."""
    return choose(problem, kernels, False, fallback.failed(problem, False)).backend.name


def run_forward(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule, kernels: str, problem: Problem | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator without its checks: real tensors, below autograd. ``problem`` is what they pose, if it is known."""
    if nothing_to_attend(query, key, layout):
        out = query.new_zeros(query.shape[0], query.shape[1], value.shape[-1])
        lse = query.new_full((query.shape[1], query.shape[0]), -math.inf, dtype=lse_dtype(query.dtype))
        return with_lse_as_asked((out, lse, query.new_zeros(_rng_size(layout, rule), dtype=torch.uint64)), layout)
    problem = problem or Problem.of(query, key, value, layout, rule)
    choice = choose(problem, kernels, False, fallback.failed(problem, False))
    backend = choice.backend
    try:
        operands = gather_pages(key, value, layout) if choice.gathers else (key, value, layout)
        return forward_by(backend, query, *operands, rule)
    except Exception as error:
        fallback.note(error, backend, problem, kernels, False)
    return run_forward(query, key, value, layout, rule, kernels, problem)


def run_backward(
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
    kernels: str,
    problem: Problem | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of ``run_forward`` with the same ``kernels``."""
    if nothing_to_attend(query, key, layout):
        return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    if grad_lse is not None:
        grad_lse = grad_lse.masked_fill(lse == -math.inf, 0.0)  # whatever became of the -inf there: it has no gradient
    problem = problem or Problem.of(query, key, value, layout, rule)
    backend = choose(problem, kernels, True, fallback.failed(problem, True)).backend
    try:
        return backward_by(backend, grad_out, grad_lse, out, lse, rng_state, query, key, value, layout, rule)
    except Exception as error:
        fallback.note(error, backend, problem, kernels, True)
    return run_backward(grad_out, grad_lse, out, lse, rng_state, query, key, value, layout, rule, kernels, problem)


def nothing_to_attend(query: Tensor, key: Tensor, layout: Layout) -> bool:
    if query.numel() == 0 or key.numel() == 0 or layout.cu_seq_q.shape[0] == 1:
        return True
    return layout.block_table is not None and layout.block_table.shape[1] == 0


LIBRARY.impl("varlen_attn", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("varlen_attn_drawn", _drawn, "CompositeExplicitAutograd")
LIBRARY.impl("varlen_attn_backward", _backward, "CompositeExplicitAutograd")


# --- fakes -----------------------------------------------------------------------------------------------------------


def _rng_size(layout: Layout, rule: Rule) -> int:
    return 2 if rule.dropout_p > 0.0 and layout.seeds is None else 0


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    layout, rule, _ = split_arguments(query, *args, **options)
    check_operands(query, key, value, layout, rule)
    tokens, heads, _ = query.shape
    out = query.new_empty((tokens, heads, value.shape[-1]))
    lse = query.new_empty((tokens, heads) if layout.lse_by_row else (heads, tokens), dtype=lse_dtype(query.dtype))
    return out, lse, query.new_empty((_rng_size(layout, rule),), dtype=torch.uint64)


def _fake_drawn(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    layout, rule, _ = split_arguments(query, *args, **options)
    _check_drawn(layout, rule)
    out, lse, _ = _fake_forward(query, key, value, *args, **options)
    return out, lse


def _fake_backward(
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
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


torch.library.register_fake("varlen_inductor::varlen_attn", _fake_forward, lib=LIBRARY)
torch.library.register_fake("varlen_inductor::varlen_attn_drawn", _fake_drawn, lib=LIBRARY)
torch.library.register_fake("varlen_inductor::varlen_attn_backward", _fake_backward, lib=LIBRARY)


# --- autograd --------------------------------------------------------------------------------------------------------


_Results = TypeVar("_Results", Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor])


def _below(op: Any, kernel: Callable[..., _Results], keyset: Any, args: Any, options: dict[str, Any]) -> _Results:
    """The operator without autograd; its kernel itself where the dispatcher would find nothing else, for that is cheaper."""
    with _compat_operators.below_autograd():
        if _compat_operators.reaches_the_kernel(keyset):
            return kernel(*args, **options)
        return op.redispatch(keyset, *args, **options)  # type: ignore[no-any-return]


def through_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: Rule,
    kernels: str,
    problem: Problem | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of query, key and value from those of the results, if any; past the dispatcher where it would do nothing."""
    if grad_out is None:
        if grad_lse is None:
            return None, None, None
        grad_out = torch.zeros_like(out)
    if _compat_operators.nothing_intercepts(grad_out, grad_lse, query):
        return run_backward(grad_out, grad_lse, out, lse, rng_state, query, key, value, layout, rule, kernels, problem)
    cu_seq_q, cu_seq_k, max_q, max_k, seqused_k, position_q, position_k, tails_unread, _, lse_by_row, seeds_at, _ = layout
    scale, window_left, window_right, dropout_p, softcap, batch_invariant = rule
    return varlen_attn_backward(  # type: ignore[no-any-return]
        grad_out,
        grad_lse,
        out,
        lse,
        rng_state,
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        scale=scale,
        window_left=window_left,
        window_right=window_right,
        dropout_p=dropout_p,
        seqused_k=seqused_k,
        position_q=position_q,
        position_k=position_k,
        kernels=kernels,
        tails_unread=tails_unread,
        softcap=softcap,
        batch_invariant=batch_invariant,
        lse_by_row=lse_by_row,
        seeds_at=seeds_at,
    )


class _VarlenAttn(torch.autograd.Function):
    """The operator with its gradient. Every tensor comes by position, as autograd wants it."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, options: dict[str, Any], *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        out, lse, rng_state = _below(varlen_attn, _forward, keyset, args, options)
        query, key, value, cu_seq_q, cu_seq_k, ctx.max_q, ctx.max_k = args
        tensors = {name: options.pop(name) for name in _TENSOR_OPTIONS if name in options}
        if options.get("dropout_p") and _compat_operators.nothing_intercepts(query, out):
            # Whatever is set when the backward runs.
            layout, rule, kernels = split_arguments(query, cu_seq_q, cu_seq_k, ctx.max_q, ctx.max_k, **tensors, **options)
            if not nothing_to_attend(query, key, layout):
                options["kernels"] = kernel_of_both(Problem.of(query, key, value, layout, rule), kernels or default_kernels())
        seeds = options.pop("seeds", None)
        numbers = rng_state if seeds is None else seeds
        ctx.save_for_backward(out, lse, numbers, query, key, value, cu_seq_q, cu_seq_k, *tensors.values())
        ctx.options, ctx.tensor_names = options, tuple(tensors)
        ctx.mark_non_differentiable(rng_state)
        ctx.set_materialize_grads(False)
        return out, lse, rng_state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse, _ = grads
        out, lse, rng_state, query, key, value, cu_seq_q, cu_seq_k, *tensors = ctx.saved_tensors
        options = {**ctx.options, **dict(zip(ctx.tensor_names, tensors, strict=True))}
        layout, rule, kernels = split_arguments(query, cu_seq_q, cu_seq_k, ctx.max_q, ctx.max_k, **options)
        kernels, layout = default_kernels() if kernels is None else kernels, drawn_from(rng_state, layout)
        gradients = through_backward(grad_out, grad_lse, out, lse, rng_state, query, key, value, layout, rule, kernels)
        return None, None, *gradients, None, None, None, None


_TENSOR_OPTIONS = ("seqused_k", "position_q", "position_k")


def _autograd(keyset: Any, *args: Any, **options: Any) -> Any:
    below = _compat_operators.keys_after_autograd(keyset)
    # The backward runs in a thread of autograd's, where the knobs have their defaults: fix the choice of kernel here.
    options.setdefault("kernels", default_kernels())
    if torch.is_grad_enabled() and _compat_operators.any_requires_grad(*args[:3]):
        if options.get("block_table") is not None:
            raise RuntimeError("keys in pages have no gradient: call this under torch.no_grad(), or varlen_inductor.varlen_attn")
        return _VarlenAttn.apply(below, options, *args)
    return _below(varlen_attn, _forward, below, args, options)


class _NoDoubleBackward(torch.autograd.Function):
    """A backward operator, which has no gradient itself."""

    @staticmethod
    def forward(ctx: Any, op: Any, kernel: Callable[..., _Results], keyset: Any, options: dict[str, Any], *args: Any) -> _Results:
        return _below(op, kernel, keyset, args, options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "varlen_attn has no second derivative: compute this gradient without create_graph=True, or use "
            "torch.nn.functional.scaled_dot_product_attention with its math backend"
        )


def without_double_backward(op: Any, kernel: Callable[..., _Results]) -> Callable[..., Any]:
    """What autograd does with ``op``, an operator with the arguments of the backward, whose kernel is ``kernel``."""

    def autograd(keyset: Any, *args: Any, **options: Any) -> Any:
        below = _compat_operators.keys_after_autograd(keyset)
        if torch.is_grad_enabled() and _compat_operators.any_requires_grad(*args[:8]):
            return _NoDoubleBackward.apply(op, kernel, below, options, *args)
        return _below(op, kernel, below, args, options)

    return autograd


def _drawn_autograd(keyset: Any, *args: Any, **options: Any) -> Any:
    if torch.is_grad_enabled() and _compat_operators.any_requires_grad(*args[:3]):
        raise RuntimeError("varlen_attn_drawn has no gradient: use varlen_attn, or call this under torch.no_grad()")
    return _below(varlen_attn_drawn, _drawn, _compat_operators.keys_after_autograd(keyset), args, options)


LIBRARY.impl("varlen_attn", _autograd, "Autograd", with_keyset=True)
LIBRARY.impl("varlen_attn_drawn", _drawn_autograd, "Autograd", with_keyset=True)
LIBRARY.impl("varlen_attn_backward", without_double_backward(varlen_attn_backward, _backward), "Autograd", with_keyset=True)


# --- autocast --------------------------------------------------------------------------------------------------------


def _autocast(device_type: str) -> Callable[..., Any]:
    """As for scaled dot product attention: query, key and value take the autocast dtype, unless they are float64."""

    def kernel(*args: Any, **options: Any) -> Any:
        dtype = torch.get_autocast_dtype(device_type)
        operands = (x if x.dtype in (dtype, torch.float64) else x.to(dtype) for x in args[:3])
        with _compat_operators.below_autocast(device_type):
            return varlen_attn(*operands, *args[3:], **options)

    return kernel


for _device_type in ("cpu", "cuda"):
    LIBRARY.impl("varlen_attn", _autocast(_device_type), f"Autocast{_device_type.upper()}")
