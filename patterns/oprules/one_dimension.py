"""Norms, softmax, sorting, sums: what mixes the elements along some dimensions."""

from __future__ import annotations

from ..dims import DimConflict, fresh
from .core import Args, Typing, is_tensor, norm_dim, op_name, rule, tie
from .pointwise import pointwise


@rule("layer_norm", "rms_norm", "native_layer_norm")
def _layer_norm(a: Args) -> Typing:
    x = a.dims("input")
    over = range(len(x) - len(a["normalized_shape"]), len(x))
    for name in ("weight", "bias"):
        if is_tensor(a.get(name)):
            for i, dim in zip(over, a.dims(name)):
                tie(x[i], dim)
    mixed = tuple((a["input"], i) for i in over)
    if op_name(a.node) == "native_layer_norm":
        statistics = tuple(() if i in over else d for i, d in enumerate(x))
        return Typing((x, statistics, statistics), mixed)
    return Typing(x, mixed)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "softmin", "cumsum", "cumprod", "logcumsumexp", "flip", "roll")
def _along(a: Args) -> Typing:
    x = a.dims(0)
    given = a.get("dim", a.get("dims"))
    over = given if isinstance(given, (list, tuple)) else [given]
    if not over:
        raise DimConflict("over all dimensions")
    return Typing(x, tuple((a[0], norm_dim(d, len(x))) for d in over))


@rule("glu")
def _glu(a: Args) -> Typing:
    x = list(a.dims("self"))
    dim = norm_dim(a["dim"], len(x))
    x[dim] = fresh(a.shape[dim], a.origin)
    return Typing(tuple(x), ((a["self"], dim),))


@rule("triu", "tril")
def _triangle(a: Args) -> Typing:
    x = a.dims(0)
    return Typing(x, ((a[0], len(x) - 2), (a[0], len(x) - 1)))


@rule("sort", "topk", "cummax", "cummin", "argsort")
def _order(a: Args) -> Typing:
    x = a.dims(0)
    over = norm_dim(a["dim"], len(x))
    value = a.node.meta["val"]
    length = (value[0] if isinstance(value, (list, tuple)) else value).shape[over]
    dims = x if length == a[0].meta["val"].shape[over] else (*x[:over], fresh(length, a.origin), *x[over + 1 :])
    return Typing((dims, dims) if isinstance(value, (list, tuple)) else dims, ((a[0], over),))


@rule("sum", "mean", "amax", "amin", "max", "min", "prod", "var", "std", "any", "all", "norm", "linalg_vector_norm", "logsumexp",
      "argmax", "argmin", "var_mean", "std_mean", "count_nonzero", "nansum", "median")  # fmt: skip
def _reduce(a: Args) -> Typing:
    if op_name(a.node) in ("max", "min") and is_tensor(a.get("other")):
        return pointwise(a)
    x = a.dims(0)
    given = a.get("dim")
    over = range(len(x)) if given is None or given == [] else given if isinstance(given, (list, tuple)) else [given]
    reduced = {norm_dim(d, len(x)) for d in over}
    dims = tuple(() if i in reduced else d for i, d in enumerate(x) if i not in reduced or a.get("keepdim"))
    value = a.node.meta["val"]
    mixed = tuple((a[0], i) for i in sorted(reduced))
    return Typing((dims,) * len(value) if isinstance(value, (list, tuple)) else dims, mixed)
