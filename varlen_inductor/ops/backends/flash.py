"""CUDA: the kernels of the packages flash-attn 2 (``flash_attn``) and flash-attn 3 for Hopper (``flash_attn_interface``).

The functions around the compiled kernels are called by the names of their arguments, which differ between releases: a window is a
pair or two numbers, some arguments have defaults in one release and none in another, what is returned has four or eight parts.
Signatures are looked at once, and a release whose signatures are not understood is refused with the reason. Read in flash-attn
2.5.9, 2.6.3, 2.7.0, 2.7.4 and 2.8.3 (2.5 pads lse, and is refused), and in the interface of flash-attn 3 from November 2024 (which
has no sequences in the function that runs the kernel, and is refused), and of February, May, August 2025 and March 2026.

No release of either was run on a GPU for this: there are no wheels of them for the PyTorch that this was made with. The tests
call stand-ins with the signatures of those releases, so that what is passed where is tested, and the kernels are not.

Neither knows positions or a gradient of lse (computed here with a second call). Version 2 has dropout and no used keys in its
backward, version 3 has no dropout and reads past the end of a sequence: `tails` makes that harmless behind the last one, and used
keys are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varlen_inductor.ops.backends.base import Backend, unknown_option
from varlen_inductor.ops.backends.flash_common import (
    MAX_HEAD_DIM,
    MAX_SEQUENCES,
    bounds_of_flash2,
    contiguous,
    kernel_head_dim,
    narrowed,
    positive_scale,
    ready,
    through_lse,
    without_used,
)
from varlen_inductor.ops.backends.packages import load
from varlen_inductor.ops.backends.rows import finish_backward, finish_forward
from varlen_inductor.ops.backends.tails import finite_behind
from varlen_inductor.ops.problem import Layout, Problem, Rule

_OTHER_NAMES = {"causal": "is_causal"}
"""What some releases call an argument."""

_NOT_USED = frozenset(
    {
        *("k_new", "v_new", "qv", "out", "out_", "cu_seqlens_k_new", "seqused_q", "sequed_q", "page_table", "kv_batch_idx"),
        *("leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary", "q_descale", "k_descale", "v_descale", "alibi_slopes"),
        *("block_table", "seqused_k", "sequed_k", "rng_state"),
    }
)
"""Arguments that may be ``None``."""


class Function(NamedTuple):
    """A function of a package and what it calls the arguments that we give it."""

    call: Callable[..., Any]
    names: dict[str, str]
    pair: bool
    """Whether it takes a window as one argument."""
    fixed: dict[str, Any]
    """What else it must be given."""

    def __call__(self, given: dict[str, Any]) -> Any:
        """Call it with ``given``, by our names; ``window`` is a pair."""
        arguments = {self.names[name]: value for name, value in given.items() if name != "window"}
        left, right = given["window"]
        window = {"window_size": (left, right)} if self.pair else {"window_size_left": left, "window_size_right": right}
        return self.call(**arguments, **window, **self.fixed)


class Package(NamedTuple):
    """One of the two packages."""

    name: str
    module: str
    forward: str
    backward: str
    version: int
    capability: tuple[int, int]
    """Of the devices that it is for: at least, and at most."""
    install: str
    namespaces: tuple[str, ...]
    """Where releases that make PyTorch operators of their functions put them."""


FLASH2 = Package(
    "flash2",
    "flash_attn.flash_attn_interface",
    "_flash_attn_varlen_forward",
    "_flash_attn_varlen_backward",
    2,
    (8, 9),
    "pip install flash-attn --no-build-isolation",
    ("flash_attn",),
)
FLASH3 = Package(
    "flash3",
    "flash_attn_interface",
    "_flash_attn_forward",
    "_flash_attn_backward",
    3,
    (9, 9),
    "see hopper/ in github.com/Dao-AILab/flash-attention",
    ("flash_attn_3", "flash_attn"),
)

_BOTH = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal", "softcap")
_BACKWARD = ("dout", "out", "softmax_lse", "dq", "dk", "dv", "deterministic")
_NEEDED = {
    (2, "forward"): (*_BOTH, "dropout_p", "seqused_k", "return_softmax"),
    (2, "backward"): (*_BOTH, *_BACKWARD, "dropout_p", "rng_state"),
    (3, "forward"): _BOTH,
    (3, "backward"): (*_BOTH, *_BACKWARD),
}
"""The arguments that are given, by version of the kernels."""


# --- what there is ---------------------------------------------------------------------------------------------------


def supports(package: Package, problem: Problem) -> str | None:
    """Why the kernels cannot run the problem, or ``None``."""
    if problem.device.type != "cuda":
        return "it runs on CUDA only"
    unavailable = _unavailable(package, problem.device)
    if unavailable is not None:
        return unavailable
    if problem.dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 or bfloat16, not {problem.dtype}"
    dim = max(problem.head_dim, problem.head_dim_v)
    if dim > MAX_HEAD_DIM:
        return f"its head dim is at most {MAX_HEAD_DIM}, not {dim}"
    if problem.positions and problem.windowed:
        return "a window that speaks of positions is unknown to it"
    if problem.dropout_p > 0.0 and package.version == 3:
        return "it has no dropout"
    if problem.seqused_k and package.version == 3:
        # It reads behind the keys in use, and those rows are the caller's: they may hold anything and must not be written.
        return "it reads past the keys in use (seqused_k)"
    if problem.dropout_p == 1.0:
        return "it cannot drop everything"
    if problem.dropout_p > 0.0 and dim > 192 and torch.cuda.get_device_capability(problem.device) not in ((8, 0), (9, 0)):
        return "with dropout its backward has head dims over 192 on A100 and H100 only"
    return unknown_option(problem)


@cache
def _unavailable(package: Package, device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "it is not tested on ROCm"
    functions = _functions(package)
    if isinstance(functions, str):
        return functions
    major, minor = torch.cuda.get_device_capability(device)
    least, most = package.capability
    if least <= major <= most:
        return None
    return f"it is for compute capability {least}.0 to {most}.x, and this device has {major}.{minor}"


@cache
def _functions(package: Package) -> tuple[Function, Function] | str:
    """The package's functions, or why they cannot be used."""
    module = load(package.module)
    if isinstance(module, str):
        return f"{module} ({package.install})" if module.endswith("is not installed") else module
    found = []
    for way, name in (("forward", package.forward), ("backward", package.backward)):
        function = _understood(_function(package, module, name), name, _NEEDED[package.version, way])
        if isinstance(function, str):
            return f"this release of {package.module.partition('.')[0]} is not understood: {function}"
        found.append(function)
    return found[0], found[1]


