"""Products of the same packed rows with several weights become one, forward and backward.

A model with three projections, to query, key and value, multiplies the same rows three times. One product with three times as many
columns keeps a GPU busier, and is launched once. The weights are put side by side first, all of a graph in one kernel, which costs
little as long as they are small beside the rows. Each number of the result is the sum of the same products as before.

    before                                       after
    %q = addmm(%bq, %x, %wq.t())                 %w = cat([%wq, %wk, %wv])                  # (3 * E, E)
    %k = addmm(%bk, %x, %wk.t())                 %b = cat([%bq, %bk, %bv])
    %v = addmm(%bv, %x, %wv.t())                 %y = addmm(%b, %x, %w.t())                 # (T, 3 * E)
                                                 %q, %k, %v = %y[:, :E], %y[:, E:2 * E], %y[:, 2 * E:]

In the backward the kernel of the attention writes the three gradients side by side (see `joined_gradients`), and three times three
products and sums become three:

    %gq, %gk, %gv = varlen_attn_backward(...)    %g = varlen_attn_backward_joined(...)      # (T, 3 * E)
    %a = addmm(%r, %gv, %wv)                     %w = cat([%wq, %wk, %wv])
    %b = addmm(%a, %gk, %wk)
    %c = addmm(%b, %gq, %wq)                     %c = addmm(%r, %g, %w)
    mm(%gq.t(), %x), ...                         %dw = mm(%g.t(), %x)                       # and rows of it
    sum(%gq, [0]), ...                           %db = sum(%g, [0])                         # and pieces of it

Where autograd has been, a graph has neither grad modes nor autocast any more, and an input has one value: one that an operator
writes to is left alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from varlen_inductor import _compat_inductor
from varlen_inductor.lowering import joined_gradients
from varlen_inductor.lowering.readers import take_any_strides, ways_out
from varlen_inductor.patterns.nodes import arguments, aten, call_like, calls, same_size, tensor

_ops = torch.ops.varlen_inductor
_convert = torch.ops.prims.convert_element_type.default

MOST_NUMBERS = 2**22
"""In the weights of one product: E up to 1182. Wider ones keep a GPU busy by themselves, and copying their weights costs more."""
MOST_COPIED = 2**26
"""In the weights that are put side by side by one kernel and are then held for the whole graph: 128 MB in half precision."""
ALIGNMENT = 8
"""Numbers of half precision in the 16 bytes that products want their rows and columns to be multiples of."""


def join_products(graph: fx.Graph, device_type: str = "cuda") -> int:
    """Rewrite ``graph`` in place, a graph after autograd whose nodes have fake tensors; how many products have become one."""
    if _compat_inductor.compiles_ahead_of_time():
        return 0
    groups: list[_Forward | _Backward] = [*_forward_groups(graph, device_type), *_backward_groups(graph, device_type)]
    order = {node: place for place, node in enumerate(graph.nodes)}
    groups.sort(key=lambda group: order[group.first])
    biased = [group for group in groups if group.biases]
    weights = dict(zip(map(id, groups), _side_by_side([(group.weights, group.first) for group in groups]), strict=True))
    biases = dict(zip(map(id, biased), _side_by_side([(group.biases, group.first) for group in biased]), strict=True))
    for group in groups:
        group.join(weights[id(group)], biases.get(id(group)))
    return len(groups)


# --- weights ------------------------------------------------------------------------------------------------------------------


def _matrix(node: Any) -> Any:
    """The weight that a node is, transposed twice perhaps."""
    while _transposes(node) and _transposes(node.args[0]):
        node = node.args[0].args[0]
    return node


def _transposes(node: Any) -> bool:
    return calls(node, aten.permute) and list(node.args[1]) == [1, 0]


def _is_constant(node: Any, dims: int) -> bool:
    """Whether a node is an input of known sizes that no operator writes to, perhaps in another dtype."""
    x = tensor(node)
    if x is None or x.dim() != dims or not all(isinstance(n, int) and n % ALIGNMENT == 0 for n in x.shape):
        return False
    source = node.args[0] if node.target is _convert else node
    written = any(getattr(getattr(user.target, "_schema", None), "is_mutable", False) for user in source.users)
    return source.op == "placeholder" and not written


def _side_by_side(groups: Sequence[tuple[list[fx.Node], fx.Node]]) -> list[fx.Node]:
    """For each group the matrix of its weights' rows, or the vector of its biases; a node that is to read it comes second.

    Inputs as they are go into one tensor, whose parts are the results: Inductor copies them in one kernel.
    """
    made: dict[tuple[fx.Node, ...], fx.Node] = {}
    for alike, found in itertools.groupby(groups, lambda group: _alike(group[0])):
        some = [(weights, reader) for weights, reader in found if tuple(weights) not in made]
        if alike is None or _numbers(itertools.chain(*(weights for weights, _ in some))) > MOST_COPIED:
            for weights, reader in some:
                if tuple(weights) not in made:
                    _hoist(weights, reader)
                    with reader.graph.inserting_before(reader):
                        made[tuple(weights)] = call_like(reader, aten.cat.default, weights)
        elif some:
            _copy_together([weights for weights, _ in some], some[0][1], made)
    return [made[tuple(weights)] for weights, _ in groups]


def _copy_together(groups: Sequence[list[fx.Node]], first: fx.Node, made: dict[tuple[fx.Node, ...], fx.Node]) -> None:
    with first.graph.inserting_before(first):
        together = list(dict.fromkeys(map(tuple, groups)))
        whole = call_like(first, aten.cat.default, list(itertools.chain(*together)))
        start = 0
        for weights in together:
            rows = sum(weight.meta["val"].shape[0] for weight in weights)
            made[weights] = call_like(first, aten.slice.Tensor, whole, 0, start, start + rows)
            start += rows


def _hoist(weights: Sequence[fx.Node], reader: fx.Node) -> None:
    """Move what stands behind ``reader`` before it. Nothing but an input is behind a weight."""
    for weight in weights:
        if reader < weight:
            reader.prepend(weight)


def _alike(group: Sequence[fx.Node]) -> Any:
    """What groups must have in common to be copied together; None for one that is copied alone."""
    if any(weight.op != "placeholder" for weight in group):
        return None
    x = group[0].meta["val"]
    return x.dtype, x.device, x.shape[1:]


def _numbers(weights: Iterable[fx.Node]) -> int:
    return sum(math.prod(weight.meta["val"].shape) for weight in weights)


# --- forward ------------------------------------------------------------------------------------------------------------------


@dataclass
class _Forward:
    """Products of the same rows, in their order."""

    products: list[fx.Node]
    weights: list[fx.Node]
    biases: list[fx.Node]

    @property
    def first(self) -> fx.Node:
        return self.products[0]

    def join(self, weight: fx.Node, bias: fx.Node | None) -> None:
        first = self.first
        with first.graph.inserting_before(first):
            columns = call_like(first, aten.permute.default, weight, [1, 0])
            factors = (_rows_of(first), columns) if bias is None else (bias, _rows_of(first), columns)
            whole = call_like(first, first.target, *factors)
            _replace_by_parts(self.products, whole, 1, [node.meta["val"].shape[1] for node in self.products])


def _forward_groups(graph: fx.Graph, device_type: str) -> list[_Forward]:
    """What is between two attentions, or before the first, may be joined: what is made of rows earlier is held longer."""
    groups: dict[Any, _Forward] = {}
    attentions = 0
    for node in graph.nodes:
        if calls(node, _ops.varlen_attn, _ops.varlen_attn_backward, _ops.varlen_attn_backward_joined):
            attentions += 1
        found = _factors(node, device_type)
        if found is None:
            continue
        rows, weight, bias = found
        kept = _kept(node)
        if kept is not None:
            group = groups.setdefault((rows, attentions, bias is None, kept), _Forward([], [], []))
            group.products.append(node)
            group.weights.append(weight)
            group.biases.extend([] if bias is None else [bias])
    return [group for group in groups.values() if len(group.products) > 1 and _numbers(group.weights) <= MOST_NUMBERS]


def _factors(node: fx.Node, device_type: str) -> tuple[fx.Node, fx.Node, fx.Node | None] | None:
    """Packed rows, the weight (N, K) and the bias (N,), if a node is the product of such."""
    if not _is_product(node):
        return None
    bias: Any = node.args[0] if calls(node, aten.addmm) else None
    rows: Any = _rows_of(node)
    columns: Any = _factor(node)
    weight: Any = _matrix(columns.args[0]) if _transposes(columns) else None
    if not _is_constant(weight, 2) or not (bias is None or _is_constant(bias, 1)):
        return None
    x, result = rows.meta["val"], node.meta["val"]
    if x.device.type != device_type or not isinstance(x.shape[0], torch.SymInt) or weight is bias:
        return None
    if any(y.meta["val"].dtype != result.dtype for y in (rows, weight, *([] if bias is None else [bias]))):
        return None
    return rows, weight, bias


def _kept(node: fx.Node) -> bool | None:
    """Whether a product is kept for the backward; None if it must stay what it is: a result of the user's, or read by its strides.

    One that is kept keeps those that are joined with it.
    """
    places = ways_out(node)
    if places & _compat_inductor.results_of_the_user(node.graph):
        return None
    return bool(places) if take_any_strides(node.users, results=True) else None


def _replace_by_parts(nodes: Sequence[fx.Node], whole: fx.Node, dim: int, sizes: Sequence[int]) -> None:
    """Replace the nodes by consecutive parts of ``whole``, and erase them."""
    starts = itertools.accumulate(sizes, initial=0)
    parts = [
        call_like(node, aten.slice.Tensor, whole, dim, start, start + size)
        for node, start, size in zip(nodes, starts, sizes, strict=False)
    ]
    for node, part in zip(nodes, parts, strict=True):
        node.replace_all_uses_with(part)
        node.graph.erase_node(node)


# --- backward -----------------------------------------------------------------------------------------------------------------


@dataclass
class _Backward:
    """What is made of the gradients of query, key and value, three of each kind, in this order.

    ``products`` are those with ``weights``, which are added up, and perhaps to something else: see `_adds_up`.
    """

    attention: fx.Node
    products: list[fx.Node]
    weights: list[fx.Node]
    of_weights: list[fx.Node]
    """Their products with the rows that the weights were multiplied with; empty if they are not all there."""
    sums: list[fx.Node]
    """Over their rows; likewise."""
    biases: tuple[()] = ()

    @property
    def first(self) -> fx.Node:
        return min(self.products)

    def join(self, weight: fx.Node, bias: fx.Node | None) -> None:
        joined = joined_gradients.join(self.attention)
        _add_up_once(sorted(self.products), joined, weight)
        widths = [weight.meta["val"].shape[0] for weight in self.weights]
        if self.of_weights:
            first = min(self.of_weights)
            with first.graph.inserting_before(first):
                columns = call_like(first, aten.permute.default, joined, [1, 0])
                whole = call_like(first, aten.mm.default, columns, first.args[1])
                _replace_by_parts(self.of_weights, whole, 0, widths)
        if self.sums:
            first = min(self.sums)
            keepdim = arguments(first)["keepdim"]
            with first.graph.inserting_before(first):
                whole = call_like(first, aten.sum.dim_IntList, joined, [0], keepdim, dtype=arguments(first)["dtype"])
                _replace_by_parts(self.sums, whole, int(keepdim), widths)


def _backward_groups(graph: fx.Graph, device_type: str) -> list[_Backward]:
    found = (
        _backward_group(attention)
        for attention in graph.find_nodes(op="call_function", target=_ops.varlen_attn_backward.default)
        if attention.args[5].meta["val"].device.type == device_type
    )
    return [group for group in found if group is not None]


def _backward_group(attention: fx.Node) -> _Backward | None:
    gradients = joined_gradients.matrices(attention)
    if gradients is None or not joined_gradients.may_be_columns(attention):
        return None
    products = [product for gradient in gradients for product in _products_with_weights(gradient)]
    if len(products) != 3 or len({_rows_of(product) for product in products}) != 3 or not _adds_up(sorted(products)):
        return None
    weights = [_matrix(_factor(product)) for product in products]
    if len({weight.meta["val"].shape[1] for weight in weights}) != 1 or _numbers(weights) > MOST_NUMBERS:
        return None
    if not joined_gradients.writes_in_place(attention):
        return None
    of_weights = _one_each(gradients, _rows_multiplied, lambda node: (node.args[1], node.meta["val"].dtype))
    sums = _one_each(gradients, _rows_summed, lambda node: (arguments(node)["keepdim"], arguments(node)["dtype"]))
    return _Backward(attention, products, weights, of_weights, sums)


def _products_with_weights(gradient: fx.Node) -> list[fx.Node]:
    """The products of a gradient (T, N) with weights (N, K)."""
    return [user for user in gradient.users if _multiplies(user, gradient)]


def _multiplies(node: fx.Node, gradient: fx.Node) -> bool:
    if not _is_product(node) or _rows_of(node) is not gradient or not _is_constant(_matrix(_factor(node)), 2):
        return False
    dtypes = {x.meta["val"].dtype for x in (gradient, _matrix(_factor(node)), node)}
    return len(dtypes) == 1 and isinstance(gradient.meta["val"].shape[0], torch.SymInt)


def _is_product(node: fx.Node) -> bool:
    """Of two matrices, added to another perhaps, neither scaled."""
    return calls(node, aten.mm, aten.addmm) and all(arguments(node).get(name, 1) == 1 for name in ("alpha", "beta"))


def _rows_of(product: fx.Node) -> Any:
    return product.args[0 if calls(product, aten.mm) else 1]


def _factor(product: fx.Node) -> Any:
    return product.args[1 if calls(product, aten.mm) else 2]


def _adds_up(products: Sequence[fx.Node]) -> bool:
    """Whether these products, in their order, are added up and nothing else is made of them, in one of two ways:

    * each is added to the one before it: ``addmm(addmm(%r, ...), ...)``, or with ``mm`` innermost;
    * each is converted and added by an operator of its own, as autocast does: ``add(add(%r, to(mm(...))), to(mm(...)))``.
    """
    if any(calls(product, aten.addmm) for product in products):
        return all(
            calls(after, aten.addmm) and after.args[0] is before and list(before.users) == [after] and _factor(after) is not before
            for before, after in itertools.pairwise(products)
        )
    terms = [_converted(product) for product in products]
    readers = [next(iter(term.users)) if term is not None and len(term.users) == 1 else None for term in terms]
    if None in readers or len({term.meta["val"].dtype for term in terms if term is not None}) != 1:
        return False
    left = {reader for reader in readers if reader is not None}
    at = min(left)
    while _adds(at):
        left.discard(at)
        if not left:
            return True
        if len(at.users) != 1:
            return False
        at = next(iter(at.users))
    return False


def _converted(product: fx.Node) -> fx.Node | None:
    """What a product is converted to, if nothing else is made of it."""
    (reader, *others) = product.users
    return reader if not others and reader.target is _convert else None


def _adds(node: fx.Node) -> bool:
    """Whether a node is the sum of two different nodes of the same form."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
        return False
    x, y = (tensor(each) for each in (node, *node.all_input_nodes[:1]))
    z = tensor(node.all_input_nodes[1])
    if x is None or y is None or z is None or x.dtype != y.dtype or x.dtype != z.dtype or not x.dim() == y.dim() == z.dim() == 2:
        return False
    return all(same_size(a, b) and same_size(a, c) for a, b, c in zip(x.shape, y.shape, z.shape, strict=True))


