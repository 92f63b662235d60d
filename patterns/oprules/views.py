"""Views, pieces, rearrangements and lookups by index."""

from __future__ import annotations

import torch
from torch import fx

from ..dims import DimConflict, as_size, broadcast, fresh, leaves, regroup
from .core import Args, Typing, is_tensor, op_name, rule, tie


@rule("view", "reshape", "_unsafe_view", "unflatten", "flatten", "view_as", "reshape_as")
def _view(a: Args) -> Typing:
    if isinstance(a.get("dtype"), torch.dtype):
        raise DimConflict("view as another dtype")
    ignored = (a["other"],) if is_tensor(a.get("other")) else ()
    return Typing(regroup(a.dims("self"), a.shape), shape_only=ignored)


@rule("transpose", "swapaxes", "swapdims", "permute", "t", "mT", "movedim", "numpy_T")
def _permute(a: Args) -> Typing:
    x = a.dims("self")
    return Typing(tuple(x[i] for i in permutation(a, len(x))))


def permutation(a: Args, rank: int) -> list[int]:
    """Which input dimension each output dimension of a transpose-like node takes."""
    name = op_name(a.node)
    if name == "permute":
        return [d % rank for d in a["dims"]]
    order = list(range(rank))
    if name == "movedim":
        source, target = a[1], a[2]
        if not isinstance(source, int):
            if len(source) != 1:
                raise DimConflict("movedim of several dimensions")
            source, target = source[0], target[0]
        order.insert(target % rank, order.pop(source % rank))
        return order
    if name == "numpy_T":
        return order[::-1]
    if name in ("t", "mT"):
        i, j = (0, 1) if name == "t" else (rank - 2, rank - 1)
        if rank < 2:
            return order
    else:
        i, j = a[1] % rank, a[2] % rank
    order[i], order[j] = order[j], order[i]
    return order


@rule("unsqueeze")
def _unsqueeze(a: Args) -> Typing:
    x = list(a.dims("self"))
    x.insert(a["dim"] % (len(x) + 1), ())
    return Typing(tuple(x))


@rule("squeeze")
def _squeeze(a: Args) -> Typing:
    x = a.dims("self")
    source = a["self"].meta["val"].shape
    given = a.get("dim")
    candidates = range(len(x)) if given is None else [d % len(x) for d in (given if isinstance(given, (list, tuple)) else [given])]
    gone = {i for i in candidates if as_size(source[i]) == 1}
    return Typing(tuple(d for i, d in enumerate(x) if i not in gone))


@rule("expand", "expand_as", "broadcast_to")
def _expand(a: Args) -> Typing:
    x = a.dims("self")
    offset = len(a.shape) - len(x)
    dims = []
    for i, size in enumerate(a.shape):
        known = x[i - offset] if i >= offset else ()
        dims.append(known if leaves(known) else fresh(size, a.origin))
    if op_name(a.node) == "expand_as":
        dims = list(broadcast([tuple(dims), a.dims("other")], a.shape, a.origin))
    return Typing(tuple(dims), shape_only=(a["other"],) if is_tensor(a.get("other")) else ())


@rule("repeat")
def _repeat(a: Args) -> Typing:
    x = a.dims("self")
    offset = len(a.shape) - len(x)
    dims = []
    mixed = []
    for i, (times, size) in enumerate(zip(a["repeats"], a.shape)):
        known = x[i - offset] if i >= offset else ()
        if isinstance(times, int) and times == 1:
            dims.append(known)
        else:
            dims.append(fresh(size, a.origin))
            if leaves(known):
                mixed.append((a["self"], i - offset))
    return Typing(tuple(dims), tuple(mixed))


@rule("slice", "narrow")
def _slice(a: Args) -> Typing:
    x = list(a.dims("self"))
    dim = a["dim"] % len(x)
    if as_size(a.shape[dim]) == as_size(a["self"].meta["val"].shape[dim]):
        return Typing(tuple(x))
    x[dim] = fresh(a.shape[dim], a.origin)
    return Typing(tuple(x), ((a["self"], dim),))


@rule("select")
def _select(a: Args) -> Typing:
    x = list(a.dims("self"))
    dim = a["dim"] % len(x)
    x.pop(dim)
    return Typing(tuple(x), ((a["self"], dim),))


@rule("index")
def _index(a: Args) -> Typing:
    """``table[ids]``, ``x[:, ids]``: one dimension is looked up, and the dimensions of the index take its place."""
    x = a.dims("self")
    dim, index = looked_up(a)
    return Typing((*x[:dim], *a.dims(index), *x[dim + 1 :]), ((a["self"], dim),))


