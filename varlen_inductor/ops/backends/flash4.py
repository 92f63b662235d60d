"""CUDA: the kernels of the package flash-attn-4 (``flash_attn.cute``), written for Hopper and Blackwell.

It is in beta and has no stable interface. The two functions that run the kernels, ``_flash_attn_fwd`` and ``_flash_attn_bwd``, are
called by the names of their arguments; their signatures are looked at once, and a release whose signatures are not understood is
refused with the reason. Read in 4.0.0b3, b8, b13, b18, b22, b26, b30, b33 and b36; before b8 the backward knows neither sequences
on Hopper nor a gradient of lse, and those releases are refused.

The kernels take half precision, windows level with the last key and a gradient of lse; no dropout and no positions. They are
compiled at the first call (seconds), for: dtype, head dims, heads per key head, whether causal, which sides of a window are
limited, which of the optional tensors there are (an order is two of them), whether the longest sequence fits one block, and whether
there are more than 256 sequences. A number of tokens or of sequences compiles nothing else.

They read up to a block behind the last row of a sequence (`tails` makes that harmless). In the forward only value does harm there:
scores of keys behind a sequence become -inf, whatever they were (the last block of keys is computed first, and always looks at the
length), a row of query shows in no other, and rows of out and lse behind a sequence are not stored. lse of a query that sees no key
is -inf. So it was read in all the releases above from b8 on, for Hopper and Blackwell. In the backward all four operands do harm.

A forward takes the longest sequences first (`order`), but for packed graphs (in most of which they lie so already): where one
begins is read from the offsets, and how long it is from ``seqused_q`` and ``seqused_k`` where they are given, in the same releases.
The backward's scratch memory has rows for each sequence by its number; those of another order would overlap.

A function's Python takes far longer than the launch, so calls are noted and made again without it (`replay`).

Run by us on an H100 with PyTorch 2.11 and 4.0.0b36, against the reference: forward and backward with head dims 32, 64, 96, 128, 192
and 256 (and 96 with 64, 64 with 128, 128 with 64, 192 with 128), shared heads (but not where value has the smaller head dim: there
the backward asserts that heads are not shared, and such problems are refused), windows of every kind, a gradient of lse, 300
sequences, a CUDA graph, and the deterministic backward. There a number of tokens compiled nothing, and calls were noted. Other
releases were read and not run, and nothing was run on a device of compute capability 10.

A kernel of ours behind a forward starts while that still ends, and reads the last offsets before it waits: they have been written
by then, for the forward of Hopper does not itself start before what is in front of it has ended (read in 4.0.0b36).

The compiled backward writes gradients in any strides that are multiples of 16 bytes, the last dim contiguous, and what it is
compiled for says nothing of those strides: read in 4.0.0b36, and not run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varlen_inductor import _compat_operators
from varlen_inductor.ops.backends import triton_kernel
from varlen_inductor.ops.backends.base import Backend, unknown_option
from varlen_inductor.ops.backends.flash_common import MAX_HEAD_DIM, contiguous, positive_scale, ready
from varlen_inductor.ops.backends.memory import empty, empty_results
from varlen_inductor.ops.backends.order import Order
from varlen_inductor.ops.backends.packages import load
from varlen_inductor.ops.backends.replay import Replay, Sizes
from varlen_inductor.ops.backends.tails import hide, hide_value, own_rows, restore_backward, restore_forward
from varlen_inductor.ops.problem import UNBOUNDED, Layout, Problem, Rule

MODULE = "flash_attn.cute.interface"
MAX_ELEMENTS = 2**31
MAX_HEAD_DIM_BLACKWELL = 128

HEAD_DIMS = 32
"""Head dims are multiples of it. Others run, but dq came out wrong for 8, 40 and 72, and for 20 and 12 nothing was compiled."""
LITTLE_WORK = 2.5e11
"""Up to so many operations (some 0.5 ms of a H200) an order of sequences is hardly worth the kernel that finds it. Without that
kernel nothing is hidden in front, and what the attention made of it is repaired behind: one small kernel, not two. What is computed
anew is rounded as the Triton kernel rounds, so NaN behind the end shows in the last bits of others: not where algorithms must be
deterministic."""
MANY_SEQUENCES = 256
"""More of them are found in another way by the kernels."""

_BACKWARD = ("q", "k", "v", "out", "dout", "lse", "dq", "dk", "dv")
ARGUMENTS = {
    "forward": ("q", "k", "v", "out", "lse"),
    "backward": _BACKWARD,
    "backward, lse": (*_BACKWARD, "dlse"),
}
"""What tensors are called, besides the offsets."""
_LAYOUT = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"}
_RULE = {"softmax_scale", "causal", "window_size_left", "window_size_right", "softcap"}
FORWARD = frozenset({*ARGUMENTS["forward"], *_LAYOUT, *_RULE})
BACKWARD = frozenset({*ARGUMENTS["backward, lse"], *_LAYOUT, *_RULE, "deterministic"})
"""The arguments that are given."""
IN_ORDER = frozenset({"seqused_q", "seqused_k"})
"""Those that are given, too, to a forward that takes the longest sequences first."""


class Kernels(NamedTuple):
    """The package's functions, and what runs them."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    replay: Replay
    in_any_order: bool
    """Whether the forward is told where sequences begin and how long they are, each by itself."""


