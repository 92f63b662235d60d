"""Products of the same packed rows with several weights become one, forward and backward.

A model with three projections, to query, key and value, multiplies the same rows three times. One product with three times as many
columns keeps a GPU busier, and is launched once. The weights are put side by side first (inputs as they are by one kernel for the
whole graph), which costs little as long as they are small beside the rows. Each number of the result is the sum of the same
products as before.

    before                                       after
    %q = addmm(%bq, %x, %wq.t())                 %w = cat([%wq, %wk, %wv])                  # (3 * E, E)
    %k = addmm(%bk, %x, %wk.t())                 %b = cat([%bq, %bk, %bv])
    %v = addmm(%bv, %x, %wv.t())                 %y = addmm(%b, %x, %w.t())                 # (T, 3 * E)
                                                 %q, %k, %v = %y[:, :E], %y[:, E:2 * E], %y[:, 2 * E:]

In the backward the kernel of the attention writes the three gradients side by side (see `joined_gradients`), and three times three
products and sums become three:

    %gq, %gk, %gv = varlen_attn_backward(...)    %g = varlen_attn_backward_joined(...)      # (T, 3 * E)
    %a = add(%r, mm(%gv, %wv))                   %w = cat([%wq, %wk, %wv])
    %b = add(%a, mm(%gk, %wk))
    %c = add(%b, mm(%gq, %wq))                   %c = add(%r, mm(%g, %w))
    mm(%gq.t(), %x), ...                         %dw = mm(%g.t(), %x)                       # and rows of it
    sum(%gq, [0]), ...                           %db = sum(%g, [0])                         # and pieces of it

The gradients of such weights are slices of one tensor, as are those of biases in `row_sums`.

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

from varlen_inductor import _compat, _compat_inductor
from varlen_inductor.lowering import joined_gradients
from varlen_inductor.lowering.readers import take_any_strides, ways_out
from varlen_inductor.patterns.nodes import arguments, aten, call_like, calls, same_size, tensor

_ops = torch.ops.varlen_inductor
_convert = torch.ops.prims.convert_element_type.default

MOST_NUMBERS = 2**22
"""In the weights of one product: E up to 1182. A guess: E 768 was measured (BERT in docs/benchmarks), and wider products keep a GPU
busy by themselves, while copying their weights costs more."""
MOST_COPIED = 2**26
"""In weights that are put side by side by one kernel and are then held for the whole graph: 128 MB in half precision."""
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
    """Only products that come one after another are joined: what is made of rows earlier is held longer."""
    packed = _packed_rows(graph)
    groups: dict[Any, _Forward] = {}
    stretch, last = 0, None
    for node in graph.nodes:
        rows = _rows_of(node) if _is_product(node) else node if _multiplies_otherwise(node) else None
        if rows is None:
            continue
        stretch, last = stretch + (rows is not last), rows
        found = _factors(node, device_type, packed)
        kept = None if found is None else _kept(node)
        if found is not None and kept is not None:
            weight, bias = found
            group = groups.setdefault((stretch, bias is None, kept), _Forward([], [], []))
            group.products.append(node)
            group.weights.append(weight)
            group.biases.extend([] if bias is None else [bias])
    return [group for group in groups.values() if len(group.products) > 1 and _is_cheap(group.weights, _rows_of(group.first))]


def _packed_rows(graph: fx.Graph) -> list[Any]:
    """The numbers of rows of the operands of packed attentions."""
    found: list[Any] = []
    for node in graph.nodes:
        operands = node.args[:3] if calls(node, *_FORWARDS) else node.args[5:8] if calls(node, *_BACKWARDS) else ()
        found.extend(x.meta["val"].shape[0] for x in operands)
    return found


_FORWARDS = (_ops.varlen_attn, _ops.varlen_attn_drawn)
_BACKWARDS = (_ops.varlen_attn_backward, _ops.varlen_attn_backward_joined)


def _multiplies_otherwise(node: fx.Node) -> bool:
    return calls(node, aten.mm, aten.addmm, aten.bmm, aten.baddbmm, *_FORWARDS, *_BACKWARDS)


def _is_cheap(weights: Sequence[fx.Node], rows: fx.Node) -> bool:
    """Whether weights are small enough to be put side by side for one product with ``rows``: have no more rows themselves."""
    number = _compat.hint(rows.meta["val"].shape[0])
    return number is not None and sum(w.meta["val"].shape[0] for w in weights) <= number and _numbers(weights) <= MOST_NUMBERS


def _is_product(node: fx.Node) -> bool:
    """Of two matrices, added to another perhaps, neither scaled nor in another dtype."""
    return node.target in (_mm, _addmm) and all(arguments(node).get(name, 1) == 1 for name in ("alpha", "beta"))


_mm, _addmm = aten.mm.default, aten.addmm.default


def _rows_of(product: fx.Node) -> Any:
    return product.args[0 if product.target is _mm else 1]


def _factor(product: fx.Node) -> Any:
    return product.args[1 if product.target is _mm else 2]


def _factors(node: fx.Node, device_type: str, packed: Sequence[Any]) -> tuple[fx.Node, fx.Node | None] | None:
    """The weight (N, K) and the bias (N,), if a node is the product of packed rows with such."""
    if not _is_product(node):
        return None
    bias: Any = node.args[0] if node.target is _addmm else None
    rows, columns = _rows_of(node), _factor(node)
    weight: Any = _matrix(columns.args[0]) if _transposes(columns) else None
    if not _is_constant(weight, 2) or not (bias is None or _is_constant(bias, 1)):
        return None
    x = rows.meta["val"]
    if x.device.type != device_type or not _is_packed(x, packed):
        return None
    if any(y.meta["val"].dtype != x.dtype for y in (node, weight, *([] if bias is None else [bias]))):
        return None
    return weight, bias


def _is_packed(x: torch.Tensor, packed: Sequence[Any]) -> bool:
    return isinstance(x.shape[0], torch.SymInt) and any(same_size(x.shape[0], number) for number in packed)


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
        _add_up_once(self.products, joined, weight)
        widths = [weight.meta["val"].shape[0] for weight in self.weights]
        if self.of_weights:
            first = min(self.of_weights)
            with first.graph.inserting_before(first):
                columns = call_like(first, aten.permute.default, joined, [1, 0])
                whole = call_like(first, _mm, columns, first.args[1])
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
    if [_rows_of(product) for product in products] != gradients or not _adds_up(products):
        return None
    weights = [_matrix(_factor(product)) for product in products]
    if not _is_cheap(weights, gradients[0]) or not joined_gradients.writes_in_place(attention):
        return None
    of_weights = _one_each(gradients, _rows_multiplied, lambda node: node.args[1])
    sums = _one_each(gradients, _rows_summed, lambda node: (arguments(node)["keepdim"], arguments(node)["dtype"]))
    return _Backward(attention, products, weights, of_weights, sums)


def _products_with_weights(gradient: fx.Node) -> list[fx.Node]:
    """The products of a gradient (T, N) with weights (N, K)."""
    return [user for user in gradient.users if _multiplies(user, gradient)]


def _multiplies(node: fx.Node, gradient: fx.Node) -> bool:
    if not _is_product(node) or _rows_of(node) is not gradient or not _is_constant(_matrix(_factor(node)), 2):
        return False
    same = {x.meta["val"].dtype for x in (gradient, _matrix(_factor(node)), node)}
    return len(same) == 1 and isinstance(gradient.meta["val"].shape[0], torch.SymInt)


def _adds_up(products: Sequence[fx.Node]) -> bool:
    """Whether these products are added up, and to anything else, and nothing is made of them or of what is added up so far.

    One way is ``add(add(%r, mm(...)), mm(...))``, where each may be converted before it is added, as autocast does; the other is
    ``addmm(addmm(%r, ...), ...)``, perhaps with ``mm`` innermost.
    """
    sums = [_sum_with(product) for product in products]
    left = {node for node in sums if node is not None}
    if None in sums or len({node.meta["val"].dtype for node in left}) != 1:
        return False
    at = min(left)
    if at.target is _addmm and at not in products:  # another product, to which the first of these is added
        return False
    while True:
        left.discard(at)
        if not left:
            return True
        if len(at.users) != 1:
            return False
        below, at = at, next(iter(at.users))
        if not (_adds(at) or (_is_product(at) and at.args[0] is below and at.target is _addmm and at in products)):
            return False


def _sum_with(product: fx.Node) -> fx.Node | None:
    """The node that adds a product to something else, which may be the product itself; None if more than that is made of it."""
    if product.target is _addmm:
        return product if _same_form(product, product.args[0]) else None
    term = _term(product)
    readers = list(term.users)
    if len(readers) != 1 or _factor_or_rows(readers[0], term):
        return None
    (reader,) = readers
    return reader if _adds(reader) or (_is_product(reader) and reader.target is _addmm) else None


def _factor_or_rows(node: fx.Node, operand: fx.Node) -> bool:
    return _is_product(node) and operand in (_rows_of(node), _factor(node))


def _term(product: fx.Node) -> fx.Node:
    """A product, or what it is converted to, if nothing else is made of it."""
    readers = list(product.users)
    return readers[0] if len(readers) == 1 and readers[0].target is _convert else product


def _adds(node: fx.Node) -> bool:
    """Whether a node is the sum of two different nodes of its form."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
        return False
    return all(_same_form(node, each) for each in node.all_input_nodes)


