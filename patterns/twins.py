"""The packed twin of each row-wise operator.

The twin of a value with one row per token has shape ``(T, *rest)``: the token dimension first, then what is left of its other
dimensions, in their order. A handler emits the twin of one node; it takes its operands from the builder, which packs what is
not packed yet. A new row-wise operator needs a rule in `oprules` and, if none of the handlers here fits, one more handler.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .dims import leaves, size_of
from .oprules import POINTWISE, Args, is_tensor, looked_up, op_name, permutation
from .registry import entering

if TYPE_CHECKING:
    from .builder import PackedView

aten = torch.ops.aten
Handler = Callable[["PackedView", fx.Node], fx.Node]
_HANDLERS: dict[str, Handler] = {}
handler = entering(_HANDLERS)


class NotPackable(Exception):
    """This node has no packed twin; it is computed on padded rows instead."""


def has_twin(node: fx.Node) -> bool:
    return node.target is operator.getitem or op_name(node) in _HANDLERS


def emit_twin(view: PackedView, node: fx.Node) -> fx.Node:
    """Emit the packed twin of ``node``.

    Raises:
        NotPackable: its arguments have a form that the handler does not know.
    """
    if node.target is operator.getitem:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return view.call(operator.getitem, view.packed(source), node.args[1])
    return _HANDLERS[op_name(node)](view, node)


def _replay(view: PackedView, node: fx.Node, **changed: Any) -> fx.Node:
    """The same operator with some arguments replaced by name; tensors that are not replaced are taken as they are."""
    a = Args(node, view.table)
    args, kwargs = list(node.args), dict(node.kwargs)
    for name, value in changed.items():
        position = a.names.index(name)
        if position < len(args):
            args[position] = value
        else:
            kwargs[name] = value
    keep = {id(v) for v in changed.values()}
    convert = lambda x: x if id(x) in keep or x in view.own else view.plain(x)  # noqa: E731
    return view.call(node.target, *fx.map_arg(tuple(args), convert), **fx.map_arg(kwargs, convert))


def _self(view: PackedView, node: fx.Node) -> tuple[Args, str, fx.Node]:
    """The arguments, the name of the first one, and its packed twin."""
    a = Args(node, view.table)
    source = a[0]
    if not is_tensor(source) or view.layout(source) is None:
        raise NotPackable("its first operand has no token rows")
    return a, a.names[0], view.packed(source)


def _packed_dim(view: PackedView, source: fx.Node, dim: int) -> int:
    layout = view.layout(source)
    assert layout is not None
    packed = layout.packed_dim(dim % len(layout.runs_per_dim))
    if packed is None:
        raise NotPackable(f"works along dimension {dim}, which holds tokens")
    return packed


# --- pointwise -------------------------------------------------------------------------------------------------------------


def _pointwise(view: PackedView, node: fx.Node) -> fx.Node:
    convert = lambda x: view.operand(x, node) if is_tensor(x) else view.plain(x)  # noqa: E731
    return view.call(node.target, *fx.map_arg(node.args, convert), **fx.map_arg(node.kwargs, convert))


for _name in POINTWISE:
    _HANDLERS[_name] = _pointwise


@handler("type_as")
def _type_as(view: PackedView, node: fx.Node) -> fx.Node:
    return view.call(aten.to.dtype, view.packed(_source(node)), node.meta["val"].dtype)


@handler("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
def _like(view: PackedView, node: fx.Node) -> fx.Node:
    _, name, x = _self(view, node)
    return _replay(view, node, **{name: x})


def _source(node: fx.Node) -> fx.Node:
    source = node.args[0]
    if not isinstance(source, fx.Node):
        raise NotPackable("its first operand is no tensor")
    return source


# --- linear algebra --------------------------------------------------------------------------------------------------------


@handler("linear", "view_as_complex", "view_as_real")
def _on_first(view: PackedView, node: fx.Node) -> fx.Node:
    _, name, x = _self(view, node)
    return _replay(view, node, **{name: x})


@handler("layer_norm", "rms_norm")
def _norm(view: PackedView, node: fx.Node) -> fx.Node:
    _, name, x = _self(view, node)
    return _replay(view, node, **{name: x})


@handler("embedding")
def _embedding(view: PackedView, node: fx.Node) -> fx.Node:
    a = Args(node, view.table)
    if view.layout(a["indices"]) is None or view.touches(a["weight"]):
        raise NotPackable("its indices have no token rows")
    if a["scale_grad_by_freq"]:
        raise NotPackable("its gradient depends on how often each index occurs, padding included")
    return _replay(view, node, indices=view.packed(a["indices"]))


@handler("conv1d", "conv2d", "convolution")
def _convolution(view: PackedView, node: fx.Node) -> fx.Node:
    """One that looks at one place at a time: a linear over channels."""
    a, _, x = _self(view, node)
    channels = _packed_dim(view, a["input"], 1)
    weight = view.call(aten.flatten.using_ints, view.plain(a["weight"]), 1)
    bias = view.plain(a["bias"]) if is_tensor(a["bias"]) else None
    return _moved(view, view.call(aten.linear.default, _moved(view, x, channels, -1), weight, bias), -1, channels)


@handler("matmul", "mm", "bmm")
def _matmul(view: PackedView, node: fx.Node) -> fx.Node:
    a = Args(node, view.table)
    x, y = a[0], a[1]
    layout_x, layout_y = view.layout(x), view.layout(y)
    if layout_x is not None and not view.touches(y) and y.meta["val"].dim() <= 2:
        return view.call(aten.matmul.default, view.packed(x), view.plain(y))
    both = layout_x is not None and layout_y is not None and len(layout_x.rest) == len(layout_y.rest)
    if both and _tokens_before(layout_x, 2) and _tokens_before(layout_y, 2):
        return view.call(aten.matmul.default, view.packed(x), view.packed(y))
    raise NotPackable("multiplies matrices that hold tokens in their rows or columns")


def _tokens_before(layout: Any, inner: int) -> bool:
    """Whether the innermost dimensions hold no tokens."""
    rank = len(layout.runs_per_dim)
    if rank < inner + 1:
        return False
    start = sum(layout.runs_per_dim[: rank - inner])
    return all(kind == "r" for kind, _ in layout.order[start:])


@handler("einsum")
def _einsum(view: PackedView, node: fx.Node) -> fx.Node:
    equation = str(node.args[0]).replace(" ", "")
    tensors = node.args[1]
    if "->" not in equation or "..." in equation or not isinstance(tensors, (list, tuple)):
        raise NotPackable("its equation is implicit")
    inputs, output = equation.split("->")
    token_letters: set[str] = set()
    terms = inputs.split(",")
    for term, x in zip(terms, tensors):
        for letter, dim in zip(term, view.table[x].dims):  # type: ignore[index]
            if any(a in view.domain.batch or a in view.domain.position for a in leaves(dim)):
                token_letters.add(letter)
    new_letter = next(c for c in "tuvwxyzabcdefghijklmnopqrs" if c not in equation)

    def packed_term(term: str) -> str:
        return new_letter + "".join(c for c in term if c not in token_letters)

    operands, new_terms = [], []
    for term, x in zip(terms, tensors):
        if view.touches(x) and view.layout(x) is None:  # type: ignore[arg-type]
            raise NotPackable("an operand varies with only part of the token index")
        packed = view.layout(x) is not None  # type: ignore[arg-type]
        operands.append(view.packed(x) if packed else view.plain(x))  # type: ignore[arg-type]
        new_terms.append(packed_term(term) if packed else term)
    rest = "".join(c for c in output if c not in token_letters)
    return view.call(aten.einsum.default, f"{','.join(new_terms)}->{new_letter}{rest}", operands)


# --- along one dimension ---------------------------------------------------------------------------------------------------


@handler(
    *"softmax _softmax log_softmax _log_softmax cumsum cumprod logcumsumexp argmax argmin sum mean amax amin prod var std any all "
    "linalg_vector_norm norm logsumexp flip sort topk max min".split()
)
def _along(view: PackedView, node: fx.Node) -> fx.Node:
    if op_name(node) in ("max", "min") and is_tensor(node.args[1] if len(node.args) > 1 else None):
        return _pointwise(view, node)
    a, name, x = _self(view, node)
    key = "dims" if "dims" in a.names else "dim"
    given = a.get(key)
    if given is None or given == []:
        raise NotPackable("works along all dimensions")
    many = isinstance(given, (list, tuple))
    dims = [_packed_dim(view, a[0], d) for d in (given if many else [given])]
    return _replay(view, node, **{name: x, key: dims if many else dims[0]})


@handler(
    *"slice narrow select chunk split split_with_sizes tensor_split unbind unsafe_chunk unsafe_split glu".split()
)
def _cut(view: PackedView, node: fx.Node) -> fx.Node:
    a, name, x = _self(view, node)
    if op_name(node) == "slice" and view.table[node].mixed == ():
        return x  # the whole dimension
    return _replay(view, node, **{name: x, "dim": _packed_dim(view, a[0], a["dim"])})


@handler("slice_scatter", "select_scatter")
def _scatter(view: PackedView, node: fx.Node) -> fx.Node:
    a, name, x = _self(view, node)
    if view.layout(a["src"]) is None:
        raise NotPackable("puts in a value without token rows")
    return _replay(view, node, **{name: x, "src": view.packed(a["src"]), "dim": _packed_dim(view, a[0], a["dim"])})


@handler("gather")
def _gather(view: PackedView, node: fx.Node) -> fx.Node:
    a, name, x = _self(view, node)
    if view.layout(a["index"]) is None:
        raise NotPackable("its index has no token rows")
    return _replay(view, node, **{name: x, "dim": _packed_dim(view, a[0], a["dim"]), "index": view.packed(a["index"])})


@handler("index")
def _index(view: PackedView, node: fx.Node) -> fx.Node:
    a = Args(node, view.table)
    dim, index = looked_up(a)
    if view.layout(index) is None:
        _, _, x = _self(view, node)
        if view.touches(index):
            raise NotPackable("its index varies with only part of the token")
        dim = _packed_dim(view, a["self"], dim)
        return view.call(aten.index.Tensor, x, [*[None] * dim, view.plain(index)])
    if view.touches(a["self"]):
        raise NotPackable("its index and what it looks up both vary with the token")
    rows = view.call(aten.index.Tensor, view.plain(a["self"]), [*[None] * dim, view.packed(index)])
    return _moved(view, rows, dim, 0)


def _moved(view: PackedView, x: fx.Node, source: int, target: int) -> fx.Node:
    return x if source == target else view.call(aten.movedim.int, x, source, target)


@handler("index_select")
def _index_select(view: PackedView, node: fx.Node) -> fx.Node:
    a, name, x = _self(view, node)
    if view.touches(a["index"]):
        raise NotPackable("its index varies with the token")
    return _replay(view, node, **{name: x, "dim": _packed_dim(view, a[0], a["dim"])})


@handler("cat", "concat")
def _cat(view: PackedView, node: fx.Node) -> fx.Node:
    a = Args(node, view.table)
    if any(view.layout(x) is None for x in a["tensors"]):
        raise NotPackable("joins values of which some have no token rows")
    dim = _packed_dim(view, node, a["dim"])
    return view.call(aten.cat.default, [view.packed(x) for x in a["tensors"]], dim)


@handler("stack")
def _stack(view: PackedView, node: fx.Node) -> fx.Node:
    a = Args(node, view.table)
    if any(view.layout(x) is None for x in a["tensors"]):
        raise NotPackable("joins values of which some have no token rows")
    return view.call(aten.stack.default, [view.packed(x) for x in a["tensors"]], _packed_dim(view, node, a["dim"]))


@handler("constant_pad_nd", "pad")
def _pad(view: PackedView, node: fx.Node) -> fx.Node:
    a, name, x = _self(view, node)
    layout = view.layout(a[0])
    if layout is None or not _tokens_before(layout, len(a["pad"]) // 2):
        raise NotPackable("pads a dimension that holds tokens")
    return _replay(view, node, **{name: x})


# --- losses ----------------------------------------------------------------------------------------------------------------


@handler("cross_entropy_loss", "nll_loss", "nll_loss_nd")
def _loss_of_rows(view: PackedView, node: fx.Node) -> fx.Node:
    """Without a reduction; with one it has no rows."""
    a, _, x = _self(view, node)
    target = a["target"]
    if view.layout(target) is None:
        raise NotPackable("its labels have no token rows")
    operands = [_moved(view, x, _packed_dim(view, a[0], 1), 1), view.packed(target)]
    if target.meta["val"].dim() == a[0].meta["val"].dim():
        operands[1] = _moved(view, operands[1], _packed_dim(view, target, 1), 1)
    rest = [view.plain(v) if isinstance(v, fx.Node) else v for v in (a[n] for n in a.names[2:])]
    packet = aten.cross_entropy_loss if op_name(node) == "cross_entropy_loss" else aten.nll_loss_nd
    return view.call(packet.default, *operands, *rest)


# --- views -----------------------------------------------------------------------------------------------------------------


@handler("view", "reshape", "_unsafe_view", "unflatten", "flatten", "unsqueeze", "squeeze", "view_as", "reshape_as")
def _view(view: PackedView, node: fx.Node) -> fx.Node:
    _, _, x = _self(view, node)
    return view.call(aten.reshape.default, x, view.shape(node))


@handler("transpose", "swapaxes", "swapdims", "permute", "t", "mT", "movedim", "numpy_T")
def _permute(view: PackedView, node: fx.Node) -> fx.Node:
    a, _, x = _self(view, node)
    layout = view.layout(a[0])
    assert layout is not None
    order = [layout.packed_dim(d) for d in permutation(a, len(layout.runs_per_dim))]
    target = [0, *(d for d in order if d is not None)]
    return x if target == sorted(target) else view.call(aten.permute.default, x, target)


@handler("expand", "expand_as", "broadcast_to")
def _expand(view: PackedView, node: fx.Node) -> fx.Node:
    source = _source(node)
    if view.layout(source) is None:
        raise NotPackable("broadcasts a value over the tokens")
    return view.call(aten.expand.default, view.operand(source, node), view.shape(node))


@handler("repeat")
def _repeat(view: PackedView, node: fx.Node) -> fx.Node:
    a, _, x = _self(view, node)
    layout = view.layout(node)
    assert layout is not None
    offset = len(a["repeats"]) - a["self"].meta["val"].dim()
    times = [1]
    for i, n in enumerate(a["repeats"]):
        packed = layout.packed_dim(i)
        if packed is None:
            if n != 1:
                raise NotPackable("repeats tokens")
        else:
            times.append(n)
    if offset:
        x = view.operand(a["self"], node)
    return view.call(aten.repeat.default, x, times)


def rest_sizes(view: PackedView, node: fx.Node) -> list[Any]:
    """The sizes of the dimensions that follow the token dimension of the twin of ``node``."""
    layout = view.layout(node)
    assert layout is not None
    return [view.size(size_of(atoms)) for atoms in layout.rest]
