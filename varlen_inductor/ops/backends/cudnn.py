"""CUDA: cuDNN's attention kernels, through the package ``nvidia-cudnn-frontend``.

Sequences are cuDNN's batch, each found through its offset in the rows, so packed rows and rows of a padded batch are read where
they lie. ``cudnn_plan`` holds the plans, ``cudnn_rows`` what else a call launches: one small kernel before cuDNN's and one after;
in packed graphs only the first layer launches one, before it.

cuDNN has no gradient through lse (computed here with a second call) and needs a positive scale.
"""

from __future__ import annotations

import importlib.util
from functools import cache

import torch
from torch import Tensor

from varlen_inductor import _compat_operators
from varlen_inductor.ops.backends.base import Backend, unknown_option, with_lse_as_asked
from varlen_inductor.ops.backends.cudnn_plan import Key, Plan, library, plan_for
from varlen_inductor.ops.backends.cudnn_rows import finish_backward, finish_forward, place, place_backward, place_once, workspace
from varlen_inductor.ops.backends.flash_common import contiguous, positive_scale, through_lse
from varlen_inductor.ops.backends.memory import empty, empty_results
from varlen_inductor.ops.problem import Layout, Problem, Rule

MAX_HEAD_DIM = 256
OLDEST_CUDNN = 91900
"""The oldest version that the kernels were tested with. Earlier ones lack packed rows, or have known bugs in them."""


def supports(problem: Problem) -> str | None:
    """Why the kernels cannot run the problem, or ``None``."""
    if problem.device.type != "cuda":
        return "it runs on CUDA only"
    unavailable = _unavailable(problem.device)
    if unavailable is not None:
        return unavailable
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 or bfloat16, not {problem.dtype}"
    if max(problem.head_dim, problem.head_dim_v) > MAX_HEAD_DIM:
        return f"its head dim is at most {MAX_HEAD_DIM}, not {max(problem.head_dim, problem.head_dim_v)}"
    if problem.head_dim % 8 or problem.head_dim_v % 8:
        return f"its head dims are multiples of 8, and these are {problem.head_dim} and {problem.head_dim_v}"
    if problem.deterministic:
        return "its deterministic backward needs memory that grows with the square of the length"
    return _unknown_window(problem) or unknown_option(problem)


def _unknown_window(problem: Problem) -> str | None:
    if problem.windowed and problem.positions:
        return "a window that speaks of positions is unknown to it"
    if problem.windowed and problem.dropout_p > 0.0:
        return "it drops no weights inside of a window"
    if problem.dropout_p == 1.0:
        return "it cannot drop everything"
    return None


