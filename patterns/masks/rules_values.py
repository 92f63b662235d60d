"""Rules of the operators that compute: constants, arithmetic, comparisons, logic, selection, casts, reductions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from .expr import Expr, is_integer, parts
from .interpret import Index, Interpreter, Unsupported, plain_name, rule, value_of

Arguments = dict[str, Any]

# ------------------------------------------------------------------------------------------------------------ constants


@rule("ones", "ones_like", "new_ones")
def _ones(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    return it.b.const(1, value_of(node).dtype)


@rule("zeros", "zeros_like", "new_zeros", "zero")
def _zeros(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    return it.b.const(0, value_of(node).dtype)


@rule("full", "full_like", "new_full", "scalar_tensor", "fill")
def _full(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    fill = a["fill_value"] if "fill_value" in a else a.get("value", a.get("s"))
    return typed(it, it.arg(fill, ()), value_of(node).dtype)


@rule("arange")
def _arange(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    start, step = it.scalar(a.get("start", 0)), it.scalar(a.get("step", 1))
    if any(isinstance(x.payload, float) for x in (start, step) if x.is_const):
        raise Unsupported("an arange with fractional steps")
    return it.b.add(it.b.times(it.b.cast(step, torch.int64), idx[0]), it.b.cast(start, torch.int64))


@rule("eye")
def _eye(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    return it.b.compare("eq", idx[0], idx[1])


@rule("get_attr")
def _get_attr(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    """A number that tracing turned into a constant tensor (``torch.tensor(-1e4)``)."""
    module = node.graph.owning_module
    constant = getattr(module, str(node.target), None) if module is not None else None
    if not str(node.target).startswith("_tensor_constant") or not isinstance(constant, torch.Tensor):
        raise Unsupported
    if constant.dim() != 0 or constant.device.type != "cpu" or isinstance(constant, torch.nn.Parameter):
        raise Unsupported
    return it.b.const(constant.item(), constant.dtype)


def typed(it: Interpreter, e: Expr, dtype: torch.dtype) -> Expr:
    """``e`` in ``dtype``; a number that does not fit is an error in torch too."""
    try:
        return it.b.cast(e, dtype)
    except RuntimeError as error:
        raise Unsupported(str(error)) from error


# ----------------------------------------------------------------------------------------------------------- the same


@rule("clone", "contiguous", "alias", "detach", "detach_", "lift_fresh", "lift_fresh_copy", "positive")
def _same(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    return it.at(a["self"], idx)


@rule("to", "to_copy", "_to_copy", "type_as")
def _cast(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    return it.b.cast(it.at(a["self"], idx), value_of(node).dtype)


@rule("copy")
def _copy(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    return typed(it, it.arg(a["src"], idx), value_of(node).dtype)


@rule("dropout", "native_dropout", "alpha_dropout", "feature_dropout")
def _dropout(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    if a.get("train") and a.get("p"):
        raise Unsupported("random dropout is applied to the mask")
    return it.at(a["input"] if "input" in a else a["self"], idx)


# --------------------------------------------------------------------------------------------------------- arithmetic

_ARITHMETIC = {"add": "add", "sub": "sub", "mul": "mul", "maximum": "max", "minimum": "min", "max": "max", "min": "min"}
_ON_BOOL = {"add": "or_", "mul": "and_", "max": "or_", "min": "and_"}


@rule("add", "sub", "rsub", "mul", "maximum", "minimum", "max", "min", "multiply", "subtract")
def _arithmetic(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    if "other" not in a or a.get("alpha", 1) != 1:
        raise Unsupported
    left, right = it.arg(a["self"], idx), it.arg(a["other"], idx)
    name = plain_name(node)
    if name == "rsub":
        left, right, name = right, left, "sub"
    op = _ARITHMETIC.get(name, {"multiply": "mul", "subtract": "sub"}.get(name, ""))
    # In place, the result is rounded to the dtype of the tensor that is written; the arithmetic is that of both.
    return arithmetic(it, op, left, right, it.common_dtype(a["self"], a["other"]))


def arithmetic(it: Interpreter, op: str, left: Expr, right: Expr, dtype: torch.dtype) -> Expr:
    if dtype is torch.bool:
        if op not in _ON_BOOL:
            raise Unsupported
        return getattr(it.b, _ON_BOOL[op])(it.b.cast(left, dtype), it.b.cast(right, dtype))
    return it.b.arith(op, (left, right), dtype)


@rule("bmm", "matmul", "mm", "outer")
def _product(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    """The product of a column and a row, as in ``mask[:, :, None] @ mask[:, None, :]``: nothing is summed."""
    left, right = a["self"], next(a[name] for name in ("mat2", "other", "vec2") if name in a)
    columns: Index = idx[:1]
    rows: Index = idx[1:]
    if plain_name(node) != "outer":
        if min(value_of(left).dim(), value_of(right).dim()) < 2 or not it.is_one(value_of(left).shape[-1]):
            raise Unsupported
        columns = it.broadcast(left, (*idx[:-1], it.b.integer(0)))
        rows = it.broadcast(right, (*idx[:-2], it.b.integer(0), idx[-1]))
    return arithmetic(it, "mul", it.at(left, columns), it.at(right, rows), value_of(node).dtype)


@rule("einsum")
def _einsum(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    """``einsum("bi,bj->bij", mask, mask)``: a product in which nothing is summed."""
    inputs, arrow, output = a["equation"].replace(" ", "").partition("->")
    if not arrow or "." in inputs or not set(inputs) - {","} <= set(output):
        raise Unsupported
    place = dict(zip(output, idx, strict=True))
    e: Expr | None = None
    for letters, x in zip(inputs.split(","), a["tensors"], strict=True):
        own = (it.b.integer(0) if it.is_one(n) else place[c] for c, n in zip(letters, value_of(x).shape, strict=True))
        factor = it.at(x, tuple(own))
        e = factor if e is None else arithmetic(it, "mul", e, factor, value_of(node).dtype)
    assert e is not None
    return e


@rule("div", "true_divide", "floor_divide", "divide")
def _div(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    left, right, dtype = it.arg(a["self"], idx), it.arg(a["other"], idx), value_of(node).dtype
    rounding = "floor" if plain_name(node) == "floor_divide" else a.get("rounding_mode")
    if rounding is None:
        return it.b.arith("div", (left, right), dtype)
    return _divmod(it, left, right, dtype, rounding)[0]


@rule("remainder", "fmod")
def _remainder(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    rounding = "floor" if plain_name(node) == "remainder" else "trunc"
    return _divmod(it, it.arg(a["self"], idx), it.arg(a["other"], idx), value_of(node).dtype, rounding)[1]


def _divmod(it: Interpreter, left: Expr, right: Expr, dtype: torch.dtype, rounding: str) -> tuple[Expr, Expr]:
    if not is_integer(dtype) or not is_integer(left.dtype) or not right.is_const or int(right.payload) <= 0:
        raise Unsupported
    if rounding != "floor" and not it.b.never_above(it.b.scale(left, -1), 0):
        raise Unsupported
    return it.b.divmod(left, it.b.integer(int(right.payload)))


@rule("neg", "abs", "negative", "absolute", "log")
def _unary(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    op = {"negative": "neg", "absolute": "abs"}.get(name := plain_name(node), name)
    return it.b.arith(op, (it.at(a["self"], idx),), value_of(node).dtype)


@rule("clamp", "clip", "clamp_min", "clamp_max")
def _clamp(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    e, dtype = it.at(a["self"], idx), value_of(node).dtype
    for op, bound in (("max", a.get("min")), ("min", a.get("max"))):
        if bound is not None:
            e = it.b.arith(op, (e, typed(it, it.arg(bound, idx), dtype)), dtype)
    return e


# -------------------------------------------------------------------------------------------------- comparisons, logic


@rule("lt", "le", "gt", "ge", "eq", "ne", "less", "less_equal", "greater", "greater_equal", "not_equal")
def _compare(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    name = plain_name(node)
    op = {"less": "lt", "less_equal": "le", "greater": "gt", "greater_equal": "ge", "not_equal": "ne"}.get(name, name)
    dtype = it.common_dtype(a["self"], a["other"])
    operands = [it.arg(x, idx) for x in (a["self"], a["other"])]
    # A Python number is compared as it is, not rounded to the tensor's dtype.
    left, right = (it.b.cast(e, dtype) if e.dtype is not None else e for e in operands)
    return it.b.compare(op, left, right)


@rule("isinf", "isneginf", "isposinf", "isnan", "isfinite")
def _is_special(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    x, name = it.at(a["self"], idx), plain_name(node)
    if x.dtype is None or not x.dtype.is_floating_point:
        return it.b.const(name == "isfinite", torch.bool)
    nan = it.b.not_(it.b.compare("eq", x, x))
    low, high = (it.b.compare("eq", x, it.b.const(v)) for v in (-math.inf, math.inf))
    infinite = it.b.or_(low, high)
    finite = it.b.not_(it.b.or_(infinite, nan))
    return {"isinf": infinite, "isneginf": low, "isposinf": high, "isnan": nan, "isfinite": finite}[name]


@rule("and", "or", "xor", "bitwise_and", "bitwise_or", "bitwise_xor", "logical_and", "logical_or", "logical_xor")
def _logic(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    name = plain_name(node)
    if value_of(node).dtype is not torch.bool:
        raise Unsupported(f"`{name}` of integers works on their bits")
    left, right = (it.b.cast(it.arg(x, idx), torch.bool) for x in (a["self"], a["other"]))
    return {"and": it.b.and_, "or": it.b.or_, "xor": it.b.xor}[name.rpartition("_")[2]](left, right)


@rule("bitwise_not", "logical_not", "invert")
def _not(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    if value_of(node).dtype is not torch.bool:
        raise Unsupported("`~` of integers works on their bits")
    return it.b.not_(it.b.cast(it.at(a["self"], idx), torch.bool))


# ----------------------------------------------------------------------------------------------------------- selection


@rule("where")
def _where(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    if "self" not in a or "other" not in a:
        raise Unsupported
    dtype = value_of(node).dtype
    condition = it.b.cast(it.arg(a["condition"], idx), torch.bool)
    chosen, other = (typed(it, it.arg(a[x], idx), dtype) for x in ("self", "other"))
    return it.b.where(condition, chosen, other, dtype)


@rule("masked_fill")
def _masked_fill(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    dtype = value_of(node).dtype
    fill = typed(it, it.arg(a["value"], ()), dtype)
    return it.b.where(it.b.cast(it.arg(a["mask"], idx), torch.bool), fill, it.arg(a["self"], idx), dtype)


@rule("tril", "triu")
def _triangle(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    """``tril`` keeps column - row <= diagonal."""
    dtype, lower = value_of(node).dtype, plain_name(node) == "tril"
    offset = it.b.sub(idx[-1], idx[-2])
    kept = it.b.compare("le" if lower else "ge", offset, it.extent(a.get("diagonal", 0)))
    return it.b.where(kept, it.at(a["self"], idx), it.b.const(0, dtype), dtype)


# ---------------------------------------------------------------------------------------------------------- reductions


@rule("any", "all")
def _any(it: Interpreter, node: fx.Node, a: Arguments, idx: Index) -> Expr:
    """``any`` over the keys stays symbolic where it depends on the query; one flag per batch row is a leaf like any other."""
    source, dims = a["self"], a.get("dim")
    shape = value_of(source).shape
    dims = list(range(len(shape))) if dims is None else [dims] if isinstance(dims, int) else list(dims)
    if len(dims) != 1 or "k" not in it.b.sizes or not it.same(shape[dims[0]], it.b.sizes["k"]):
        raise Unsupported(f"`{node.target}` does not run over the keys")
    dim, rest = dims[0] % len(shape), list(idx)
    if a.get("keepdim"):
        del rest[dim]
    name = f"j{it.depth}"
    it.b.sizes[name] = it.b.sizes["k"]
    it.depth += 1
    try:
        whole = [it.b.cast(it.at(source, (*rest[:dim], i, *rest[dim:])), torch.bool) for i in _both(it, name)]
    finally:
        it.depth -= 1
    if "q" not in whole[0].free or {"k", "h"} & whole[0].free:
        raise Unsupported("it is a reduction that is not one flag per query")
    if any(e.op == "any" for e in parts(*whole)):
        raise Unsupported("it is a reduction of a reduction")
    if plain_name(node) == "any":
        return it.b.any_over(name, *whole)
    return it.b.not_(it.b.any_over(name, *(it.b.not_(e) for e in whole)))


def _both(it: Interpreter, name: str) -> tuple[Expr, Expr]:
    return it.b.index(name), it.b.index("k")
