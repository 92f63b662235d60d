"""Abstract interpretation: what a node of a pre-dispatch ATen graph holds at a given index, as an index expression.

Interpretation runs on demand, from the mask towards the inputs: the element ``[b, 0, q, k]`` of ``m.unsqueeze(1)`` is the
element ``[b, q, k]`` of ``m``, and so on until inputs, constants and aranges are reached.  Each operator has a rule
(`rules_values.py` for what computes, `rules_views.py` for what only moves elements); a value without a rule becomes a *leaf*:
it is read, not looked into, and `Interpreter.why` keeps the reason.
"""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import torch
from torch import fx

from ..registry import entering
from .algebra import Builder, size_of
from .expr import Expr, is_integer

__all__ = [
    "Index",
    "Interpreter",
    "Unsupported",
    "bound_arguments",
    "op_name",
    "plain_name",
    "rule",
    "value_of",
    "where_in_source",
]

log = logging.getLogger(__name__)

Index = tuple[Expr, ...]
Rule = Callable[["Interpreter", fx.Node, dict[str, Any], Index], Expr]

RULES: dict[str, Rule] = {}
rule = entering(RULES)


class Unsupported(Exception):
    """A rule cannot express this call; the value becomes a leaf, and the message says why."""


def value_of(node: fx.Node) -> Any:
    """The fake value of a node."""
    return node.meta.get("val", node.meta.get("example_value"))


def op_name(node: fx.Node) -> str:
    """The operator's name without namespace and overload; "" for anything but an ATen call."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    return target._opname.strip("_") if target._opname.startswith("__") else target._opname


def plain_name(node: fx.Node) -> str:
    """The name under which the node's rule is registered: in-place operators go by their functional namesake."""
    if node.op == "get_attr" or node.target is operator.getitem:
        return "get_attr" if node.op == "get_attr" else "getitem"
    name = op_name(node)
    if name in ("iand", "ior", "ixor"):
        return name[1:]
    return name if name in RULES else name.removesuffix("_")


def where_in_source(node: fx.Node) -> str:
    """`` (model.py:12)``: the innermost line outside PyTorch that made the node; "" for inputs or where it is not known."""
    if node.op != "call_function":
        return ""
    frames = re.findall(r'File "([^"]*)", line (\d+)', node.meta.get("stack_trace") or "")
    outside = [frame for frame in frames if "torch" not in PurePath(frame[0]).parts]
    if not frames:
        return ""
    path, line = (outside or frames)[-1]
    return f" ({PurePath(path).name}:{line})"


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by the names of its schema, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound.update(zip((a.name for a in schema.arguments), node.args, strict=False))
    bound.update(node.kwargs)
    return bound


