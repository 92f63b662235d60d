"""Index expressions: one element of a mask as a function of batch row, head, query and key.

`attention_mask[:, None, None, :] != 0` is ``attention_mask[b, k] != 0``, and `torch.tril(ones)` is ``k <= q``.  Expressions are
immutable and interned: two that are built alike are the same object, so equality is identity and a dictionary is a memo.
`algebra.Builder` is the only maker of them; it simplifies while it builds.

    op          args                        payload             what it is
    const                                   number              a number; without dtype, a Python scalar (weak in promotion)
    index                                   name                a position: b, h, q, k, or the bound one of a reduction
    sym                                     sympy expression    a size that is only known at run time
    load        index of each dimension     fx.Node             an element of a tensor that is not looked into
    linear      terms                       (coefs, constant)   sum(coef * term) + constant, over integers
    times       x, sym                                          x times a size
    floordiv, mod  x, size                                      of a folded dimension
    int_le, int_eq  x, const                                    of integers, brought to one side
    lt, le, eq  a, b                                            of floating point numbers (NaN compares as IEEE says)
    not, and, or, xor                                           of booleans
    where       condition, a, b
    add, sub, mul, div, neg, abs, max, min                      in the real dtype of the node
    cast        x                                               to the dtype of the expression
    any         body, body at key k         bound name          whether any key has `body`
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

__all__ = ["Expr", "intern_expr", "is_integer", "parts", "tensor_name", "text"]


class Expr:
    """One interned expression; compare with ``is`` or ``==`` alike."""

    __slots__ = ("__weakref__", "_free", "_loads", "_text", "args", "dtype", "op", "payload")

    op: str
    args: tuple[Expr, ...]
    payload: Any
    dtype: torch.dtype | None

    def __init__(self, op: str, args: tuple[Expr, ...], payload: Any, dtype: torch.dtype | None) -> None:
        self.op, self.args, self.payload, self.dtype = op, args, payload, dtype
        self._text: str | None = None
        self._free: frozenset[str] | None = None
        self._loads: frozenset[fx.Node] | None = None

    @property
    def free(self) -> frozenset[str]:
        """The names of the index variables that the value depends on."""
        if self._free is None:
            if self.op == "index":
                self._free = frozenset((self.payload,))
            elif self.op == "any":
                self._free = self.args[0].free - {self.payload}
            else:
                self._free = frozenset().union(*(a.free for a in self.args))
        return self._free

    @property
    def loads(self) -> frozenset[fx.Node]:
        """The tensors that are read."""
        if self._loads is None:
            own = frozenset((self.payload,)) if self.op == "load" else frozenset()
            self._loads = own.union(*(a.loads for a in self.args))
        return self._loads

    @property
    def is_const(self) -> bool:
        return self.op == "const"

    def __repr__(self) -> str:
        return f"<{text(self)}>"


# Keys hold identities only: a graph holds its proofs, proofs hold expressions, and expressions hold nodes and so the graph; a key
# that held a node would keep all of them alive for ever.
_TABLE: weakref.WeakValueDictionary[tuple[Any, ...], Expr] = weakref.WeakValueDictionary()


def intern_expr(op: str, args: tuple[Expr, ...] = (), payload: Any = None, dtype: torch.dtype | None = None) -> Expr:
    """The one expression with these parts."""
    if op == "const":  # 1, 1.0, True and -0.0, 0.0 compare equal in Python but are different constants
        token: Any = (type(payload), repr(payload))
    else:
        token = id(payload) if isinstance(payload, fx.Node) else payload
    key = (op, tuple(map(id, args)), token, dtype)
    found = _TABLE.get(key)
    if found is None:
        found = _TABLE[key] = Expr(op, args, payload, dtype)
    return found


def is_integer(dtype: torch.dtype | None) -> bool:
    """Whether it is an integer dtype (bool is not)."""
    return dtype is not None and dtype is not torch.bool and not dtype.is_floating_point and not dtype.is_complex


# ---------------------------------------------------------------------------------------------------------------- text

_SYMBOLS = {"lt": "<", "le": "<=", "eq": "==", "int_le": "<=", "int_eq": "==", "and": "and", "or": "or", "xor": "xor"}
_NEGATED = {"int_le": ">", "int_eq": "!=", "eq": "!="}
_ARITHMETIC = {"add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "mod": "%", "times": "*"}


def tensor_name(node: fx.Node) -> str:
    """The name of a tensor as the user wrote it, as far as the graph tells."""
    if node.op == "call_function" and (call := _call_name(node)) is not None:
        return call
    name = str(node.target) if node.op in ("placeholder", "get_attr") else node.name
    if re.fullmatch(r"arg\d+_\d+|primals_\d+", name):
        name = node.name
    name = re.sub(r"^[lL]_+", "", name)
    if (positional := re.fullmatch(r"args_(\d+)_*", name)) is not None:
        return f"args[{positional[1]}]"
    name = re.sub(r"(_modules_|_buffers_|_parameters_)", ".", name)
    name = re.sub(r"^(args_|kwargs_|self_|self\.|stack\d+_)+", "", name)
    return name.strip("_.") or node.name


_SAME_VALUES = ("aten.to.", "aten._to_copy.", "aten.alias.", "aten.contiguous.", "aten.clone.", "aten.detach.")


def _call_name(node: fx.Node) -> str | None:
    """``attention_mask.sum(1)``: how a leaf was computed, if it takes one short call of an input to say."""
    source, *others = node.args or (None,)
    while isinstance(source, fx.Node) and str(source.target).startswith(_SAME_VALUES):
        source = source.args[0]
    plain = all(isinstance(a, int) or (isinstance(a, (list, tuple)) and all(isinstance(i, int) for i in a)) for a in others)
    if not isinstance(source, fx.Node) or source.op != "placeholder" or not plain or node.kwargs:
        return None
    name = str(node.target).removeprefix("aten.").split(".")[0].strip("_")
    shown = [str(a[0]) if isinstance(a, (list, tuple)) and len(a) == 1 else str(a) for a in others]
    return f"{tensor_name(source)}.{name}({', '.join(shown)})"


def text(e: Expr) -> str:
    """The expression as a user would write it; what is very long is cut in the middle."""
    if e._text is None:
        full = _render(e)
        e._text = full if len(full) <= _LONGEST else f"{full[: _LONGEST // 2]} ... {full[-_LONGEST // 2 :]}"
    return e._text


def parts(*roots: Expr) -> Iterator[Expr]:
    """All sub-expressions of these expressions, each once."""
    seen: set[Expr] = set()
    pending = list(reversed(roots))
    while pending:
        e = pending.pop()
        if e not in seen:
            seen.add(e)
            yield e
            pending.extend(reversed(e.args))


def _number(value: Any) -> str:
    if isinstance(value, float):
        if math.isinf(value):
            return "inf" if value > 0 else "-inf"
        return f"{value:g}"
    return str(value)


_LONGEST = 400
_ATOMIC = frozenset({"const", "index", "sym", "load", "abs", "max", "min", "where", "any", "cast"})
_COMPARISONS = frozenset({"lt", "le", "eq", "int_le", "int_eq"})


def _group(e: Expr, *, logic: bool = False) -> str:
    """The text of an operand; beside ``and`` and ``or``, comparisons need no parentheses."""
    clear = logic and (e.op in _COMPARISONS or (e.op == "not" and e.args[0].op in (*_COMPARISONS, *_ATOMIC)))
    return text(e) if clear or e.op in _ATOMIC else f"({text(e)})"


def _sum(terms: list[tuple[Expr, int]], const: int = 0) -> str:
    """``2 * a - b + 3``."""
    parts = [(c < 0, _group(t) if abs(c) == 1 else f"{abs(c)} * {_group(t)}") for t, c in terms]
    if const or not parts:
        parts.append((const < 0, str(abs(const))))
    parts.sort(key=lambda part: part[0])
    first = ("-" if parts[0][0] else "") + parts[0][1]
    return first + "".join(f" {'-' if minus else '+'} {part}" for minus, part in parts[1:])


def _relation(symbol: str, x: Expr, bound: int) -> str:
    """``x symbol bound`` with negative terms moved to the right, and strict where that reads better (``k < lengths[b]``)."""
    terms = list(zip(x.args, x.payload[0], strict=True)) if x.op == "linear" else [(x, 1)]
    left = [(t, c) for t, c in terms if c > 0]
    right = [(t, -c) for t, c in terms if c < 0]
    if not left:
        left, right = right, left
        symbol = {"<=": ">=", ">": "<", ">=": "<=", "<": ">"}.get(symbol, symbol)
        bound = -bound
    if right and symbol == "<=" and bound == -1:
        symbol, bound = "<", 0
    if right and symbol == ">" and bound == -1:
        symbol, bound = ">=", 0
    if not right:
        return f"{_sum(left)} {symbol} {bound}"
    return f"{_sum(left, -bound if bound < 0 else 0)} {symbol} {_sum(right, max(bound, 0))}"


def _render(e: Expr) -> str:
    op, args = e.op, e.args
    if op == "const":
        return _number(e.payload)
    if op in ("index", "sym"):
        return str(e.payload)
    if op == "load":
        return f"{tensor_name(e.payload)}[{', '.join(text(a) for a in args)}]" if args else tensor_name(e.payload)
    if op == "linear":
        return _sum(list(zip(args, e.payload[0], strict=True)), e.payload[1])
    if op in ("int_le", "int_eq"):
        return _relation(_SYMBOLS[op], args[0], args[1].payload)
    if op == "not":
        inner = args[0]
        if inner.op in ("int_le", "int_eq"):
            return _relation(_NEGATED[inner.op], inner.args[0], inner.args[1].payload)
        if inner.op == "eq":
            return f"{_group(inner.args[0])} != {_group(inner.args[1])}"
        return f"not {_group(inner)}"
    if op in _SYMBOLS:
        logic = op in ("and", "or", "xor")
        return f"{_group(args[0], logic=logic)} {_SYMBOLS[op]} {_group(args[1], logic=logic)}"
    if op in _ARITHMETIC:
        return f"{_group(args[0])} {_ARITHMETIC[op]} {_group(args[1])}"
    if op == "neg":
        return f"-{_group(args[0])}"
    if op == "cast":
        return f"{text(args[0])}.to({str(e.dtype).removeprefix('torch.')})"
    if op == "any":
        return f"any over {e.payload} of ({text(args[0])})"
    return f"{op}({', '.join(text(a) for a in args)})"