def looked_up(a: Args) -> tuple[int, fx.Node]:
    """The one dimension that an advanced index looks up, and the integers that it is looked up with.

    Raises:
        DimConflict: there are several, or a mask.
    """
    found = [(i, x) for i, x in enumerate(a["indices"]) if x is not None]
    if len(found) != 1 or not is_tensor(found[0][1]) or found[0][1].meta["val"].dtype in (torch.bool, torch.uint8):
        raise DimConflict("an index of several dimensions, or by a mask")
    return found[0]


@rule("index_select")
def _index_select(a: Args) -> Typing:
    x = list(a.dims("self"))
    dim = a["dim"] % len(x)
    x[dim] = a.dims("index")[0] if a.dims("index") else ()
    return Typing(tuple(x), ((a["self"], dim),))


@rule("gather")
def _gather(a: Args) -> Typing:
    x, index = a.dims("self"), a.dims("index")
    dim = a["dim"] % len(x)
    source, taken = a["self"].meta["val"].shape, a["index"].meta["val"].shape
    mixed = [(a["self"], dim)]
    for i in range(len(x)):
        if i == dim:
            continue
        if as_size(source[i]) == as_size(taken[i]):
            tie(x[i], index[i])
        else:
            mixed.append((a["self"], i))
    return Typing(index, tuple(mixed))


@rule("cat", "concat")
def _cat(a: Args) -> Typing:
    tensors = list(a["tensors"])
    rank = len(a.shape)
    dim = a["dim"] % rank
    result = list(a.dims(tensors[0]))
    for x in tensors[1:]:
        for i, d in enumerate(a.dims(x)):
            if i != dim:
                tie(result[i], d)
                result[i] = result[i] if leaves(result[i]) else d
    result[dim] = fresh(a.shape[dim], a.origin)
    return Typing(tuple(result), tuple((x, dim) for x in tensors))


@rule("stack")
def _stack(a: Args) -> Typing:
    tensors = list(a["tensors"])
    dim = a["dim"] % len(a.shape)
    shape = [size for i, size in enumerate(a.shape) if i != dim]
    result = list(broadcast([a.dims(x) for x in tensors], shape, a.origin))
    result.insert(dim, fresh(a.shape[dim], a.origin))
    return Typing(tuple(result))


@rule("unbind")
def _unbind(a: Args) -> Typing:
    x = a.dims("self")
    dim = a["dim"] % len(x)
    return Typing(((*x[:dim], *x[dim + 1 :]),) * len(a.node.meta["val"]), ((a["self"], dim),))


@rule("chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")
def _chunk(a: Args) -> Typing:
    x = a.dims("self")
    dim = a["dim"] % len(x)
    pieces = tuple((*x[:dim], fresh(v.shape[dim], a.origin), *x[dim + 1 :]) for v in a.node.meta["val"])
    return Typing(pieces, ((a["self"], dim),))


@rule("slice_scatter", "select_scatter")
def _scatter(a: Args) -> Typing:
    """A part of ``self`` replaced by ``src``: what is left of ``self`` stays where it was."""
    x, part = a.dims("self"), a.dims("src")
    dim = a["dim"] % len(x)
    others = [d for i, d in enumerate(x) if i != dim]
    kept = [d for i, d in enumerate(part) if i != dim] if len(part) == len(x) else list(part)
    for one, other in zip(others, kept, strict=True):
        tie(one, other)
    result = [one if leaves(one) else other for one, other in zip(others, kept, strict=True)]
    result.insert(dim, x[dim])
    return Typing(tuple(result), ((a["src"], dim),) if len(part) == len(x) else ())


@rule("constant_pad_nd", "pad")
def _pad(a: Args) -> Typing:
    x = list(a.dims("self"))
    amounts = a["pad"]
    mixed = []
    for j in range(len(amounts) // 2):
        i = len(x) - 1 - j
        if amounts[2 * j] != 0 or amounts[2 * j + 1] != 0:
            x[i] = fresh(a.shape[i], a.origin)
            mixed.append((a["self"], i))
    return Typing(tuple(x), tuple(mixed))


@rule("view_as_complex")
def _view_as_complex(a: Args) -> Typing:
    x = a.dims("self")
    return Typing(x[:-1], ((a["self"], len(x) - 1),))


@rule("view_as_real")
def _view_as_real(a: Args) -> Typing:
    return Typing((*a.dims("self"), fresh(2, a.origin)))
