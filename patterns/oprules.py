"""How each operator carries tensor dimensions from its inputs to its output.

A rule answers with a `Typing`: the dimensions of the result, and which input dimensions are *mixed* (reduced, contracted,
normalised over, sorted, …). What is not mixed is carried element by element, so the operator acts on each index of it alone:
a node is row-wise over the tokens when it mixes none of their dimensions. An operator without a rule is opaque: its result has
fresh dimensions, and every dimension of its inputs counts as mixed.

To teach the packer a new operator, add its name to a set below or write a rule; nothing else needs to know.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .dims import DimConflict, Dims, as_size, broadcast, fresh, fresh_dims, leaves, regroup, unify

Mixed = tuple[tuple[fx.Node, int], ...]


@dataclass(frozen=True)
class Typing:
    """What a rule says of one node.

    ``dims``: dimensions of the result (of each result, for an operator with several).
    ``mixed``: input dimensions (never negative) whose elements influence each other.
    ``shape_only``: inputs of which only the shape matters.
    ``opaque``: no rule applied.
    """

    dims: tuple[Any, ...]
    mixed: Mixed = ()
    shape_only: tuple[fx.Node, ...] = ()
    opaque: bool = False
    position_dependent: bool = field(default=False)


class Args:
    """The arguments of a node by schema name, with defaults filled in."""

    def __init__(self, node: fx.Node, table: Mapping[fx.Node, Typing]) -> None:
        self.node = node
        self._table = table
        schema = node.target._schema  # type: ignore[union-attr]
        self.values: dict[str, Any] = {}
        for i, argument in enumerate(schema.arguments):
            if i < len(node.args):
                self.values[argument.name] = node.args[i]
            elif argument.name in node.kwargs:
                self.values[argument.name] = node.kwargs[argument.name]
            else:
                self.values[argument.name] = argument.default_value if argument.has_default_value() else None
        self.names = [argument.name for argument in schema.arguments]

    def __getitem__(self, name: str | int) -> Any:
        return self.values[self.names[name] if isinstance(name, int) else name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def dims(self, name: str | int | fx.Node) -> Dims:
        node = name if isinstance(name, fx.Node) else self[name]
        if not is_tensor(node):
            raise DimConflict(f"{name} is not a tensor")
        return self._table[node].dims

    @property
    def shape(self) -> Sequence[int | torch.SymInt]:
        return self.node.meta["val"].shape

    @property
    def origin(self) -> str:
        return self.node.name


Rule = Callable[[Args], Typing]
_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            _RULES[name] = function
        return function

    return register


def is_tensor(value: object) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def op_name(node: fx.Node) -> str:
    """``linear`` for ``aten.linear.default``; the function's own name for anything else."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", str(node.target))


def type_node(node: fx.Node, table: Mapping[fx.Node, Typing]) -> Typing:
    """The typing of ``node``, given those of its inputs in ``table``."""
    if node.op in ("placeholder", "get_attr"):
        return Typing(_fresh_like(node))
    if node.op == "call_function" and node.target is operator.getitem:
        return _getitem(node, table)
    name = op_name(node)
    try:
        if name in _RULES and (isinstance(node.target, torch._ops.OpOverload)):
            return _RULES[name](Args(node, table))
        if name == SITE_NAME:
            return _attention_site(node, table)
    except (DimConflict, IndexError, KeyError, TypeError):
        pass
    return Typing(_fresh_like(node), mixed=_everything(node, table), opaque=True)