@cache
def _unavailable(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "it does not run on ROCm"
    if importlib.util.find_spec("cudnn") is None:
        return "nvidia-cudnn-frontend is not installed (pip install nvidia-cudnn-frontend)"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"it was tested with compute capability 9.0 only, and this device has {major}.{minor}"
    try:
        version = library().backend_version()
    except Exception as error:  # any error at its import, which is not ours, means that it cannot be used
        return f"nvidia-cudnn-frontend cannot be imported: {error}"
    return None if version >= OLDEST_CUDNN else f"it needs cuDNN {OLDEST_CUDNN}, and {version} is installed"


def forward(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of every sequence; see ``Forward``."""
    index = query.get_device()
    if index != _compat_operators.current_device_index():
        with torch.cuda.device(index):
            return forward(query, key, value, layout, rule)
    if rule.scale <= 0.0:
        query, rule, _ = positive_scale(query, rule)
    if layout.lse_by_row:
        if not _packed(layout):
            return with_lse_as_asked(forward(query, key, value, layout._replace(lse_by_row=False), rule), layout)
        seeds = _new_rng_state(query, rule) if layout.seeds is None else layout.seeds
        out, lse = _in_one_launch(query, key, value, layout, rule, seeds, True, index)
        assert lse is not None
        return out, lse, seeds if layout.seeds is None else empty(query, 0, dtype=torch.uint64)
    layout = contiguous(layout)
    query, strides_q, at_q = _readable(query)
    key, strides_k, at_k = _readable(key)
    value, strides_v, at_v = _readable(value)
    plan = plan_of(False, query, key, value, (strides_q, strides_k, strides_v), layout, rule)
    tokens, heads, _ = query.shape
    out = empty(query, tokens, heads, value.shape[2])
    lse = empty(query, heads, tokens, dtype=torch.float32)
    seeds = _new_rng_state(query, rule) if layout.seeds is None else layout.seeds.contiguous()
    stream = _compat_operators.current_stream_pointer(index)
    places = place(plan, layout, lse, lse.numel(), stream)
    pointers = (at_q, at_k, at_v, out.data_ptr(), places.stats, *places.pointers, *_random_pointers(seeds, layout, rule))
    plan.run(index, stream, pointers, places.workspace)
    finish_forward(plan, layout, places, out, lse, stream)
    return out, lse, seeds if layout.seeds is None else empty(query, 0, dtype=torch.uint64)


def forward_drawn(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule, wants_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """``out`` and ``lse``; see ``ForwardDrawn``."""
    index = query.get_device()
    one_launch = (layout.lse_by_row or not wants_lse) and _packed(layout) and rule.scale > 0.0
    if not one_launch or index != _compat_operators.current_device_index():
        return forward(query, key, value, layout, rule)[:2]
    return _in_one_launch(query, key, value, layout, rule, layout.seeds, wants_lse, index)


def _packed(layout: Layout) -> bool:
    """Whether it is as in packed graphs: every query sees its own key, and rows behind the last sequence are left alone."""
    offsets = layout.cu_seq_q
    return layout.tails_unread and layout.seqused_k is None and offsets is layout.cu_seq_k and offsets.is_contiguous()


def _in_one_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: Rule,
    seeds: Tensor | None,
    wants_lse: bool,
    index: int,
) -> tuple[Tensor, Tensor | None]:
    """A forward in a packed graph, on the current device: ``out`` and, if it is wanted, ``lse`` (T, H).

    It is one launch, but in the first layer: lse stays as cuDNN writes it, there are no rows to set right, and layers share what
    says where sequences lie. (What is asked of a tensor takes the host a tenth of a microsecond, so nothing is asked twice.)
    """
    shape, shape_v, dtype = query.shape, value.shape, query.dtype  # which tell key's
    tokens, heads, _ = shape
    out, lse = empty_results(query, (tokens, heads, shape_v[2]), (tokens, heads) if wants_lse else None, index)
    at_q, at_k, at_v = query.data_ptr(), key.data_ptr(), value.data_ptr()
    strides = query.stride(), key.stride(), value.stride()
    kind = (index, dtype, shape, shape_v, strides, rule, layout.max_q, layout.max_k, layout.cu_seq_q.numel(), wants_lse)
    plan = None if (at_q | at_k | at_v) & 15 else _ready.get(kind)
    if plan is None:
        operands = query, key, value
        query, strides_q, at_q = _readable(query)
        key, strides_k, at_k = _readable(key)
        value, strides_v, at_v = _readable(value)
        plan = plan_of(False, query, key, value, (strides_q, strides_k, strides_v), layout, rule, wants_lse)
        if query is operands[0] and key is operands[1] and value is operands[2]:
            _keep_ready(kind, plan)
    stream = _compat_operators.current_stream_pointer(index)
    places = place_once(plan, layout, stream)
    results = (out.data_ptr(),) if lse is None else (out.data_ptr(), lse.data_ptr())
    if rule.dropout_p == 0.0 or seeds is None:
        plan.run(index, stream, (at_q, at_k, at_v, *results, *places.pointers), places.workspace)
    else:
        seeds = seeds.contiguous()  # a copy lives until it is launched
        seed = seeds.data_ptr() + 8 * layout.seeds_at
        plan.run(index, stream, (at_q, at_k, at_v, *results, *places.pointers, seed, seed + 8), places.workspace)
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
    if grad_lse is not None and rule.scale <= 0.0:
        query, rule, sign = positive_scale(query, rule)
        grad_query, grad_key, grad_value = backward(grad_out, grad_lse, out, lse, rng_state, query, key, value, layout, rule)
        return grad_query * sign, grad_key, grad_value
    grads = empty(query, *query.shape), empty(key, *key.shape), empty(value, *value.shape)
    backward_into(grads, grad_out, out, lse, rng_state, query, key, value, layout, rule)
    if grad_lse is None:
        return grads
    more_query, more_key = through_lse(forward, _alone, grad_lse, query, key, lse, layout, rule)
    return grads[0] + more_query, grads[1] + more_key, grads[2]


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
    """Writes the gradients of query, key and value to ``grads``; see ``BackwardInto``."""
    index = query.get_device()
    if index != _compat_operators.current_device_index():
        with torch.cuda.device(index):
            return backward_into(grads, grad_out, out, lse, rng_state, query, key, value, layout, rule)
    if rule.scale <= 0.0:
        query, rule, sign = positive_scale(query, rule)
        backward_into(grads, grad_out, out, lse, rng_state, query, key, value, layout, rule)
        grads[0].mul_(sign)
        return None
    packed, out, rng_state, kind = _packed(layout), out.contiguous(), rng_state.contiguous(), None
    if packed and layout.lse_by_row and lse.is_contiguous():
        at_q, at_k, at_v = query.data_ptr(), key.data_ptr(), value.data_ptr()
        at_g, at_lse = grad_out.data_ptr(), lse.data_ptr()
        if not (at_q | at_k | at_v | at_g | at_lse) & 15:
            kind = _kind_of_backward(grads, grad_out, query, key, value, layout, rule, index)
            if (ready := _ready.get(kind)) is not None:
                at_grads = grads[0].data_ptr(), grads[1].data_ptr(), grads[2].data_ptr()
                operands = (at_q, at_k, at_v, out.data_ptr(), at_lse, at_g, *at_grads)
                return _backward_in_one_launch(ready, operands, query, rng_state, layout, rule, index)
    layout = layout if packed else contiguous(layout)
    given = query, key, value, grad_out
    query, strides_q, at_q = _readable(query)
    key, strides_k, at_k = _readable(key)
    value, strides_v, at_v = _readable(value)
    grad_out, strides_g, at_g = _readable(grad_out)
    grad_query, grad_key, grad_value = grads
    at_grads = grad_query.data_ptr(), grad_key.data_ptr(), grad_value.data_ptr()
    dim, dim_v = query.shape[2], value.shape[2]
    # Heads are contiguous; with one head, PyTorch may name any stride for it.
    of_grads = (grad_query.stride(0), dim, 1), (grad_key.stride(0), dim, 1), (grad_value.stride(0), dim_v, 1)
    strides = (strides_q, strides_k, strides_v, strides_g, *of_grads)
    plan = plan_of(True, query, key, value, strides, layout, rule)
    if packed and layout.lse_by_row and lse.is_contiguous() and not lse.data_ptr() & 15:
        if kind is not None and all(x is as_given for x, as_given in zip((query, key, value, grad_out), given)):
            _keep_ready(kind, plan)
        operands = (at_q, at_k, at_v, out.data_ptr(), lse.data_ptr(), at_g, *at_grads)
        return _backward_in_one_launch(plan, operands, query, rng_state, layout, rule, index)
    stream = _compat_operators.current_stream_pointer(index)
    places = place_backward(plan, layout, (lse.t() if layout.lse_by_row else lse).contiguous(), stream)
    operands = (at_q, at_k, at_v, out.data_ptr(), places.stats, at_g, *at_grads)
    random = _random_pointers(rng_state, layout, rule)
    plan.run(index, stream, (*operands, *places.pointers, *random), places.workspace)
    if not (plan.key.square and layout.tails_unread):
        finish_backward(plan, layout, grads)
    return None


def _backward_in_one_launch(
    plan: Plan, operands: tuple[int, ...], query: Tensor, rng_state: Tensor, layout: Layout, rule: Rule, index: int
) -> None:
    """A backward in a packed graph, which reads lse as cuDNN wrote it, on the current device; ``operands`` are addresses."""
    stream = _compat_operators.current_stream_pointer(index)
    places, memory = place_once(plan, layout, stream), workspace(plan, query)
    random = _random_pointers(rng_state, layout, rule)
    plan.run(index, stream, (*operands, *places.pointers, *random), memory.data_ptr())


def _kind_of_backward(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: Rule,
    index: int,
) -> tuple[object, ...]:
    """All that the plan of a backward in a packed graph depends on, where operands are read as they come."""
    strides = (query.stride(), key.stride(), value.stride(), grad_out.stride(), *[x.stride() for x in grads])
    sizes = (query.shape, value.shape, layout.cu_seq_q.numel())  # which tell key's
    return (True, index, query.dtype, sizes, strides, rule, layout.max_q, layout.max_k)


def _keep_ready(kind: tuple[object, ...], plan: Plan) -> None:
    if len(_ready) >= _MOST_KNOWN:
        _ready.clear()
    _ready[kind] = plan


def _alone(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    layout: Layout,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward without a gradient of lse, as `through_lse` calls one."""
    return backward(grad_out, None, out, lse, rng_state, query, key, value, layout, rule)


_known: dict[tuple[object, ...], Plan] = {}
_ready: dict[tuple[object, ...], Plan] = {}
"""By what operands are as they come, where the kernels read these, and the numbers of their rows."""
_MOST_KNOWN = 4096


def plan_of(
    backward: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    strides: tuple[tuple[int, ...], ...],
    layout: Layout,
    rule: Rule,
    stats: bool = True,
) -> Plan:
    """The plan that these operands need, found without working out its key where they were seen before.

    Args:
        strides: as of ``Key``, with a contiguous last dim everywhere.
    """
    tokens, heads, dim = query.shape
    keys, heads_k, dim_v = value.shape
    cu_seq_q, cu_seq_k, max_q, max_k, seqused_k, *_ = layout
    square = seqused_k is None and (cu_seq_q is cu_seq_k or cu_seq_q.data_ptr() == cu_seq_k.data_ptr())
    sizes = (heads, heads_k, dim, dim_v, cu_seq_q.shape[0], max_q, max_k, square)
    known = (backward, query.get_device(), query.dtype, sizes, strides, rule, stats)
    plan = _known.get(known)
    if plan is None or max(tokens, keys) > plan.most_rows:
        plan = plan_for(key_of(backward, query, key, value, strides, layout, rule)._replace(stats=stats))
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        if not plan.key.wide:
            _known[known] = plan
    return plan


def key_of(
    backward: bool, query: Tensor, key: Tensor, value: Tensor, strides: tuple[tuple[int, ...], ...], layout: Layout, rule: Rule
) -> Key:
    """All that the plan for these operands depends on."""
    tokens, heads, dim = query.shape
    keys, heads_k, dim_v = value.shape
    # No tensor has a longer step from row to row than one of these.
    step = max(heads * dim, heads * dim_v, *[stride[0] for stride in strides])
    return Key(
        backward,
        query.device,
        query.dtype,
        rounded(layout.cu_seq_q.shape[0] - 1, 1),
        rounded(layout.max_q, 128),
        rounded(layout.max_k, 128),
        heads,
        heads_k,
        dim,
        dim_v,
        strides,
        layout.seqused_k is None and layout.cu_seq_q.data_ptr() == layout.cu_seq_k.data_ptr(),
        (max(tokens, keys) + 1) * step >= 2**31,
        rule,
    )


def rounded(number: int, least: int) -> int:
    """``number`` rounded up to a multiple of ``least`` and to one of eight steps between powers of two."""
    number = max(number, 1)
    step = max(least, 1 << max((number - 1).bit_length() - 4, 0))
    return -(-number // step) * step


def _readable(x: Tensor) -> tuple[Tensor, tuple[int, ...], int]:
    """As the kernels read it, 16 bytes at a time; then its strides and its address."""
    strides, address = x.stride(), x.data_ptr()
    token, head, element = strides
    if element == 1 and not (token | head) & 7 and not address & 15 and token > 0 and head > 0:
        return x, strides, address
    x = x.clone(memory_format=torch.contiguous_format)
    return x, x.stride(), x.data_ptr()


def _new_rng_state(query: Tensor, rule: Rule) -> Tensor:
    if rule.dropout_p == 0.0:
        return empty(query, 0, dtype=torch.uint64)
    # Drawn on the device: no wait, and a CUDA graph draws anew at each replay.
    return empty(query, 2, dtype=torch.int64).random_(0, 2**31).view(torch.uint64)


def _random_pointers(rng_state: Tensor, layout: Layout, rule: Rule) -> tuple[int, ...]:
    """Of the seed and of the offset of cuDNN's random numbers, where there are any."""
    if rule.dropout_p == 0.0:
        return ()
    seed = rng_state.data_ptr() + 8 * layout.seeds_at
    return seed, seed + 8


BACKEND = Backend(
    "cudnn",
    supports,
    forward,
    backward,
    backward_into=backward_into,
    forward_drawn=forward_drawn,
    lse_by_row=True,
    takes_seeds=True,
)
