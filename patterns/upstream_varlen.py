"""Calls of PyTorch's own varlen attention (`torch.nn.attention.varlen`), as calls of ours.

PyTorch's operator is Python to the dispatcher and knows one kernel; ours goes through our choice of kernels and is called
directly.  It has one spelling in every graph, so it is replaced where it stands, in Dynamo's graph, before anything is retraced:

    before                                                        after
    %a = torch_attn._varlen_attn(%q, %k, %v, %cu, %cu, 17, 17,    %a = varlen_inductor.varlen_attn(%q, %k, %v, %cu, %cu, 17, 17,
                                 True, None, [-1, 0])                                              window_right=0)
    %out = getitem(%a, 0)                                         %out = getitem(%a, 0)
    %lse = getitem(%a, 1)                                         %l = getitem(%a, 1); %lse = aten.detach(%l)

What stays as PyTorch has it: nothing is computed from the gradient of lse, which PyTorch drops; operands are not cast by autocast
(where it would cast them the call is left alone).  What differs is what PyTorch leaves open: rows behind the last sequence are
zero and not as the allocator left them, and lse is -inf and not +inf for a query without keys.

A call of the backward operator, which is in a graph under compiled autograd, is replaced as well:

    %g = torch_attn._varlen_attn_backward(%grad, %q, %k, %v,      %m = aten.masked_fill(%lse, aten.isposinf(%lse), -inf)
             %out, %lse, %cu, %cu, 17, 17, True, %rng)            %g = varlen_inductor.varlen_attn_backward(%grad, None, %out, %m,
                                                                           aten.new_empty(%q, [0]), %q, ..., window_right=0)
"""

from __future__ import annotations

import copy
import math
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverloadPacket

from varlen_inductor import _compat
from varlen_inductor.ops.attention import split_arguments
from varlen_inductor.ops.problem import Problem

from . import wanted

__all__ = ["KIND", "KIND_BACKWARD", "Call", "Found", "find", "problem_of", "rewrite"]

aten = torch.ops.aten
_ours = torch.ops.varlen_inductor

KIND = "varlen_attn (PyTorch's)"
KIND_BACKWARD = "varlen_attn (PyTorch's), backward"


@dataclass
class Call:
    """One call: why it is left alone, or None; what ours is given besides the operands, and what it gives, as fakes."""

    node: fx.Node
    backward: bool
    reason: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    value: Any = None


@dataclass
class Found:
    """The calls of a graph, and of those that its higher-order operators are given (`inner`, by the name of the attribute)."""

    calls: list[Call] = field(default_factory=list)
    inner: dict[str, Found] = field(default_factory=dict)

    def all(self) -> list[Call]:
        return self.calls + [call for found in self.inner.values() for call in found.all()]


def find(gm: fx.GraphModule) -> Found:
    """The calls of PyTorch's varlen attention in a graph of Dynamo's; it is not changed.

    Grad mode and autocast must be as they will be when the graph runs.
    """
    return _find(gm, [])


def rewrite(gm: fx.GraphModule, found: Found) -> fx.GraphModule:
    """A copy of ``gm`` in which the calls without a reason are calls of ours."""
    new = fx.GraphModule(gm, copy.deepcopy(gm.graph), type(gm).__name__)
    new.meta = dict(gm.meta)
    copies = dict(zip(gm.graph.nodes, new.graph.nodes, strict=True))
    for call in found.calls:
        if call.reason is None:
            (_replace_backward if call.backward else _replace)(copies[call.node], call)
    for name, inner in found.inner.items():
        if any(call.reason is None for call in inner.all()):
            new.set_submodule(name, rewrite(operator.attrgetter(name)(gm), inner))
    new.graph.lint()
    new.recompile()
    _compat.adopt_dynamo_attributes(new, gm)
    return new


def problem_of(call: Call) -> Problem:
    """What a kernel must know to say whether it can run the call, of one without a reason."""
    given = {name: _value(x) for name, x in _arguments(call.node).items()}
    options = {name: _value(x) for name, x in call.options.items()}
    query, key, value, *lengths = (given[name] for name in _OPERANDS)
    layout, rule, _ = split_arguments(query, *lengths, **options)
    return Problem.of(query, key, value, layout, rule)


# --- finding ---------------------------------------------------------------------------------------------------------


def _find(gm: fx.GraphModule, autocasts: list[tuple[Any, ...]]) -> Found:
    forward, backward = _compat.upstream_varlen_ops()
    found = Found()
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target is _compat.ENTER_AUTOCAST:
            autocasts = [*autocasts, node.args]
        elif node.target is _compat.EXIT_AUTOCAST:
            autocasts = autocasts[:-1]
        elif isinstance(node.target, HigherOrderOperator):
            for name in _graphs_given_to(node, gm):
                found.inner[name] = _find(operator.attrgetter(name)(gm), autocasts)
        elif node.target in forward or node.target in backward:
            call = Call(node, node.target in backward)
            call.reason = _look(call, autocasts)
            found.calls.append(call)
    found.inner = {name: inner for name, inner in found.inner.items() if inner.all()}
    return found


def _graphs_given_to(node: fx.Node, gm: fx.GraphModule) -> list[str]:
    names = [str(x.target) for x in node.all_input_nodes if x.op == "get_attr"]
    return [name for name in names if isinstance(operator.attrgetter(name)(gm), fx.GraphModule)]