def _fresh_like(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return fresh_dims(value.shape, node.name)
    if isinstance(value, (list, tuple)):
        return tuple(fresh_dims(v.shape, node.name) if isinstance(v, torch.Tensor) else None for v in value)
    return ()


def _everything(node: fx.Node, table: Mapping[fx.Node, Typing]) -> Mixed:
    return tuple((x, i) for x in node.all_input_nodes if is_tensor(x) for i in range(len(table[x].dims)))


def _getitem(node: fx.Node, table: Mapping[fx.Node, Typing]) -> Typing:
    source, index = node.args
    assert isinstance(source, fx.Node)
    typing = table.get(source)
    if not is_tensor(node):
        return Typing(())
    if typing is None or not isinstance(index, int) or typing.dims[index] is None:
        return Typing(_fresh_like(node), opaque=True)
    return Typing(typing.dims[index], opaque=typing.opaque)


# --- pointwise -------------------------------------------------------------------------------------------------------------

POINTWISE = frozenset(
    """
    add sub mul div true_divide floor_divide rsub pow neg abs exp exp2 expm1 log log1p log2 sqrt rsqrt square
    reciprocal tanh sigmoid silu gelu relu relu6 leaky_relu elu selu celu softplus softsign hardtanh hardswish
    hardsigmoid mish log_sigmoid threshold dropout alpha_dropout native_dropout sin cos tan asin acos atan atan2 sinh
    cosh erf erfc sign ceil floor round trunc frac fmod remainder where masked_fill maximum minimum fmax fmin clamp
    clamp_min clamp_max clip eq ne lt le gt ge isnan isinf isfinite nan_to_num __and__ __or__ __xor__ bitwise_and
    bitwise_or bitwise_xor bitwise_not logical_and logical_or logical_xor logical_not to _to_copy type_as float bool
    clone contiguous detach alias lift_fresh lift_fresh_copy positive conj lerp addcmul addcdiv bernoulli rand_like
    randn_like xlogy logaddexp hypot copysign polar complex real imag angle sgn convert_element_type
    mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits kl_div soft_margin_loss
    poisson_nll_loss
    """.split()
)
# Inputs whose values do not reach the result.
_SHAPE_ONLY = {"type_as": ("other",), "rand_like": ("self",), "randn_like": ("self",)}


def _pointwise(a: Args) -> Typing:
    name = op_name(a.node)
    tensors = [x for x in a.node.all_input_nodes if is_tensor(x)]
    ignored = tuple(a[n] for n in _SHAPE_ONLY.get(name, ()))
    if name == "type_as":
        tensors = [a["self"]]
    value = a.node.meta["val"]
    shape = value[0].shape if isinstance(value, (tuple, list)) else value.shape
    if any(len(a.dims(x)) > len(shape) for x in tensors):
        raise DimConflict("not element by element")  # `where` of a condition alone lists indices; a loss may be reduced
    dims = broadcast([a.dims(x) for x in tensors], shape, a.origin)
    return Typing((dims,) * len(value) if isinstance(value, (tuple, list)) else dims, shape_only=ignored)


for _name in POINTWISE:
    _RULES[_name] = _pointwise


@rule("zeros_like", "ones_like", "full_like", "empty_like")
def _constant_like(a: Args) -> Typing:
    return Typing(a.dims("self"), shape_only=(a["self"],))


@rule("new_zeros", "new_ones", "new_full", "new_empty")
def _new(a: Args) -> Typing:
    return Typing(fresh_dims(a.shape, a.origin), shape_only=(a["self"],))


@rule("arange", "zeros", "ones", "full", "empty", "scalar_tensor", "rand", "randn", "eye", "iota", "linspace")
def _create(a: Args) -> Typing:
    return Typing(fresh_dims(a.shape, a.origin))


# --- linear algebra --------------------------------------------------------------------------------------------------------


def _tie(one: Sequence[Any], other: Sequence[Any]) -> None:
    """Unify two dimensions unless one of them broadcasts."""
    if leaves(one) and leaves(other):
        unify(one, other)


@rule("linear")
def _linear(a: Args) -> Typing:
    x, weight = a.dims("input"), a.dims("weight")
    _tie(x[-1], weight[-1])
    mixed = ((a["input"], len(x) - 1), (a["weight"], len(weight) - 1))
    if len(weight) != 2:
        return Typing(x[:-1], mixed)
    _tie_bias(a, weight[0])
    return Typing((*x[:-1], weight[0]), mixed)


def _tie_bias(a: Args, outputs: Sequence[Any]) -> None:
    """Each number of a bias goes to one output: a bias that is made of tokens makes outputs of tokens."""
    if is_tensor(a["bias"]):
        _tie(outputs, a.dims("bias")[0])


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
    _tie(x[-1], y[inner_y])
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
            _tie(letter_dims.setdefault(letter, dim), dim)
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


# --- over one dimension ----------------------------------------------------------------------------------------------------


def _norm_dim(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


@rule("layer_norm", "rms_norm", "native_layer_norm")
def _layer_norm(a: Args) -> Typing:
    x = a.dims("input")
    over = range(len(x) - len(a["normalized_shape"]), len(x))
    for name in ("weight", "bias"):
        if is_tensor(a.get(name)):
            for i, dim in zip(over, a.dims(name)):
                _tie(x[i], dim)
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
    return Typing(x, tuple((a[0], _norm_dim(d, len(x))) for d in over))


@rule("glu")
def _glu(a: Args) -> Typing:
    x = list(a.dims("self"))
    dim = _norm_dim(a["dim"], len(x))
    x[dim] = fresh(a.shape[dim], a.origin)
    return Typing(tuple(x), ((a["self"], dim),))


@rule("triu", "tril")
def _triangle(a: Args) -> Typing:
    x = a.dims(0)
    return Typing(x, ((a[0], len(x) - 2), (a[0], len(x) - 1)))


@rule("sort", "topk", "cummax", "cummin", "argsort")
def _order(a: Args) -> Typing:
    x = a.dims(0)
    over = _norm_dim(a["dim"], len(x))
    value = a.node.meta["val"]
    length = (value[0] if isinstance(value, (list, tuple)) else value).shape[over]
    dims = x if length == a[0].meta["val"].shape[over] else (*x[:over], fresh(length, a.origin), *x[over + 1 :])
    return Typing((dims, dims) if isinstance(value, (list, tuple)) else dims, ((a[0], over),))


@rule("sum", "mean", "amax", "amin", "max", "min", "prod", "var", "std", "any", "all", "norm", "linalg_vector_norm", "logsumexp",
      "argmax", "argmin", "var_mean", "std_mean", "count_nonzero", "nansum", "median")  # fmt: skip
def _reduce(a: Args) -> Typing:
    if op_name(a.node) in ("max", "min") and is_tensor(a.get("other")):
        return _pointwise(a)
    x = a.dims(0)
    given = a.get("dim")
    over = range(len(x)) if given is None or given == [] else given if isinstance(given, (list, tuple)) else [given]
    reduced = {_norm_dim(d, len(x)) for d in over}
    dims = tuple(() if i in reduced else d for i, d in enumerate(x) if i not in reduced or a.get("keepdim"))
    value = a.node.meta["val"]
    mixed = tuple((a[0], i) for i in sorted(reduced))
    return Typing((dims,) * len(value) if isinstance(value, (list, tuple)) else dims, mixed)


# --- views and rearrangements ----------------------------------------------------------------------------------------------


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
            _tie(x[i], index[i])
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
                _tie(result[i], d)
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
        _tie(one, other)
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


# --- attention -------------------------------------------------------------------------------------------------------------

SITE_NAME = "attention_site"


def _attention_dims(q: Dims, k: Dims, v: Dims) -> Dims:
    _tie(q[0], k[0])
    _tie(q[0], v[0])
    _tie(k[-2], v[-2])
    _tie(q[-1], k[-1])
    return (*q[:-1], v[-1])


def _attention_mixed(q: fx.Node, k: fx.Node, v: fx.Node) -> Mixed:
    rank = len(q.meta["val"].shape)
    return ((q, rank - 1), (k, rank - 2), (k, rank - 1), (v, rank - 2))


@rule("scaled_dot_product_attention")
def _sdpa(a: Args) -> Typing:
    q, k, v = a["query"], a["key"], a["value"]
    dims = _attention_dims(a.dims(q), a.dims(k), a.dims(v))
    mixed = _attention_mixed(q, k, v)
    mask = a.get("attn_mask")
    if is_tensor(mask):
        scores = (*a.dims(q)[:-1], a.dims(k)[-2])
        broadcast([scores, a.dims(mask)], [*q.meta["val"].shape[:-1], k.meta["val"].shape[-2]], a.origin)
        mixed += ((mask, len(a.dims(mask)) - 1),)
    return Typing(dims, mixed)


def _attention_site(node: fx.Node, table: Mapping[fx.Node, Typing]) -> Typing:
    q, k, v = node.args[:3]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    return Typing(_attention_dims(table[q].dims, table[k].dims, table[v].dims), _attention_mixed(q, k, v))


# --- losses ----------------------------------------------------------------------------------------------------------------

LOSSES_OF_TOKENS = frozenset({"cross_entropy_loss", "nll_loss_nd"})
"""Losses of labels, of which some may be ignored."""


@rule("cross_entropy_loss", "nll_loss", "nll_loss_nd")
def _cross_entropy(a: Args) -> Typing:
    """Scores (N, C, ...) and labels (N, ...), or probabilities like the scores. Every row reads all of the weights of classes."""
    x, target = a.dims(0), a.dims("target")
    classes = min(len(x) - 1, 1)
    rows = (*x[:classes], *x[classes + 1 :])
    probabilities = len(target) == len(x)
    for one, other in zip(x if probabilities else rows, target, strict=True):
        _tie(one, other)
    mixed: Mixed = ((a["weight"], 0),) if is_tensor(a["weight"]) else ()
    if a["reduction"] == 0:
        mixed += ((a[0], classes), *([(a["target"], classes)] if probabilities else []))
        return Typing(rows, mixed)
    return Typing((), mixed + tuple((a[0], i) for i in range(len(x))) + tuple((a["target"], i) for i in range(len(target))))


def infer(graph: fx.Graph) -> dict[fx.Node, Typing]:
    """Type every node of a graph whose nodes carry fake values in ``meta["val"]``."""
    table: dict[fx.Node, Typing] = {}
    for node in graph.nodes:
        if node.op != "output":
            table[node] = type_node(node, table)
    return table