def _same_form(a: Any, b: Any) -> bool:
    """Whether two nodes are matrices of the same dtype and sizes."""
    x, y = tensor(a), tensor(b)
    if x is None or y is None or x.dtype != y.dtype or not x.dim() == y.dim() == 2:
        return False
    return all(same_size(n, m) for n, m in zip(x.shape, y.shape, strict=True))


def _add_up_once(products: Sequence[fx.Node], joined: fx.Node, weight: fx.Node) -> None:
    """Replace the sum of these products by one product: each but the last of the sum is taken out, the last is made of all.

    All new nodes are made before the sum is touched, for to make one may fail, and the sum must not lose terms then.
    """
    left = sorted(products, key=lambda product: (_sum_with(product), product))
    last = left[-1]
    with last.graph.inserting_before(last):
        made = call_like(last, last.target, *last.args[: len(last.args) - 2], joined, weight)
        made_alone = call_like(last, _mm, joined, weight)
    alone = {}
    for product in left:
        if product.target is _addmm:
            with product.graph.inserting_before(product):
                alone[product] = call_like(product, _mm, *product.args[1:3])
    while len(left) > 1:
        product = left.pop(0)
        if product.target is _addmm:
            product.replace_all_uses_with(product.args[0])  # type: ignore[arg-type]
            product.graph.erase_node(product)
            continue
        term = _term(product)
        total = next(node for node in term.users if node is not made)
        if total.target is _addmm:
            # It was innermost; now the product that it was added to is.
            rest = alone.pop(total)
            left[left.index(total)] = rest
            if total is last:
                last.graph.erase_node(made)
                made = made_alone
        else:
            (rest,) = (node for node in total.all_input_nodes if node is not term)
        total.replace_all_uses_with(rest)
        for node in dict.fromkeys((total, term, product)):
            node.graph.erase_node(node)
    (last,) = left
    last.replace_all_uses_with(made)
    for node in (last, *alone.values(), *([] if made is made_alone else [made_alone])):
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
    products = [
        node for user in transposed for node in user.users if node.target is _mm and node.args[0] is user is not node.args[1]
    ]
    return [node for node in products if node.meta["val"].dtype == gradient.meta["val"].dtype]


def _rows_summed(gradient: fx.Node) -> list[fx.Node]:
    sums = [node for node in gradient.users if node.target is aten.sum.dim_IntList]
    return [node for node in sums if [dim % 2 for dim in arguments(node)["dim"] or ()] == [0]]
