"""From the softmax on: the weights, on their way to the product with the values.

%w = softmax(...)            the weights
%w = to(%w, bfloat16)        cast down, if the softmax was computed in float32
%w = dropout(%w, 0.1, True)
%y = matmul(%w, %v)          where the walk ends
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from ..literals import number_of
from ..nodes import arguments, aten, calls, operator_name, same_size, shape
from .candidate import Facts, NotAttention

_SAME = (aten.to, aten._to_copy, aten.type_as, aten.contiguous, aten.clone, aten.alias)
_VIEWS = (aten.view, aten.reshape, aten._unsafe_view, aten.expand, aten.unflatten, aten.flatten)
_PRODUCTS = (aten.matmul, aten.bmm)


@dataclass
class Weights:
    """What becomes of the weights.

    Attributes:
        product: the matrix product with the values.
        value: its second factor.
        passed: the nodes from the softmax to before the product.
        dropout_p: with which probability a weight is dropped.
        zeroed: masks whose weights are set to 0 after the softmax.
    """

    product: fx.Node
    value: fx.Node
    passed: list[fx.Node] = field(default_factory=list)
    dropout_p: float = 0.0
    zeroed: list[fx.Node] = field(default_factory=list)


def follow(softmax: fx.Node, facts: Facts) -> Weights | None:
    """Follow the weights to their product; None if they never meet one.

    Raises:
        NotAttention: something on the way is not part of attention.
    """
    passed: list[fx.Node] = [softmax]
    zeroed: list[fx.Node] = []
    dropout_p = 0.0
    while True:
        current = passed[-1]
        product = _product(current, facts)
        if product is not None:
            return Weights(product, product.args[1], passed, dropout_p, zeroed)  # type: ignore[arg-type]
        following = [u for u in current.users if u in facts.live and u.args and u.args[0] is current]
        step = next((u for u in following if _is_step(u)), None)
        if step is None:
            if any(_reaches_product(u, facts, 6) for u in following):
                raise NotAttention(f"its weights go through {_names(following)} before they are multiplied with the values")
            return None
        if calls(step, aten.dropout) and arguments(step)["train"]:
            if dropout_p:
                raise NotAttention("its weights pass dropout twice")
            dropout_p = float(arguments(step)["p"])
        if calls(step, aten.masked_fill):
            zeroed.append(arguments(step)["mask"])
        passed.append(step)


def _product(node: fx.Node, facts: Facts) -> fx.Node | None:
    products = [u for u in node.users if u in facts.live and calls(u, *_PRODUCTS) and u.args[0] is node]
    if len(products) > 1:
        raise NotAttention("its weights are multiplied with more than one tensor of values")
    return products[0] if products else None


def _is_step(node: fx.Node) -> bool:
    if calls(node, *_SAME, aten.dropout):
        return True
    if calls(node, *_VIEWS):
        return all(map(same_size, shape(node)[-2:], shape(node.args[0])[-2:]))  # type: ignore[arg-type]
    if calls(node, aten.masked_fill):
        return number_of(arguments(node)["value"]) == 0
    # 0 in place of the NaN of a query that sees no key.
    return calls(node, aten.nan_to_num) and arguments(node)["nan"] in (None, 0.0)


def _reaches_product(node: fx.Node, facts: Facts, depth: int) -> bool:
    if depth == 0 or node not in facts.live:
        return False
    if calls(node, *_PRODUCTS):
        return True
    value = node.meta.get("val")
    elementwise = hasattr(value, "shape") and len(shape(node)) >= 3
    return elementwise and any(_reaches_product(u, facts, depth - 1) for u in node.users if u.args and u.args[0] is node)


def _names(nodes: list[fx.Node]) -> str:
    return " and ".join(sorted({operator_name(n) for n in nodes}))
