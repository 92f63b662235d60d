"""CUDA: the kernels of the package flash-attn-4 (``flash_attn.cute``), the fastest there are for Hopper.

It is in beta and has no stable interface. The two functions that run the kernels, ``_flash_attn_fwd`` and ``_flash_attn_bwd``, are
called by the names of their arguments; their signatures are looked at once, and a release whose signatures are not understood is
refused with the reason. Read in 4.0.0b3, b8, b13, b18, b22, b26, b30, b33 and b36; before b8 the backward knows neither sequences
on Hopper nor a gradient of lse, and those releases are refused.

The kernels take half precision, head dims that are multiples of 8 and at most 256, windows level with the last key, ``seqused_k``
and a gradient of lse; no dropout and no positions. They are compiled at the first call (seconds), for: dtype, head dims, heads per
key head, whether causal, which sides of a window are limited, which of the optional tensors there are, whether the longest sequence
fits one block, and whether there are more than 256 sequences. A number of tokens or of sequences compiles nothing.

They read up to a block behind the last row of a sequence (`tails` makes that harmless). A function's Python takes far longer than
the launch, so calls are noted and made again without it (`replay`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varlen_inductor.ops.backends.base import Backend
from varlen_inductor.ops.backends.flash_common import MAX_HEAD_DIM, contiguous, narrowed, positive_scale, ready
from varlen_inductor.ops.backends.packages import load
from varlen_inductor.ops.backends.replay import Replay, Sizes
from varlen_inductor.ops.backends.rows import finish_backward, finish_forward
from varlen_inductor.ops.backends.tails import finite_behind
from varlen_inductor.ops.problem import UNBOUNDED, Layout, Problem, Rule

MODULE = "flash_attn.cute.interface"
MAX_ELEMENTS = 2**31
MAX_HEAD_DIM_BLACKWELL = 128

_SHARED = {"q", "k", "v", "out", "lse", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "max_seqlen_q", "max_seqlen_k"}
_RULE = {"softmax_scale", "causal", "window_size_left", "window_size_right", "softcap"}
FORWARD = frozenset(_SHARED | _RULE)
BACKWARD = frozenset(_SHARED | _RULE | {"dout", "dlse", "dq", "dk", "dv", "deterministic"})
"""The arguments that are given."""


class Kernels(NamedTuple):
    """The package's functions, and what runs them."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    replay: Replay


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
    if problem.positions and problem.windowed:
        return "a window that speaks of positions is unknown to it"
    if problem.dropout_p > 0.0:
        return "it has no dropout"
    return None


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
    return Kernels(module._flash_attn_fwd, module._flash_attn_bwd, Replay(owners))


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
    dim, dim_v = kernel_head_dims(query, value)
    _check_size(query, key, dim)
    layout = contiguous(layout)
    query, rule, _ = positive_scale(query, rule)
    q, k, v = finite_behind((ready(query, dim),), (ready(key, dim), ready(value, dim_v)), layout)
    out = q.new_empty(q.shape[0], q.shape[1], dim_v)
    lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    _run("forward", {"q": q, "k": k, "v": v, "out": out, "lse": lse}, layout, rule, {"softcap": None})
    out = narrowed(out, value.shape[2])
    if not layout.tails_unread:
        finish_forward(out, lse, layout.cu_seq_q)
    return out, lse, q.new_empty(0, dtype=torch.uint64)


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
    dim, dim_v = kernel_head_dims(query, value)
    _check_size(query, key, dim)
    layout = contiguous(layout)
    scaled, rule, factor = positive_scale(query, rule)
    rows_q, rows_k = (ready(scaled, dim), ready(grad_out, dim_v)), (ready(key, dim), ready(value, dim_v))
    q, g, k, v = finite_behind(rows_q, rows_k, layout)
    # The kernels write no gradient of keys that are not in use.
    make = torch.empty if layout.seqused_k is None else torch.zeros
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk, dv = (make(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    tensors = {"q": q, "k": k, "v": v, "out": ready(out, dim_v), "dout": g, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    if grad_lse is not None:
        tensors["dlse"] = grad_lse.float().contiguous()
    _run("backward", tensors, layout, rule, {"softcap": 0.0, "deterministic": torch.are_deterministic_algorithms_enabled()})
    grads = (narrowed(dq, query.shape[2]), narrowed(dk, key.shape[2]), narrowed(dv, value.shape[2]))
    if factor != 1.0:
        grads = (grads[0] * factor, *grads[1:])
    if not layout.tails_unread:
        finish_backward(grads, layout.cu_seq_q, layout.cu_seq_k)
    return grads


def kernel_head_dims(query: Tensor, value: Tensor) -> tuple[int, int]:
    """The head dims of query and key, and of value. Blocks are chosen by the former, so that the latter must not be larger."""
    dim_v = -(-value.shape[2] // 8) * 8
    return max(-(-query.shape[2] // 8) * 8, dim_v), dim_v


def _check_size(query: Tensor, key: Tensor, dim: int) -> None:
    if max(query.shape[0] * query.shape[1], key.shape[0] * key.shape[1]) * dim >= MAX_ELEMENTS:
        raise RuntimeError(f"query {tuple(query.shape)} or key {tuple(key.shape)} has 2**31 elements or more: split the batch")


def _run(way: str, tensors: dict[str, Tensor], layout: Layout, rule: Rule, options: dict[str, Any]) -> None:
    """Call the function ``way`` of the package."""
    q, k = tensors["q"], tensors["k"]
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):  # the package launches on the current device
            _run(way, tensors, layout, rule, options)
        return
    kernels = _kernels()
    if isinstance(kernels, str):
        raise RuntimeError(kernels)
    max_q, max_k = max(int(layout.max_q), 1), max(int(layout.max_k), 1)
    cu_q, cu_k, used = layout.cu_seq_q, layout.cu_seq_k, layout.seqused_k
    one_layout = cu_q.data_ptr() == cu_k.data_ptr()
    dims = (q.shape[2], tensors["v"].shape[2])
    sizes = Sizes(q.shape[0], k.shape[0], cu_q.shape[0] - 1, dims)
    problem = (q.device, q.dtype, q.shape[1], k.shape[1], dims, one_layout, q.shape[0] == k.shape[0], sizes.sequences > 256)
    key = (way, problem, rule, max_q, max_k, used is None, "dlse" in tensors, *options.values())
    # In the forward query, key and value may have a gradient, which must not be followed into the package.
    given = [x.detach() if x.requires_grad else x for x in tensors.values()]

    def call() -> None:
        function = kernels.forward if way == "forward" else kernels.backward
        function(
            **dict(zip(tensors, given, strict=True)),
            cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
            seqused_k=used,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            softmax_scale=rule.scale,
            causal=rule.causal,
            window_size_left=None if rule.window_left == UNBOUNDED else rule.window_left,
            window_size_right=None if rule.window_right == UNBOUNDED else rule.window_right,
            **options,
        )

    kernels.replay(key, (*given, cu_q, None if one_layout else cu_k, used), sizes, call)


BACKEND = Backend("flash4", supports, forward, backward)