class Interpreter:
    """Interprets the nodes of one graph.

    Args:
        builder: makes the expressions, and knows the sizes of b, h, q and k.
        opaque: nodes whose storage is written somewhere: they are never looked into.
    """

    def __init__(self, builder: Builder, opaque: frozenset[fx.Node] = frozenset()) -> None:
        self.b = builder
        self.opaque = opaque
        self.why: dict[fx.Node, str] = {}
        self.written: set[fx.Node] = set()
        self.visited: dict[fx.Node, None] = {}
        self.depth = 0
        self._memo: dict[tuple[fx.Node, Index], Expr] = {}
        self._canonical: dict[fx.Node, fx.Node] | None = None

    # -------------------------------------------------------------------------------------------------- interpretation

    def at(self, node: fx.Node, idx: Index) -> Expr:
        """The element of ``node`` at ``idx``, one expression for each of its dimensions."""
        key = (node, idx)
        found = self._memo.get(key)
        if found is None:
            self.visited[node] = None
            found = self._memo[key] = self._at(node, idx)
        return found

    def _at(self, node: fx.Node, idx: Index) -> Expr:
        if node in self.opaque or not _settled(node):
            self.written.add(node)
            return self.leaf(node, idx, "it is modified in place")
        handler = RULES.get(plain_name(node))
        if handler is None or not isinstance(value_of(node), torch.Tensor):
            return self.leaf(node, idx, self._unknown(node))
        try:
            arguments = bound_arguments(node) if op_name(node) else {}
            return self.b.cast(handler(self, node, arguments, idx), value_of(node).dtype)
        except Unsupported as error:
            return self.leaf(node, idx, str(error) or self._unknown(node))
        except RecursionError:
            raise
        except Exception:
            # A leaf is always right: a rule that stumbles costs a proof, not the compilation.
            log.debug("the rule of %s failed", node.format_node(), exc_info=True)
            return self.leaf(node, idx, self._unknown(node))

    @staticmethod
    def _unknown(node: fx.Node) -> str:
        if node.op != "call_function":
            return ""
        return f"`{node.target}`{where_in_source(node)} is not understood"

    def leaf(self, node: fx.Node, idx: Index, why: str = "") -> Expr:
        """Read the node without looking into it."""
        if why:
            self.why.setdefault(node, why)
        value = value_of(node)
        if not isinstance(value, torch.Tensor):
            raise Unsupported(f"`{node}` is not a tensor")
        return self.b.load(self._representative(node), idx, value.dtype)

    # ------------------------------------------------------------------------------------------------------- arguments

    def arg(self, x: Any, idx: Index) -> Expr:
        """An operand of a pointwise operator whose result is asked for at ``idx``: broadcast, or a Python number."""
        if isinstance(x, fx.Node) and isinstance(value_of(x), torch.Tensor):
            return self.at(x, self.broadcast(x, idx))
        return self.scalar(x)

    def broadcast(self, x: fx.Node, idx: Index) -> Index:
        """The index into ``x`` of the element that broadcasting puts at ``idx``."""
        shape = value_of(x).shape
        own = idx[len(idx) - len(shape) :]
        return tuple(self.b.integer(0) if self.is_one(n) else i for n, i in zip(shape, own, strict=True))

    def scalar(self, x: Any) -> Expr:
        """A Python number or a size."""
        x = value_of(x) if isinstance(x, fx.Node) else x
        if isinstance(x, (bool, int, float)):
            return self.b.const(x) if not isinstance(x, bool) else self.b.const(x, torch.bool)
        if isinstance(x, torch.SymInt):
            return self.b.size(x)
        raise Unsupported(f"a scalar argument ({x}) is only known at run time")

    def extent(self, x: Any) -> Expr:
        """A size argument as an integer expression."""
        e = self.scalar(x)
        if not is_integer(e.dtype) and not (e.is_const and isinstance(e.payload, int)):
            raise Unsupported("a size argument is not an integer")
        return self.b.integer(int(e.payload)) if e.is_const else e

    @staticmethod
    def is_one(size: Any) -> bool:
        return isinstance(size, int) and size == 1

    @staticmethod
    def same(a: Any, b: Any) -> bool:
        """Whether two sizes are known to be equal (no guard is installed)."""
        return bool(size_of(a) == size_of(b))

    @staticmethod
    def common_dtype(*operands: Any) -> torch.dtype:
        """The dtype in which torch compares or computes these operands."""
        values = [value_of(x) if isinstance(x, fx.Node) else x for x in operands]
        values = [1 if isinstance(v, torch.SymInt) else v for v in values]
        return torch.result_type(*values)

    # ------------------------------------------------------------------------------------------------ equal leaf values

    def _representative(self, node: fx.Node) -> fx.Node:
        """The first node of the graph that computes the same value (``mask.sum(1)`` written twice is one leaf)."""
        if op_name(node) not in _SUMMARIES:
            return node
        if self._canonical is None:
            self._canonical = self._number_values(node.graph)
        return self._canonical.get(node, node)

    def _number_values(self, graph: fx.Graph) -> dict[fx.Node, fx.Node]:
        canonical: dict[fx.Node, fx.Node] = {}
        first: dict[Any, fx.Node] = {}
        for node in graph.nodes:
            involved = (node, *node.all_input_nodes)
            if op_name(node) not in _PURE or any(n in self.opaque or not _settled(n) for n in involved):
                continue
            arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: canonical.get(n, n))
            canonical[node] = first.setdefault((node.target, repr(arguments)), node)
        return canonical


# What masks are computed with and is not looked into, and the functions of their arguments alone that may lead up to it.
_SUMMARIES = frozenset({"sum", "cumsum", "any", "all", "max", "min", "amax", "amin", "argmax", "argmin", "count_nonzero", "mean"})
_PURE = _SUMMARIES | {
    *("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "rsub", "div", "clamp", "logical_not", "bitwise_not"),
    *("to", "_to_copy", "unsqueeze", "squeeze", "view", "reshape", "expand", "slice", "select"),
}


def _writes_to(user: fx.Node, node: fx.Node) -> bool:
    """Whether ``user`` is an in-place operator on ``node``."""
    target = user.target
    if user.op != "call_function" or not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return False
    if target._opname == "detach_":
        return False
    written = [a.name for a in target._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    arguments = bound_arguments(user)
    return any(arguments.get(name) is node for name in written)


def _settled(node: fx.Node) -> bool:
    """Whether nobody writes to the node before its value is read (writes to views of it are the caller's business).

    An in-place operator on fresh memory that it alone sees reads the value before it writes: it is a functional one.
    """
    alone = len(node.users) == 1 and _is_fresh(node)
    return alone or not any(_writes_to(user, node) for user in node.users)


def _is_fresh(node: fx.Node) -> bool:
    """Whether the node's value is new memory, or such memory after an in-place operator that only this node shows."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    if target._schema.is_mutable:
        base = node.args[0] if node.args else None
        return isinstance(base, fx.Node) and set(base.users) == {node} and _is_fresh(base)
    name = target._opname
    return name not in _MAYBE_VIEWS and all(r.alias_info is None for r in target._schema.returns)


_MAYBE_VIEWS = frozenset({"to", "contiguous", "reshape", "flatten", "type_as", "expand_as", "view_as", "reshape_as", "meshgrid"})