def supports(problem: Problem) -> str | None:
    """Why the kernels cannot run the problem, or ``None``."""
    if problem.device.type != "cuda":
        return "it runs on CUDA only"
    unavailable = _unavailable(problem.device)
    if unavailable is not None:
        return unavailable
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 or bfloat16, not {problem.dtype}"
    most = _max_head_dim(problem.device)
    if max(problem.head_dim, problem.head_dim_v) > most:
        return f"its head dim is at most {most} here, not {max(problem.head_dim, problem.head_dim_v)}"
    if problem.head_dim % HEAD_DIMS or problem.head_dim_v % HEAD_DIMS:
        return f"its head dims are multiples of {HEAD_DIMS}, not {problem.head_dim} and {problem.head_dim_v}"
    if problem.num_heads != problem.num_heads_k and problem.head_dim > problem.head_dim_v:
        return f"its backward shares heads only if key and value have one head dim, not {problem.head_dim} and {problem.head_dim_v}"
    if problem.seqused_k:
        # It reads behind the keys in use, and those rows are the caller's: they may hold anything and must not be written.
        return "it reads past the keys in use (seqused_k)"
    if problem.positions and problem.windowed:
        return "a window that speaks of positions is unknown to it"
    if problem.dropout_p > 0.0:
        return "it has no dropout"
    return unknown_option(problem)