def _understood(call: Any, name: str, needed: tuple[str, ...]) -> Function | str:
    if call is None:
        return f"it has no {name}"
    parameters = _parameters(call)
    if isinstance(parameters, str):
        return f"{name}: {parameters}"
    names = {x: x if x in parameters or _OTHER_NAMES.get(x) not in parameters else _OTHER_NAMES[x] for x in needed}
    pair = "window_size" in parameters
    window = {"window_size"} if pair else {"window_size_left", "window_size_right"}
    missing = [x for x in (*names.values(), *sorted(window)) if x not in parameters]
    if missing:
        return f"{name} does not take {', '.join(missing)}"
    others = [x for x, has_default in parameters.items() if not has_default and x not in {*names.values(), *window}]
    unknown = [x for x in others if x not in _NOT_USED]
    if unknown:
        return f"{name} wants {', '.join(unknown)}"
    return Function(call, names, pair, dict.fromkeys(others))


def _function(package: Package, module: Any, name: str) -> Any:
    """The function ``name``, or the operator that the module has made of it: only that one tells its arguments."""
    function = getattr(module, name, None)
    if function is None or inspect.isroutine(function):
        return function
    for namespace in package.namespaces:
        operator = getattr(getattr(torch.ops, namespace), name, None)
        if operator is not None:
            return operator.default
    return function


def _parameters(call: Any) -> dict[str, bool] | str:
    """The names of the arguments, and whether each has a default; or why they cannot be told."""
    if isinstance(call, torch._ops.OpOverload):
        return {argument.name: argument.has_default_value() for argument in call._schema.arguments}
    try:
        signature = inspect.signature(call)
    except (TypeError, ValueError) as error:
        return str(error)
    return {p.name: p.default is not p.empty for p in signature.parameters.values()}


# --- calls -----------------------------------------------------------------------------------------------------------


