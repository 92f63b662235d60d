"""From an index expression back to tensor operators.

One walk serves three uses, which differ only in `call`: with `run` the operators are executed on real tensors (reference
evaluation, truth tables, constant folding); with `fx_call` they are inserted into a graph, each with its fake value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import sympy
import torch
from torch import fx

from .expr import Expr, is_integer

__all__ = ["Axis", "Lowering", "fake_of", "fold", "fx_call", "run"]

aten = torch.ops.aten
Call = Callable[..., Any]

_BINARY: dict[str, Any] = {
    "and": aten.logical_and.default,
    "or": aten.logical_or.default,
    "xor": aten.logical_xor.default,
    "add": aten.add.Tensor,
    "sub": aten.sub.Tensor,
    "mul": aten.mul.Tensor,
    "times": aten.mul.Tensor,
    "div": aten.div.Tensor,
    "floordiv": aten.floor_divide.default,
    "mod": aten.remainder.Tensor,
    "max": aten.maximum.default,
    "min": aten.minimum.default,
}
# The comparison, and the one that says the same with the operands swapped.
_COMPARE: dict[str, tuple[Any, Any]] = {
    "lt": (aten.lt, aten.gt),
    "le": (aten.le, aten.ge),
    "eq": (aten.eq, aten.eq),
}
_TAKES_NUMBERS = frozenset({"add", "sub", "mul", "div", "times"})
_UNARY: dict[str, Any] = {
    "not": aten.logical_not.default,
    "neg": aten.neg.default,
    "abs": aten.abs.default,
    "log": aten.log.default,
}


def run(target: Any, *args: Any, **kwargs: Any) -> Any:
    """Execute the operator."""
    return target(*args, **kwargs)


def fake_of(x: Any) -> Any:
    """The fake value behind a node; anything else is itself."""
    return x.meta["val"] if isinstance(x, fx.Node) else x


def fx_call(graph: fx.Graph, fake_mode: Any) -> Call:
    """A `call` that inserts the operator at the graph's insertion point and computes its fake value."""

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = graph.call_function(target, args, kwargs)
        fake_args, fake_kwargs = fx.node.map_aggregate((args, kwargs), fake_of)
        with fake_mode:
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        return node

    return call


def fold(op: str, operands: Sequence[Expr], dtype: torch.dtype) -> Any:
    """The number that ``op`` gives on constants, in the arithmetic of ``dtype``; Python numbers are weak as torch has them."""
    target = _BINARY.get(op) or _UNARY[op]
    weak = len(operands) == 2 and op in _TAKES_NUMBERS and operands[1].dtype is None and operands[0].dtype is not None
    tensors = [torch.full((1,), e.payload, dtype=e.dtype or dtype, device="cpu") for e in operands[: 1 if weak else None]]
    return target(*tensors, *(e.payload for e in operands[len(tensors) :])).to(dtype).item()


class Axis(Protocol):
    """An index variable as a tensor: ``position`` broadcasts against the other axes, ``size`` is how many there are."""

    @property
    def position(self) -> Any: ...

    @property
    def size(self) -> Any: ...