def _add_up_once(products: Sequence[fx.Node], joined: fx.Node, weight: fx.Node) -> None:
    """Replace the sum of these products, which are in their order, by one product."""
    *others, last = products
    if calls(last, aten.addmm):
        first = products[0]
        addend = () if calls(first, aten.mm) else (first.args[0],)
        with last.graph.inserting_before(last):
            made = call_like(last, first.target, *addend, joined, weight)
        last.replace_all_uses_with(made)
        for node in reversed(products):
            node.graph.erase_node(node)
        return
    with last.graph.inserting_before(last):
        made = call_like(last, aten.mm.default, joined, weight)
    last.replace_all_uses_with(made)
    last.graph.erase_node(last)
    for product in others:
        (term,) = product.users
        (total,) = term.users
        (rest,) = (node for node in total.all_input_nodes if node is not term)
        total.replace_all_uses_with(rest)
        for node in (total, term, product):
            node.graph.erase_node(node)


def _one_each(
    gradients: Sequence[fx.Node], find: Callable[[fx.Node], list[fx.Node]], form: Callable[[fx.Node], Any]
) -> list[fx.Node]:
    """The only node that ``find`` finds for each of the gradients, if all are of one form; else nothing."""
    found = [find(gradient) for gradient in gradients]
    if any(len(nodes) != 1 for nodes in found) or len({form(node) for (node,) in found}) != 1:
        return []
    return [node for (node,) in found]


def _rows_multiplied(gradient: fx.Node) -> list[fx.Node]:
    transposed = [user for user in gradient.users if _transposes(user)]
    return [node for user in transposed for node in user.users if calls(node, aten.mm) and node.args[0] is user is not node.args[1]]


def _rows_summed(gradient: fx.Node) -> list[fx.Node]:
    sums = [node for node in gradient.users if node.target is aten.sum.dim_IntList]
    return [node for node in sums if [dim % 2 for dim in arguments(node)["dim"] or ()] == [0]]
