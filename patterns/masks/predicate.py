"""What a proof claims, in a form that can be compared, read, put into a graph, and evaluated."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from .algebra import size_of
from .expr import Expr, intern_expr, is_integer, tensor_name, text
from .lower import Lowering, fake_of, fx_call, run

__all__ = ["Obligation", "Predicate"]

aten = torch.ops.aten
SizeArg = int | torch.SymInt | fx.Node


@dataclass(frozen=True)
class Predicate:
    """A condition on (batch row, position).

    Two predicates are equal when their simplified expressions are: ``mask.bool()`` and ``mask != 0`` are, and so are the key
    side and the query side of ``mask[:, :, None] & mask[:, None, :]``.

    Attributes:
        expr: a boolean expression over the index variables ``b`` and ``k``.
        axis: the letter that stands for the position in `text`: "k" for keys, "q" for queries.
    """

    expr: Expr
    axis: str = field(default="k", compare=False)

    @property
    def text(self) -> str:
        """The condition as a user would write it: ``attention_mask[b, k] != 0``."""
        parts = [text(p) for p in _conjuncts(self.expr)]
        joined = " and ".join(parts if len(parts) == 1 else [f"({p})" if " or " in p else p for p in parts])
        return joined if self.axis == "k" else _renamed(self.expr, self.axis)

    @property
    def leaves(self) -> set[fx.Node]:
        """The graph values that the condition reads."""
        return set(self.expr.loads)

    @property
    def is_prefix(self) -> bool:
        """Whether the valid positions of every row are the first ones by construction, as in ``k < lengths[b]``."""
        return all(_is_prefix(p) for p in _conjuncts(self.expr))

    def emit(self, graph: fx.Graph, b: SizeArg, s: SizeArg, *, device: torch.device | None = None) -> fx.Node:
        """Insert nodes that compute the condition at the graph's insertion point.

        Args:
            graph: the graph of the leaves; all of `leaves` must come before the insertion point.
            b: number of batch rows; a number, a `SymInt`, or a node that holds one.
            s: number of positions, likewise.
            device: where to compute a condition that reads no tensor; otherwise it is computed where its leaves are.

        Returns:
            A node with a bool tensor (B, S); it and all nodes before it carry their fake value in ``meta["val"]``.
        """
        fake_mode = _fake_mode(graph, self.expr.loads)
        finder = _SizeFinder(graph, fx_call(graph, fake_mode))
        lowered = _Grid(fx_call(graph, fake_mode), finder(b), finder(s), device or _device(self.expr.loads))
        return lowered.compute(self.expr, leaf=lambda n: n, size=finder)

    def evaluate(self, env: Mapping[fx.Node, torch.Tensor], b: int, s: int) -> torch.Tensor:
        """The condition on real tensors: a bool tensor (b, s).

        ``env`` gives the tensor behind each leaf, and behind inputs whose sizes the condition mentions.
        """
        sizes = _sizes_of(env)
        grid = _Grid(run, b, s, next((t.device for t in env.values()), torch.device("cpu")))
        return grid.compute(self.expr, leaf=env.__getitem__, size=lambda e: int(e.subs(sizes)))


@dataclass(frozen=True)
class Obligation:
    """A fact about data that a proof presumes: every value of ``leaf`` is one of ``values``."""

    leaf: fx.Node
    values: tuple[float, ...]

    @property
    def text(self) -> str:
        """The fact in words."""
        return f"every value of `{tensor_name(self.leaf)}` is {' or '.join(_number(v) for v in self.values)}"

    def emit(self, graph: fx.Graph) -> fx.Node:
        """Insert nodes that compute the fact at the insertion point; returns a node with a 0-d bool tensor."""
        return self._check(fx_call(graph, _fake_mode(graph, {self.leaf})), self.leaf)

    def evaluate(self, env: Mapping[fx.Node, torch.Tensor]) -> bool:
        """Whether the fact holds on real tensors."""
        return bool(self._check(run, env[self.leaf]))

    def _check(self, call: Callable[..., Any], leaf: Any) -> Any:
        allowed = [call(aten.eq.Scalar, leaf, v) for v in self.values]
        either = allowed[0]
        for other in allowed[1:]:
            either = call(aten.logical_or.default, either, other)
        return call(aten.all.default, either)


# ------------------------------------------------------------------------------------------------------------- helpers


def _number(value: float) -> str:
    return ("-inf" if value < 0 else "inf") if math.isinf(value) else f"{value:g}"


def _conjuncts(e: Expr) -> list[Expr]:
    return [p for a in e.args for p in _conjuncts(a)] if e.op == "and" else [e]


def _renamed(e: Expr, name: str) -> str:
    """The text with the position called ``name``."""
    memo: dict[Expr, Expr] = {}

    def walk(x: Expr) -> Expr:
        if x not in memo:
            payload = name if x.op == "index" and x.payload == "k" else x.payload
            memo[x] = intern_expr(x.op, tuple(walk(a) for a in x.args), payload, x.dtype)
        return memo[x]

    return Predicate(walk(e)).text


def _is_prefix(e: Expr) -> bool:
    """Whether the condition holds for the first positions of each row and no others."""
    if "k" not in e.free:
        return True
    if e.op == "int_le":
        x = e.args[0]
        terms = dict(zip(x.args, x.payload[0], strict=True)) if x.op == "linear" else {x: 1}
        return all((t.op == "index" and c > 0) if "k" in t.free else True for t, c in terms.items())
    if e.op in ("lt", "le"):
        low, high = e.args
        while low.op == "cast" and is_integer(low.args[0].dtype) and low.dtype in (torch.float32, torch.float64):
            low = low.args[0]
        return low.op == "index" and "k" not in high.free
    return False


def _device(leaves: frozenset[fx.Node]) -> torch.device:
    values = [n.meta["val"] for n in leaves]
    return next((v.device for v in sorted(values, key=lambda v: -v.dim())), torch.device("cpu"))


def _fake_mode(graph: fx.Graph, leaves: Any) -> Any:
    """The fake mode of the leaves, or of any value of the graph."""
    for node in [*leaves, *graph.nodes]:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode
    raise ValueError("graph: no node carries a fake tensor in meta['val']")


class _SizeFinder:
    """Finds or makes, in a graph, a node for a size, from the inputs of the graph."""

    def __init__(self, graph: fx.Graph, call: Callable[..., Any]) -> None:
        self.graph, self.call = graph, call

    def __call__(self, size: Any) -> Any:
        if isinstance(size, (int, fx.Node)):
            return size
        expr = size_of(size)
        if expr.is_Integer:
            return int(expr)
        found = self._from_inputs(expr)
        if found is not None:
            return found
        power = isinstance(expr, sympy.Pow) and expr.exp.is_Integer and expr.exp > 0  # batch rows times sentences, say
        if power or isinstance(expr, (sympy.Add, sympy.Mul)):
            combine = operator.add if isinstance(expr, sympy.Add) else operator.mul
            first, *rest = (self(a) for a in ([expr.base] * int(expr.exp) if power else expr.args))
            for other in rest:
                first = self.call(combine, first, other)
            return first
        raise ValueError(f"the size {expr} is not that of any input of the graph")

    def _from_inputs(self, expr: sympy.Expr) -> fx.Node | None:
        inputs = [n for n in self.graph.nodes if n.op == "placeholder"]
        for node in inputs:
            if isinstance(v := node.meta.get("val"), torch.SymInt) and size_of(v) == expr:
                return node
        for node in inputs:
            if isinstance(v := node.meta.get("val"), torch.Tensor):
                for dim, n in enumerate(v.shape):
                    if isinstance(n, torch.SymInt) and size_of(n) == expr:
                        return self.call(aten.sym_size.int, node, dim)
        return None


def _sizes_of(env: Mapping[fx.Node, torch.Tensor]) -> dict[sympy.Expr, int]:
    return {
        n.node.expr: real
        for node, tensor in env.items()
        if isinstance(node.meta.get("val"), torch.Tensor)
        for n, real in zip(node.meta["val"].shape, tensor.shape, strict=True)
        if isinstance(n, torch.SymInt)
    }


class _LazyAxis:
    """An index variable whose positions are made when they are first needed."""

    def __init__(self, grid: _Grid, size: Any, dim: int) -> None:
        self.grid, self.size, self.dim = grid, size, dim

    @cached_property
    def position(self) -> Any:
        iota = self.grid.call(aten.arange.default, self.size, dtype=torch.int64, device=self.grid.device)
        return self.grid.call(aten.unsqueeze.default, iota, 1) if self.dim == 0 else iota


class _Grid:
    """Computes conditions over (B, S)."""

    def __init__(self, call: Callable[..., Any], b: Any, s: Any, device: torch.device) -> None:
        self.call, self.shape, self.device = call, [b, s], device

    def compute(self, e: Expr, leaf: Callable[[fx.Node], Any], size: Callable[[sympy.Expr], Any]) -> Any:
        axes: dict[str, Any] = {"b": _LazyAxis(self, self.shape[0], 0), "k": _LazyAxis(self, self.shape[1], 1)}
        lower = Lowering(self.call, leaf, axes, size, self.device)
        if e.is_const:
            return self.call(aten.full.default, self.shape, e.payload, dtype=torch.bool, device=self.device)
        value = lower.tensor(e)
        if _is_shape(fake_of(value).shape, [fake_of(n) for n in self.shape]):
            return value
        return self.call(aten.expand.default, value, self.shape)


def _is_shape(actual: Sequence[Any], wanted: Sequence[Any]) -> bool:
    return len(actual) == len(wanted) and all(size_of(a) == size_of(w) for a, w in zip(actual, wanted, strict=True))