def _look(call: Call, autocasts: list[tuple[Any, ...]]) -> str | None:
    """Fill in what ours is called with; the reason why it cannot be, if there is one."""
    given = _arguments(call.node)
    reason = _unknown_to_ours(given) or _unfit_use(call)
    if reason is not None:
        return reason
    query = _value(given["query"])
    if not isinstance(query, Tensor):
        return "what it is given is not known"
    cast_to = _autocast_dtype(query.device.type, autocasts)
    if cast_to is not None and query.dtype != cast_to:
        return f"its operands are {query.dtype}, which autocast to {cast_to} would change; PyTorch's operator is not cast"
    call.options = _options(given)
    return _try(call, given)


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by name, as this version of PyTorch has them."""
    op = node.target.default if isinstance(node.target, OpOverloadPacket) else node.target
    arguments = op._schema.arguments  # type: ignore[union-attr]
    given = {argument.name: argument.default_value for argument in arguments}
    given.update(zip((argument.name for argument in arguments), node.args))
    given.update(node.kwargs)
    # The choice of a kernel depends on these, so where they are symbols Dynamo guards on their numbers.
    if given["window_size"] is not None:
        given["window_size"] = [_number(side) for side in given["window_size"]]
    for name in ("scale", "is_causal"):
        given[name] = _number(given[name])
    return given


def _number(x: Any) -> Any:
    fixed = _compat.fix_symbol(_value(x))
    return x if fixed is None else fixed


_OPERANDS = ("query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k")
_KNOWN = frozenset({*_OPERANDS, "is_causal", "scale", "window_size", "enable_gqa", "seqused_k"})
_OF_BACKWARD = frozenset({"grad_out", "out", "lse", "rng_state"})
_REASONS = {
    "block_table": "its keys lie in pages (block_table), which the rewrite does not know",
    "num_splits": "it sets num_splits, which the rewrite does not know",
    "backend": "it names the kernel that runs it (backend)",
}


def _unknown_to_ours(given: dict[str, Any]) -> str | None:
    for name, value in given.items():
        # The default is None but for `backend`, where 1 is FlashAttention.
        if name not in _KNOWN | _OF_BACKWARD and value is not None and (name, value) != ("backend", 1):
            return _REASONS.get(name, f"it sets {name}, which the rewrite does not know")
    if given["cu_seq_k"] is None:
        return "it has no cu_seq_k"
    window = given["window_size"]
    if window is not None and (len(window) != 2 or any(not isinstance(side, int) or side < -1 for side in window)):
        return f"its window_size is {window}; each side must be a number of keys, or -1 for no limit"
    if not isinstance(given["is_causal"], bool) or isinstance(given["scale"], fx.Node):
        return "its options are known only when the graph runs"
    return None


def _unfit_use(call: Call) -> str | None:
    for user in call.node.users:
        if user.target is not operator.getitem:
            return "its results are not taken apart where they come out"
        if not call.backward and user.args[1] == 2 and user.users:
            return "its rng_state is used"
    return None


def _options(given: dict[str, Any]) -> dict[str, Any]:
    left, right = given["window_size"] or (-1, -1)
    options = {"scale": given["scale"], "window_left": left, "window_right": 0 if given["is_causal"] else right}
    options = {name: value for name, value in options.items() if value not in (None, -1)}
    if (kernels := wanted.kernels()) != "auto":
        options["kernels"] = kernels
    if given.get("seqused_k") is not None:
        options["seqused_k"] = given["seqused_k"]
    return options


def _autocast_dtype(device_type: str, autocasts: list[tuple[Any, ...]]) -> torch.dtype | None:
    """The dtype that autocast has in force for operators on this kind of device, or None."""
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    for kind, given, enabled, *_ in autocasts:
        if kind == device_type:
            dtype = (given or torch.get_autocast_dtype(device_type)) if enabled else None
    return dtype


def _try(call: Call, given: dict[str, Any]) -> str | None:
    """Why ours refuses the operands or gives something that PyTorch's does not, or None."""
    operands = [_value(given[name]) for name in _OPERANDS]
    options = {name: _value(x) for name, x in call.options.items()}
    try:
        ours = _compat.run_fake(_ours.varlen_attn.default, operands, options)
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error).split("\n", 1)[0]
    # What follows in the graph was recorded for the layouts of PyTorch's results, which are those of the operands.
    theirs = _value(call.node)[: 3 if call.backward else 1]
    if not all(x.is_contiguous() for x in theirs):
        return "its results are not contiguous, as its operands are not, and ours would be"
    call.value = theirs if call.backward else (theirs[0], *ours[1:])
    return None


def _value(x: Any) -> Any:
    return x.meta.get("example_value", x.meta.get("val")) if isinstance(x, fx.Node) else x


# --- replacing -------------------------------------------------------------------------------------------------------


def _replace(node: fx.Node, call: Call) -> None:
    given = _arguments(node)
    node.target, node.args, node.kwargs = _ours.varlen_attn.default, _operands(given), _options(given)
    node.meta["example_value"] = call.value
    for user in tuple(node.users):
        if user.args[1] == 1 and user.users:
            with node.graph.inserting_after(user):
                detached = node.graph.call_function(aten.detach.default, (user,))
            detached.meta = dict(user.meta)
            for other in tuple(user.users):
                if other is not detached:
                    other.replace_input_with(user, detached)


def _replace_backward(node: fx.Node, call: Call) -> None:
    given = _arguments(node)
    with node.graph.inserting_before(node):
        no_keys = node.graph.call_function(aten.isposinf.default, (given["lse"],))
        lse = node.graph.call_function(aten.masked_fill.Scalar, (given["lse"], no_keys, -math.inf))
        rng_state = node.graph.call_function(aten.new_empty.default, (given["query"], [0]), {"dtype": torch.uint64})
    node.target, node.kwargs = _ours.varlen_attn_backward.default, _options(given)
    node.args = (given["grad_out"], None, given["out"], lse, rng_state, *_operands(given))


def _operands(given: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(given[name] for name in _OPERANDS)