class Lowering:
    """Lowers expressions through ``call``, each sub-expression once.

    Args:
        call: executes or records ``call(target, *args, **kwargs)``.
        leaf: the tensor behind a leaf node.
        axes: the index variables, in the order of the dimensions of the result.
        size: the value of a symbolic size.
        device: where new tensors live.
        known: values of whole sub-expressions, which are then not looked into.
    """

    def __init__(
        self,
        call: Call,
        leaf: Callable[[fx.Node], Any],
        axes: Mapping[str, Axis],
        size: Callable[[sympy.Expr], Any],
        device: torch.device,
        known: Mapping[Expr, Any] | None = None,
    ) -> None:
        self.call, self.leaf, self.axes, self.size, self.device = call, leaf, axes, size, device
        self.values: dict[Expr, Any] = dict(known or {})

    def __call__(self, e: Expr) -> Any:
        """The value of ``e``: a tensor (or node) that broadcasts over the axes, or a number."""
        found = self.values.get(e)
        if found is None:
            found = self.values[e] = self._lower(e)
        return found

    def tensor(self, e: Expr) -> Any:
        """The value of ``e`` as a tensor: operators take numbers only as their second operand."""
        value = self(e)
        if isinstance(fake_of(value), torch.Tensor):
            return value
        dtype = e.dtype or (torch.float64 if isinstance(value, float) else torch.int64)
        return self.call(aten.scalar_tensor.default, value, dtype=dtype, device=self.device)

    def _lower(self, e: Expr) -> Any:
        op = e.op
        if op == "const":
            return e.payload
        if op == "index":
            return self.axes[e.payload].position
        if op == "sym":
            return self.size(e.payload)
        if op == "load":
            return self._load(e)
        if op == "linear":
            return self._linear(e)
        if op == "where":
            branch = self._widened if is_integer(e.dtype) else self.tensor
            return self.call(aten.where.self, self.tensor(e.args[0]), branch(e.args[1]), branch(e.args[2]))
        if op == "cast":
            return self.call(aten._to_copy.default, self.tensor(e.args[0]), dtype=e.dtype)
        if op in ("int_le", "int_eq"):
            return self._compare_integers(e, negated=False)
        if op == "not" and e.args[0].op in ("int_le", "int_eq"):
            return self._compare_integers(e.args[0], negated=True)
        if op in _UNARY:
            return self.call(_UNARY[op], self.tensor(e.args[0]))
        if op in _COMPARE:
            return self._compare(e)
        return self._binary(e)

    def _compare_integers(self, e: Expr, *, negated: bool) -> Any:
        x, bound = e.args[0], e.args[1].payload
        packet = (aten.gt if negated else aten.le) if e.op == "int_le" else (aten.ne if negated else aten.eq)
        if x in self.values or x.op != "linear" or sorted(x.payload[0]) != [-1, 1] or x.payload[1]:
            return self.call(packet.Scalar, self.tensor(x), bound)
        # a - b <= -1 is a < b, without the subtraction.
        (a, b) = x.args if x.payload[0] == (1, -1) else reversed(x.args)
        if e.op == "int_le" and bound == -1:
            packet, bound = (aten.ge if negated else aten.lt), 0
        other = self._widened(b)
        return self.call(packet.Tensor, self._widened(a), self.call(aten.add.Tensor, other, bound) if bound else other)

    def _compare(self, e: Expr) -> Any:
        (a, b), (packet, swapped) = e.args, _COMPARE[e.op]
        if a.is_const:
            a, b, packet = b, a, swapped
        return self.call(packet.Scalar if b.is_const else packet.Tensor, self.tensor(a), self(b))

    def _binary(self, e: Expr) -> Any:
        a, b = e.args
        if e.op == "mod" and b.is_const:
            return self.call(aten.remainder.Scalar, self.tensor(a), b.payload)
        return self.call(_BINARY[e.op], self.tensor(a), self(b) if e.op in _TAKES_NUMBERS else self.tensor(b))

    def _linear(self, e: Expr) -> Any:
        coefs, const = e.payload
        total: Any = None
        for term, coef in zip(e.args, coefs, strict=True):
            value = self._widened(term)
            if total is None:
                total = value if coef == 1 else self.call(aten.mul.Tensor, value, coef)
            else:
                total = self.call(aten.add.Tensor, total, value, **({} if coef == 1 else {"alpha": coef}))
        return self.call(aten.add.Tensor, total, const) if const else total

    def _widened(self, e: Expr) -> Any:
        value = self.tensor(e)
        return value if fake_of(value).dtype is torch.int64 else self.call(aten._to_copy.default, value, dtype=torch.int64)

    # -------------------------------------------------------------------------------------------------------- loads

    def _load(self, e: Expr) -> Any:
        """Read the leaf at its index expressions, as a view where they are plain positions."""
        source, idx = self.leaf(e.payload), e.args
        if not idx:
            return source
        shape = fake_of(source).shape
        names = [i.payload for i in idx if i.op == "index"]
        plain = all(
            i.is_const or (i.op == "index" and _same(shape[d], fake_of(self.axes[i.payload].size))) for d, i in enumerate(idx)
        )
        if plain and len(set(names)) == len(names):
            return self._view(source, idx)
        positions = [self._clamped(i, source, d) for d, i in enumerate(idx)]
        return self.call(aten.index.Tensor, source, positions)

    def _view(self, source: Any, idx: Sequence[Expr]) -> Any:
        names, dim = [], 0
        for i in idx:
            if i.is_const:
                source = self.call(aten.select.int, source, dim, i.payload)
            else:
                names.append(i.payload)
                dim += 1
        rank = {name: position for position, name in enumerate(self.axes)}
        order = sorted(range(len(names)), key=lambda j: rank[names[j]])
        if order != list(range(len(names))):
            source = self.call(aten.permute.default, source, order)
        first = min((rank[n] for n in names), default=len(rank))
        for name, position in rank.items():
            if name not in names and position > first:
                source = self.call(aten.unsqueeze.default, source, position - first)
        return source

    def _clamped(self, i: Expr, source: Any, dim: int) -> Any:
        """The index, kept inside the tensor: where it would fall outside, a condition hides what it reads."""
        position = self._widened(i)
        if i.is_const:
            return position
        last = fake_of(source).shape[dim]
        if isinstance(source, fx.Node) and not isinstance(last, int):
            last = self.call(operator.sub, self.call(aten.sym_size.int, source, dim), 1)
        else:
            last = int(last) - 1
        return self.call(aten.clamp.default, position, 0, last)


def _same(a: Any, b: Any) -> bool:
    exprs = [x.node.expr if isinstance(x, torch.SymInt) else sympy.Integer(x) for x in (a, b)]
    return bool(exprs[0] == exprs[1])