def forward(
    package: Package, query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of every sequence; see ``Forward``."""
    dim = kernel_head_dim(query, value)
    layout = _layout(package, layout, key.shape[0], rule.dropout_p > 0.0)
    query, rule, _ = positive_scale(query, rule)
    queries, keys = (ready(query, dim),), (ready(key, dim), ready(value, dim))
    with _readable(package, queries, keys, layout) as (q, k, v):
        out, lse, rng_state = _run(package, q, k, v, layout, rule)
    out = narrowed(out, value.shape[2])
    if not layout.tails_unread:
        finish_forward(out, lse, layout.cu_seq_q)
    return out, lse, rng_state


def backward(
    package: Package,
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
    dim = kernel_head_dim(query, value)
    layout = _layout(package, layout, key.shape[0], True)
    scaled, rule, factor = positive_scale(query, rule)
    queries, keys = (ready(scaled, dim), ready(grad_out, dim)), (ready(key, dim), ready(value, dim))
    with _readable(package, queries, keys, layout) as (q, g, k, v):
        grad_query, grad_key, grad_value = _run_backward(package, g, q, k, v, ready(out, dim), lse, rng_state, layout, rule)
        if grad_lse is not None:
            run, run_backward = partial(_run, package), partial(_run_backward, package)
            more_query, more_key = through_lse(run, run_backward, grad_lse, q, k, lse, layout, rule)
            grad_query, grad_key = grad_query + more_query, grad_key + more_key
    if factor != 1.0:
        grad_query = grad_query * factor
    grads = (narrowed(grad_query, query.shape[2]), narrowed(grad_key, key.shape[2]), narrowed(grad_value, value.shape[2]))
    if not layout.tails_unread:
        finish_backward(grads, layout.cu_seq_q, layout.cu_seq_k)
    return grads


def _layout(package: Package, layout: Layout, key_tokens: int, without: bool) -> Layout:
    """As the kernels want it. ``without`` used keys if version 2: its backward has none, and must draw the same dropout."""
    if package.version == 3:
        return contiguous(layout)
    return contiguous(without_used(layout, key_tokens) if without else layout, MAX_SEQUENCES)


def _readable(
    package: Package, queries: tuple[Tensor, ...], keys: tuple[Tensor, Tensor], layout: Layout
) -> AbstractContextManager[tuple[Tensor, ...]]:
    return finite_behind(queries, keys, layout) if package.version == 3 else nullcontext((*queries, *keys))


def _run(package: Package, query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    functions = _functions(package)
    if isinstance(functions, str):
        raise RuntimeError(functions)
    given = _common(package, query, key, value, layout, rule)
    if package.version == 3:
        with torch.cuda.device_of(query):
            out, lse = functions[0](given)[:2]
        return out, lse, query.new_empty(0, dtype=torch.uint64)
    given |= {"seqused_k": layout.seqused_k, "dropout_p": rule.dropout_p, "return_softmax": False}
    with torch.cuda.device_of(query):
        results = functions[0](given)
    out, lse, rng_state = (results[0], results[1], results[3]) if len(results) == 4 else (results[0], results[5], results[7])
    return out, lse, rng_state.view(torch.uint64) if rule.dropout_p > 0.0 else query.new_empty(0, dtype=torch.uint64)


def _run_backward(
    package: Package,
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
    functions = _functions(package)
    if isinstance(functions, str):
        raise RuntimeError(functions)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    given = _common(package, query, key, value, layout, rule)
    given |= {"dout": grad_out, "out": out, "softmax_lse": lse, "dq": dq, "dk": dk, "dv": dv}
    given["deterministic"] = torch.are_deterministic_algorithms_enabled()
    if package.version == 2:
        given |= {"dropout_p": rule.dropout_p, "rng_state": rng_state.view(torch.int64) if rule.dropout_p > 0.0 else None}
    with torch.cuda.device_of(query):
        functions[1](given)
    return dq, dk, dv


def _common(package: Package, query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> dict[str, Any]:
    if package.version == 2:
        max_q, max_k = bounds_of_flash2(query, key, layout, rule)
    else:
        max_q, max_k = max(layout.max_q, 1), max(layout.max_k, 1)
    return {
        "q": query,
        "k": key,
        "v": value,
        "cu_seqlens_q": layout.cu_seq_q,
        "cu_seqlens_k": layout.cu_seq_k,
        "max_seqlen_q": max_q,
        "max_seqlen_k": max_k,
        "softmax_scale": rule.scale,
        "causal": rule.causal,
        "window": (rule.window_left, rule.window_right),
        "softcap": 0.0,
    }


def _backend(package: Package) -> Backend:
    return Backend(package.name, partial(supports, package), partial(forward, package), partial(backward, package))


FLASH2_BACKEND, FLASH3_BACKEND = _backend(FLASH2), _backend(FLASH3)