@cache
def _unavailable(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "it does not run on ROCm"
    kernels = _kernels()
    if isinstance(kernels, str):
        return kernels
    major, minor = torch.cuda.get_device_capability(device)
    return None if major in (9, 10) else f"it is used with compute capability 9 and 10, and this device has {major}.{minor}"


@cache
def _max_head_dim(device: torch.device) -> int:
    return MAX_HEAD_DIM if torch.cuda.get_device_capability(device)[0] == 9 else MAX_HEAD_DIM_BLACKWELL


@cache
def _kernels() -> Kernels | str:
    """The package's functions, or why they cannot be used."""
    module = load(MODULE)
    if isinstance(module, str):
        return f"{module} (pip install --pre flash-attn-4)" if module.endswith("is not installed") else module
    for name, given in (("_flash_attn_fwd", FORWARD), ("_flash_attn_bwd", BACKWARD)):
        reason = _misunderstood(module, name, given)
        if reason is not None:
            return reason
    owners = [x for x in vars(module).values() if callable(x) and hasattr(x, "compile_cache")]
    in_any_order = inspect.signature(module._flash_attn_fwd).parameters.keys() >= IN_ORDER
    return Kernels(module._flash_attn_fwd, module._flash_attn_bwd, Replay(owners), in_any_order)


@cache
def _in_any_order(device: torch.device) -> bool:
    """Not on Blackwell, where giving lengths keeps some kernels from being taken: read in 4.0.0b36, and not run."""
    kernels = _kernels()
    if isinstance(kernels, str) or not kernels.in_any_order:
        return False
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@cache
def _repairable(device: torch.device) -> bool:
    """Not on Blackwell, where nothing of this was run."""
    return _in_any_order(device) and triton_kernel.supports_device(device) is None


def _work(sizes: tuple[int, int, int, int, int, int], layout: Layout, rule: Rule) -> float:
    """Operations of the products, about: lengths are known to the device only.

    A query sees on average sum(n²) / sum(n) keys; between the mean and the largest of n, it is taken for their mean, which
    for uniform lengths is 9/8 of it.
    """
    rows, heads, dim, rows_k, _, dim_v = sizes
    seen = (rows_k / max(layout.cu_seq_q.shape[0] - 1, 1) + min(layout.max_k, rows_k)) / 2
    if rule.causal:
        seen /= 2
    elif rule.window_left != UNBOUNDED and rule.window_right != UNBOUNDED:
        seen = min(seen, rule.window_left + rule.window_right + 1)
    return 2.0 * rows * heads * (dim + dim_v) * seen


def _misunderstood(module: ModuleType, name: str, given: frozenset[str]) -> str | None:
    function = getattr(module, name, None)
    if function is None:
        return f"this release of flash-attn-4 has no {name}"
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        return f"the signature of {name} of this release of flash-attn-4 cannot be read: {error}"
    missing = sorted(given - parameters.keys())
    if missing:
        return f"{name} of this release of flash-attn-4 does not take {', '.join(missing)}"
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    unknown = [p.name for p in parameters.values() if p.kind in named and p.default is p.empty and p.name not in given]
    return f"{name} of this release of flash-attn-4 wants {', '.join(unknown)}, which is not known here" if unknown else None


def forward(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of every sequence; see ``Forward``."""
    out, lse = _attend(query, key, value, layout, rule)
    return out, lse, empty(out, 0, dtype=torch.uint64)


def forward_drawn(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule, wants_lse: bool
) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse``; see ``ForwardDrawn``. It saves memory of no size, whose allocation takes the host 2 us.

    lse is always written: without it the package would compile another kernel, which takes seconds.
    """
    return _attend(query, key, value, layout, rule)


def _attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor]:
    """``out`` and ``lse``."""
    if rule.scale <= 0.0:
        query, rule, _ = positive_scale(query, rule)
    q, k, v, sizes = _operands(query, key, value)
    rows, heads, _, _, _, dim_v = sizes
    out, lse = empty_results(q, (rows, heads, dim_v), (heads, rows))
    assert lse is not None
    if layout.tails_unread:
        _run("forward", (q, k, v, out, lse), sizes, layout, rule)
    elif _repairable(v.device) and _work(sizes, layout, rule) <= LITTLE_WORK and not torch.are_deterministic_algorithms_enabled():
        layout = contiguous(layout)  # before the attention: the kernel behind it is started early, and reads the last offsets
        _run("forward", (q, k, v, out, lse), sizes, layout, rule)
        triton_kernel.repair_forward(out, lse, q, k, v, layout, rule)
    else:
        hidden, order = hide_value(v, layout, _in_any_order(v.device))  # query and key need not be hidden: see above
        try:
            _run("forward", (q, k, *hidden.operands, out, lse), sizes, layout, rule, order)
        finally:
            restore_forward(hidden, out, lse)
    return out, lse


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
    grads = empty(query, *query.shape), empty(key, *key.shape), empty(value, *value.shape)
    _differentiate(grads, grad_out, grad_lse, out, lse, query, key, value, layout, rule)
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
    """The same into ``grads``; see ``BackwardInto``. The kernels take any strides there but of the last dim."""
    _differentiate(grads, grad_out, None, out, lse, query, key, value, layout, rule)


def _differentiate(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: Rule,
) -> None:
    """Writes all rows of ``grads``."""
    factor = 1.0
    if rule.scale <= 0.0:
        query, rule, factor = positive_scale(query, rule)
    q, k, v, sizes = _operands(query, key, value)
    rows, heads, dim, rows_k, heads_k, dim_v = sizes
    o, g = _readable(out, heads, dim_v), _readable(grad_out, heads, dim_v)
    theirs = grads
    as_wanted = factor == 1.0 and dim == query.shape[2]
    if not as_wanted:
        theirs = q.new_empty(rows, heads, dim), k.new_empty(rows_k, heads_k, dim), grads[2]
    way, more = ("backward", ()) if grad_lse is None else ("backward, lse", (grad_lse.float().contiguous(),))
    hidden = None if layout.tails_unread else hide(q, g, k, v, layout)
    try:
        if hidden is not None:
            q, g, k, v = hidden.operands
        _run(way, (q, k, v, o, g, lse, *theirs, *more), sizes, layout, rule)
        if not as_wanted:
            torch.mul(theirs[0][..., : query.shape[2]], factor, out=grads[0])
            grads[1].copy_(theirs[1][..., : key.shape[2]])
    finally:
        if hidden is not None:
            restore_backward(hidden, grads)


def _operands(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[int, int, int, int, int, int]]:
    """As the kernels read them, and the sizes ``(T_q, H, D, T_k, H_k, D_v)``."""
    rows, heads, dim = query.shape
    rows_k, heads_k, dim_v = value.shape
    if dim < dim_v:  # blocks are chosen by the head dim of query and key: it must not be the smaller one
        query, key, dim = ready(query, dim_v), ready(key, dim_v), dim_v
    if max(rows * heads, rows_k * heads_k) * dim >= MAX_ELEMENTS:
        raise RuntimeError(f"query {tuple(query.shape)} or key {tuple(key.shape)} has 2**31 elements or more: split the batch")
    q, k, v = _readable(query, heads, dim), _readable(key, heads_k, dim), _readable(value, heads_k, dim_v)
    return q, k, v, (rows, heads, dim, rows_k, heads_k, dim_v)


def _readable(x: Tensor, heads: int, dim: int) -> Tensor:
    """``x`` (T, H, D), or a copy: aligned, every row in memory of its own (no stride is 0), no gradient to follow."""
    if x.requires_grad:
        x = x.detach()
    row, head, column = x.stride()
    if column == 1 and head >= dim and row >= head * heads and not (row | head) % 8 and not x.data_ptr() % 16:
        return x  # which is all that the last line would find out, sooner
    return own_rows(ready(x, dim))


@cache
def _several_devices() -> bool:
    return torch.cuda.device_count() > 1


def _run(
    way: str,
    tensors: tuple[Tensor, ...],
    sizes: tuple[int, int, int, int, int, int],
    layout: Layout,
    rule: Rule,
    order: Order | None = None,
) -> None:
    """Call the function of the package.

    Args:
        tensors: named in ``ARGUMENTS[way]``.
        sizes: as of ``_operands``.
        order: of the sequences of ``layout`` for a forward, if not that of ``layout``.
    """
    q = tensors[0]
    device = q.device
    if _several_devices() and device.type == "cuda" and device.index != _compat_operators.current_device_index():
        with torch.cuda.device(device):  # the package launches on the current device
            _run(way, tensors, sizes, layout, rule, order)
        return
    kernels = _kernels()
    if isinstance(kernels, str):
        raise RuntimeError(kernels)
    rows, heads, dim, rows_k, heads_k, dim_v = sizes
    cu_q, cu_k, max_q, max_k = layout[:4]
    if not (cu_q.is_contiguous() and cu_k.is_contiguous()):
        cu_q, cu_k = cu_q.contiguous(), cu_k.contiguous()
    one_layout = cu_q is cu_k or cu_q.data_ptr() == cu_k.data_ptr()
    sequences = cu_q.shape[0] - 1
    max_q, max_k = int(max_q) or 1, int(max_k) or 1
    used_q = used_k = None
    if order is not None:
        cu_q, used_q, cu_k, used_k = order
    deterministic = way != "forward" and torch.are_deterministic_algorithms_enabled()
    # Also whether there are as many queries as keys: rows then do not say what memory is for.
    problem = (heads, heads_k, dim, dim_v, one_layout, rows == rows_k, sequences > MANY_SEQUENCES, max_q, max_k)
    key = (way, order is None, device, q.dtype, rule, deterministic, problem)
    given = (*tensors, cu_q, used_q, *((None, None) if one_layout else (cu_k, used_k)))
    if not kernels.replay.again(key, given, rows, rows_k, sequences):
        used = {} if order is None else {"seqused_q": used_q, "seqused_k": used_k}
        call = partial(_call, kernels, way, tensors, cu_q, cu_k, max_q, max_k, rule, deterministic, used)
        kernels.replay.first(key, given, Sizes(rows, rows_k, sequences, (dim, dim_v)), call)


def _call(
    kernels: Kernels,
    way: str,
    tensors: tuple[Tensor, ...],
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    rule: Rule,
    deterministic: bool,
    used: dict[str, Tensor | None],
) -> None:
    options = {"softcap": None} if way == "forward" else {"softcap": 0.0, "deterministic": deterministic}
    (kernels.forward if way == "forward" else kernels.backward)(
        **dict(zip(ARGUMENTS[way], tensors, strict=True)),
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        softmax_scale=rule.scale,
        causal=rule.causal,
        window_size_left=None if rule.window_left == UNBOUNDED else rule.window_left,
        window_size_right=None if rule.window_right == UNBOUNDED else rule.window_right,
        **options,
        **used,
    )


BACKEND = Backend("flash4", supports, forward, backward, backward_into=backward_into, forward_drawn=forward_drawn)
