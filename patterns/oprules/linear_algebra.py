"""Products, lookups in a table of rows, convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from ..dims import DimConflict, as_size, broadcast, fresh_dims, leaves
from .core import Args, Typing, is_tensor, rule, tie


@rule("linear")
def _linear(a: Args) -> Typing:
    x, weight = a.dims("input"), a.dims("weight")
    tie(x[-1], weight[-1])
    mixed = ((a["input"], len(x) - 1), (a["weight"], len(weight) - 1))
    if len(weight) != 2:
        return Typing(x[:-1], mixed)
    _tie_bias(a, weight[0])
    return Typing((*x[:-1], weight[0]), mixed)


def _tie_bias(a: Args, outputs: Sequence[Any]) -> None:
    """Each number of a bias goes to one output: a bias that is made of tokens makes outputs of tokens."""
    if is_tensor(a["bias"]):
        tie(outputs, a.dims("bias")[0])


@rule("addmm", "baddbmm")
def _addmm(a: Args) -> Typing:
    names = ("mat1", "mat2") if "mat1" in a.names else ("batch1", "batch2")
    product = _matmul_of(a, *names)
    return Typing(broadcast([product.dims, a.dims("self")], a.shape, a.origin), product.mixed)


@rule("matmul", "bmm", "mm")
def _matmul(a: Args) -> Typing:
    return _matmul_of(a, a.names[0], a.names[1])


def _matmul_of(a: Args, first: str, second: str) -> Typing:
    x, y = a.dims(first), a.dims(second)
    if len(x) < 1 or len(y) < 1:
        raise DimConflict("matmul of a scalar")
    row = () if len(x) == 1 else (x[-2],)
    column = () if len(y) == 1 else (y[-1],)
    inner_y = len(y) - 1 if len(y) == 1 else len(y) - 2
    tie(x[-1], y[inner_y])
    batch_rank = max(len(x), len(y)) - 2
    batch = broadcast([x[:-2], y[:-2]], list(a.shape)[: max(batch_rank, 0)], a.origin) if batch_rank > 0 else ()
    return Typing((*batch, *row, *column), ((a[first], len(x) - 1), (a[second], inner_y)))


@rule("einsum")
def _einsum(a: Args) -> Typing:
    equation: str = a["equation"].replace(" ", "")
    if "..." in equation:
        raise DimConflict("einsum with an ellipsis")
    inputs, _, output = equation.partition("->")
    terms = inputs.split(",")
    if not _:
        letters = sorted(set(inputs) - {","})
        output = "".join(c for c in letters if inputs.count(c) == 1)
    letter_dims: dict[str, Any] = {}
    mixed: list[tuple[fx.Node, int]] = []
    for term, node in zip(terms, a["tensors"], strict=True):
        for i, (letter, dim) in enumerate(zip(term, a.dims(node), strict=True)):
            tie(letter_dims.setdefault(letter, dim), dim)
            letter_dims[letter] = letter_dims[letter] if leaves(letter_dims[letter]) else dim
            if letter not in output or term.count(letter) > 1:
                mixed.append((node, i))
    return Typing(tuple(letter_dims[c] for c in output), tuple(mixed))


@rule("embedding")
def _embedding(a: Args) -> Typing:
    return Typing((*a.dims("indices"), a.dims("weight")[1]), ((a["weight"], 0),))


def is_linear(a: Args) -> bool:
    """Whether a convolution looks at one place at a time."""
    alone = all(as_size(n) == 1 for n in a["weight"].meta["val"].shape[2:])
    strides, padding = (a[n] if isinstance(a[n], (list, tuple, str)) else [a[n]] for n in ("stride", "padding"))
    inside = isinstance(padding, str) or all(n == 0 for n in padding)
    return alone and inside and all(n == 1 for n in strides) and a["groups"] == 1 and not a.get("transposed")


@rule("conv1d", "conv2d", "convolution")
def _convolution(a: Args) -> Typing:
    x, weight = a.dims("input"), a.dims("weight")
    if len(x) != len(weight):
        raise DimConflict("unbatched convolution")
    _tie_bias(a, weight[0])
    if is_linear(a):
        return Typing((x[0], weight[0], *x[2:]), ((a["input"], 1), *((a["weight"], i) for i in range(1, len(weight)))))
    spatial = fresh_dims(list(a.shape)[2:], a.origin)
    mixed = tuple((a["input"], i) for i in range(1, len(x))) + tuple((a["weight"], i) for i in range(1, len(weight)))
    return Typing((x[0], weight[0], *spatial), mixed)
