"""Rules of the operators that only move elements: each maps the index into its result to an index into its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from .algebra import size_of
from .expr import Expr
from .interpret import Index, Interpreter, Unsupported, bound_arguments, op_name, plain_name, rule, value_of
from .rules_values import typed

Arguments = dict[str, Any]


def _shape(x: fx.Node) -> Sequence[Any]:
    return value_of(x).shape


@rule("unsqueeze")
def _unsqueeze(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    dim = a["dim"] % len(idx)
    return it.at(a["self"], idx[:dim] + idx[dim + 1 :])


@rule("squeeze")
def _squeeze(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    shape = _shape(a["self"])
    dims = a.get("dim", range(len(shape)))
    dims = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)} if len(shape) else set()
    rest = iter(idx)
    return it.at(a["self"], tuple(it.b.integer(0) if d in dims and it.is_one(n) else next(rest) for d, n in enumerate(shape)))


@rule("expand", "expand_as", "broadcast_to")
def _expand(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    return it.at(a["self"], it.broadcast(a["self"], idx))


@rule("permute", "transpose", "t", "swapaxes", "swapdims", "movedim", "numpy_T", "mT")
def _permute(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    order = _order(node, a, len(idx))
    source: list[Expr] = [it.b.integer(0)] * len(idx)
    for out, original in enumerate(order):
        source[original] = idx[out]
    return it.at(a["self"], tuple(source))


def _order(node: fx.Node, a: Arguments, rank: int) -> list[int]:
    """Which dimension of the input each dimension of the result is."""
    name = plain_name(node)
    order = list(range(rank))
    if name == "permute":
        return [d % rank for d in a["dims"]]
    if name in ("transpose", "swapaxes", "swapdims"):
        x, y = (a[p] % rank for p in (("dim0", "dim1") if "dim0" in a else ("axis0", "axis1")))
        order[x], order[y] = order[y], order[x]
    elif name == "movedim":
        source, target = ([v] if isinstance(v, int) else list(v) for v in (a["source"], a["destination"]))
        moved = {t % rank: s % rank for s, t in zip(source, target, strict=True)}
        rest = iter(d for d in order if d not in moved.values())
        order = [moved[d] if d in moved else next(rest) for d in range(rank)]
    elif name == "mT":
        order[-1], order[-2] = order[-2], order[-1]
    else:
        order.reverse()
    return order


@rule("select")
def _select(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    dim = a["dim"] % (len(idx) + 1)
    return it.at(a["self"], (*idx[:dim], _position(it, a["index"], _shape(a["self"])[dim]), *idx[dim:]))


def _position(it: Interpreter, index: Any, size: Any) -> Expr:
    """An index argument, counted from the end where it is negative."""
    e = it.extent(index)
    if it.b.never_above(it.b.scale(e, -1), 0):
        return e
    if it.b.never_above(e, -1):
        return it.b.add(e, it.b.size(size))
    raise Unsupported("an index whose sign is only known at run time")


@rule("slice", "narrow")
def _slice(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    dim = a.get("dim", 0) % len(idx)
    start, step = _slice_start(it, a, _shape(a["self"])[dim], _shape(node)[dim])
    return it.at(a["self"], (*idx[:dim], it.b.add(it.b.scale(idx[dim], step), start), *idx[dim + 1 :]))


def _slice_start(it: Interpreter, a: Arguments, size: Any, length: Any) -> tuple[Expr, int]:
    """Where a slice of ``length`` elements starts, and its step; a start outside the tensor is clamped as torch does."""
    step = a.get("step", 1)
    if not isinstance(step, int):
        raise Unsupported("a slice whose step is only known at run time")
    start = a.get("start")
    if start is None or (isinstance(start, int) and start == 0):
        return it.b.integer(0), step
    to_the_end = "length" not in a and (a.get("end") is None or (isinstance(a["end"], int) and a["end"] >= 2**62))
    if step == 1 and to_the_end:
        return it.b.size(size_of(size) - size_of(length)), 1
    e = _position(it, start, size)
    if e.is_const and e.payload < 0:
        e = it.b.integer(0)
    return e, step


@rule("flip")
def _flip(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    shape, dims = _shape(node), {d % len(idx) for d in a["dims"]}
    return it.at(a["self"], tuple(it.b.sub(it.b.size(size_of(shape[d]) - 1), i) if d in dims else i for d, i in enumerate(idx)))


# ------------------------------------------------------------------------------------------------------- folded shapes


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as", "ravel")
def _view(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    if "dtype" in a:
        raise Unsupported("a view as another dtype")
    source = a["self"]
    return it.at(source, regroup(it, idx, _shape(node), _shape(source)))


def regroup(it: Interpreter, idx: Index, shape: Sequence[Any], source: Sequence[Any]) -> Index:
    """The index into a tensor of shape ``source`` of the element at ``idx`` of its view of shape ``shape``."""
    result: list[Expr] = [it.b.integer(0)] * len(source)
    for outs, ins in _groups([size_of(n) for n in shape], [size_of(n) for n in source]):
        position = it.b.integer(0)
        for d in outs:
            position = it.b.add(it.b.times(position, it.b.size(shape[d])), idx[d])
        for d in reversed(ins[1:]):
            position, result[d] = it.b.divmod(position, it.b.size(source[d]))
        if ins:
            result[ins[0]] = position
    return tuple(result)


def _groups(shape: list[sympy.Expr], source: list[sympy.Expr]) -> list[tuple[list[int], list[int]]]:
    """Cut two shapes of equal volume into the shortest runs of equal volume; sizes of 1 are left out."""
    outs, ins = ([d for d, n in enumerate(s) if n != 1] for s in (shape, source))
    groups: list[tuple[list[int], list[int]]] = []
    while outs or ins:
        if not outs or not ins:
            raise Unsupported("a view whose sizes do not match")
        o, i = [outs.pop(0)], [ins.pop(0)]
        left, right = shape[o[0]], source[i[0]]
        while (left := sympy.expand(left)) != (right := sympy.expand(right)):
            if outs and _is_smaller(left, right):
                o.append(outs.pop(0))
                left *= shape[o[-1]]
            elif ins and _is_smaller(right, left):
                i.append(ins.pop(0))
                right *= source[i[-1]]
            else:
                raise Unsupported("a view that mixes dimensions of sizes only known at run time")
        groups.append((o, i))
    return groups


def _is_smaller(a: sympy.Expr, b: sympy.Expr) -> bool:
    """Whether ``a`` is a proper divisor of ``b``, or just smaller where both are numbers."""
    if a.is_Integer and b.is_Integer:
        return bool(a < b)
    return bool(sympy.denom(sympy.cancel(b / a)) == 1)


@rule("repeat", "tile")
def _repeat(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    shape = _shape(a["self"])
    own = idx[len(idx) - len(shape) :]
    result = _shape(node)[len(idx) - len(shape) :]
    return it.at(
        a["self"],
        tuple(i if it.same(n, m) else it.b.divmod(i, it.b.size(n))[1] for n, m, i in zip(shape, result, own, strict=True)),
    )


@rule("repeat_interleave")
def _repeat_interleave(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    if a.get("dim") is None or isinstance(value_of_argument(a.get("repeats")), torch.Tensor):
        raise Unsupported("a repeat_interleave over all elements, or with repeats given by a tensor")
    dim = a["dim"] % len(idx)
    return it.at(a["self"], (*idx[:dim], it.b.divmod(idx[dim], it.extent(a["repeats"]))[0], *idx[dim + 1 :]))


def value_of_argument(x: Any) -> Any:
    return value_of(x) if isinstance(x, fx.Node) else x


# ----------------------------------------------------------------------------------------------------- several tensors


@rule("getitem")
def _getitem(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    """One result of unbind, split, chunk, meshgrid or broadcast_tensors."""
    source, which = node.args
    if not isinstance(source, fx.Node) or not isinstance(which, int) or not op_name(source):
        raise Unsupported
    arguments, name = bound_arguments(source), op_name(source)
    if name == "meshgrid":
        operand, indexing = arguments["tensors"][which], arguments.get("indexing", "ij")
        dim = which if indexing != "xy" or which > 1 else 1 - which
        return it.at(operand, (idx[dim],) if value_of(operand).dim() else ())
    if name == "broadcast_tensors":
        return it.arg(arguments["tensors"][which], idx)
    if name not in ("unbind", "split", "split_with_sizes", "chunk", "tensor_split"):
        raise Unsupported(f"`{source.target}` is not understood")
    operand, dim = arguments["self"], arguments.get("dim", 0) % value_of(arguments["self"]).dim()
    if name == "unbind":
        return it.at(operand, (*idx[:dim], it.b.integer(which), *idx[dim:]))
    offset: Any = sympy.Integer(0)
    for piece in value_of(source)[:which]:
        offset += size_of(piece.shape[dim])
    return it.at(operand, (*idx[:dim], it.b.add(idx[dim], it.b.size(offset)), *idx[dim + 1 :]))


@rule("cat", "concat", "concatenate", "stack")
def _cat(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    dim, dtype, stacked = a.get("dim", 0) % len(idx), value_of(node).dtype, plain_name(node) == "stack"
    pieces: list[tuple[Expr, Expr]] = []  # (where the next piece starts, value)
    offset: Any = sympy.Integer(0)
    for x in a["tensors"]:
        inner = () if stacked else (it.b.sub(idx[dim], it.b.size(offset)),)
        value = it.at(x, (*idx[:dim], *inner, *idx[dim + 1 :]))
        offset += 1 if stacked else size_of(_shape(x)[dim])
        pieces.append((it.b.size(offset), typed(it, value, dtype)))
    e = pieces[-1][1]
    for end, value in reversed(pieces[:-1]):
        e = it.b.where(it.b.compare("lt", idx[dim], end), value, e, dtype)
    return e


@rule("constant_pad_nd", "pad")
def _pad(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    if a.get("mode", "constant") != "constant":
        raise Unsupported("padding that repeats elements")
    dtype, source = value_of(node).dtype, a["self"]
    inside, own = it.b.true(), list(idx)
    for n in range(len(a["pad"]) // 2):
        dim = len(idx) - 1 - n
        own[dim] = it.b.sub(idx[dim], it.extent(a["pad"][2 * n]))
        inside = it.b.and_(inside, it.b.compare("ge", own[dim], it.b.integer(0)))
        inside = it.b.and_(inside, it.b.compare("lt", own[dim], it.b.size(_shape(source)[dim])))
    return it.b.where(inside, it.at(source, tuple(own)), typed(it, it.scalar(a.get("value") or 0), dtype), dtype)


@rule("slice_scatter")
def _slice_scatter(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    """What functionalising ``x[..., a:b] = src`` leaves."""
    dim, dtype = a.get("dim", 0) % len(idx), value_of(node).dtype
    length = _shape(a["src"])[dim]
    start, step = _slice_start(it, a, _shape(node)[dim], length)
    if step != 1:
        raise Unsupported("an assignment to a slice with a step")
    position = it.b.sub(idx[dim], start)
    inside = it.b.and_(it.b.compare("ge", position, it.b.integer(0)), it.b.compare("lt", position, it.b.size(length)))
    value = it.arg(a["src"], (*idx[:dim], position, *idx[dim + 1 :]))
    return it.b.where(inside, typed(it, value, dtype), it.at(a["self"], idx), dtype)


@rule("select_scatter")
def _select_scatter(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    dim, dtype = a["dim"] % len(idx), value_of(node).dtype
    chosen = it.b.compare("eq", idx[dim], _position(it, a["index"], _shape(node)[dim]))
    value = typed(it, it.arg(a["src"], idx[:dim] + idx[dim + 1 :]), dtype)
    return it.b.where(chosen, value, it.at(a["self"], idx), dtype)


# ---------------------------------------------------------------------------------------------------- indexing by data


def _wrapped(it: Interpreter, e: Expr, size: Any) -> Expr:
    """An index that is data: negative ones count from the end."""
    if it.b.never_above(it.b.scale(e, -1), 0):
        return e
    return it.b.where(it.b.compare("lt", e, it.b.integer(0)), it.b.add(e, it.b.size(size)), e, torch.int64)


@rule("index")
def _index(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    source, shape = a["self"], _shape(a["self"])
    indices = [*a["indices"], *[None] * (len(shape) - len(a["indices"]))]
    tensors = {d: x for d, x in enumerate(indices) if x is not None}
    if any(value_of(x).dtype in (torch.bool, torch.uint8) for x in tensors.values()):
        raise Unsupported("indexing by a boolean mask")
    rank = max(value_of(x).dim() for x in tensors.values())
    where = sorted(tensors)
    first = where[0] if where == list(range(where[0], where[0] + len(where))) else 0
    own, rest = idx[first : first + rank], iter(idx[:first] + idx[first + rank :])
    return it.at(
        source,
        tuple(_wrapped(it, it.arg(tensors[d], own), n) if d in tensors else next(rest) for d, n in enumerate(shape)),
    )


@rule("gather")
def _gather(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    if not idx:
        raise Unsupported
    dim = a["dim"] % len(idx)
    return it.at(a["self"], (*idx[:dim], it.at(a["index"], idx), *idx[dim + 1 :]))


@rule("index_select")
def _index_select(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    dim = a["dim"] % len(idx)
    return it.at(a["self"], (*idx[:dim], it.arg(a["index"], (idx[dim],)), *idx[dim + 1 :]))
