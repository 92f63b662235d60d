"""What padded rows are known to hold.

Multiplying by the mask, ``where`` and ``masked_fill`` make the padded rows of a value a known constant, whatever they held
before (rule 1 of the contract: only with the domain's own predicate and polarity). The constant is carried through later
pointwise operations by computing them on it. A known row needs nothing of its inputs' padded rows, and an unpack fills it in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .dims import leaves
from .domain import Domain, layout_of, touches
from .masks.scores import HIDES, SURELY_HIDES
from .oprules import POINTWISE, Args, Typing, is_tensor, op_name

if TYPE_CHECKING:
    from .maskvalue import MaskValues

Number = int | float | bool
# Row-wise and value-preserving: the constant passes through unchanged.
_CARRIES = frozenset(
    "view reshape _unsafe_view unflatten flatten transpose swapaxes permute t unsqueeze squeeze expand expand_as clone contiguous "
    "detach alias movedim".split()
)
_SCORES = frozenset("linear addmm mm bmm matmul baddbmm einsum sum mean tanh".split())
_RANDOM = frozenset({"dropout", "alpha_dropout", "native_dropout", "bernoulli", "rand_like", "randn_like"})


class PadValues:
    """The constant that each value's padded rows hold, where it is known.

    Args:
        graph: the graph.
        table: the dimension typing of its nodes.
        domain: whose padded rows.
        mask_value: the value of a node that depends only on masks and positions, at padded rows; None if it is not one constant.
        boundaries: values whose storage is written somewhere: what they hold depends on when they are read.
        may_presume: whether facts about the data may be presumed, to be checked before the graph runs.

    ``nonempty`` are the nodes whose value presumes that every sequence has a valid position; ``assumptions`` says in words what
    is presumed and cannot be checked.
    """

    def __init__(
        self,
        graph: fx.Graph,
        table: Mapping[fx.Node, Typing],
        domain: Domain,
        mask_value: MaskValues,
        boundaries: frozenset[fx.Node] = frozenset(),
        may_presume: bool = False,
    ) -> None:
        self._table = table
        self._domain = domain
        self._mask_value = mask_value
        self._values: dict[fx.Node, Number] = {}
        self._may_presume = may_presume
        self.nonempty: list[fx.Node] = []
        self.assumptions: list[str] = []
        for node in graph.nodes:
            value = None if node in boundaries else self._compute(node)
            if value is not None:
                self._values[node] = value

    def known(self, node: fx.Node) -> bool:
        return node in self._values

    def value(self, node: fx.Node) -> Number | None:
        return self._values.get(node)

    def _compute(self, node: fx.Node) -> Number | None:
        if node.op != "call_function" or not is_tensor(node):
            given = node.op == "placeholder" and self._carries(node) and _is_mask_like(node)
            return self._mask_value(node) if given else None
        if not self._carries(node):
            return None
        name = op_name(node)
        if name in _CARRIES:
            source = node.args[0]
            return self._values.get(source) if isinstance(source, fx.Node) else None
        if name == "dropout":
            return 0 if self._values.get(node.args[0]) == 0 else None  # type: ignore[arg-type]
        if name in ("softmax", "_softmax"):
            return self._weight(node)
        value = self._absorbed(node, name)
        if value is None and name in POINTWISE and name not in _RANDOM:
            value = self._folded(node)
        if value is None and _is_mask_like(node):
            value = self._mask_value(node)
        return value

    def _carries(self, node: fx.Node) -> bool:
        return layout_of(self._table[node].dims, self._domain) is not None

    def _absorbed(self, node: fx.Node, name: str) -> Number | None:
        """The constant that an operation makes of a row, whatever the row held."""
        if name == "mul":
            if any(is_tensor(x) and self._operand(x) == 0 for x in node.args[:2]):
                return 0
        elif name in ("masked_fill", "where"):
            a = Args(node, self._table)
            condition = self._operand(a["mask" if name == "masked_fill" else "condition"])
            if condition is None:
                return None
            if name == "masked_fill":
                chosen = a["value"] if condition else a["self"]
            else:
                chosen = a["self"] if condition else a["other"]
            value = self._operand(chosen)
            return None if value is None else _cast(value, node)
        elif name in ("__and__", "bitwise_and", "logical_and") and node.meta["val"].dtype == torch.bool:
            return False if any(self._operand(x) is False for x in node.args[:2]) else None
        return None

    def _weight(self, node: fx.Node) -> Number | None:
        """A softmax over positions gives padded ones no weight if their scores are far below all others.

        Where no other score is higher it gives them all the same, or NaN if they are minus infinity.
        """
        a = Args(node, self._table)
        score, dims = self._values.get(a[0]), a.dims(0)
        if score is None or not score <= HIDES or leaves(dims[a["dim"] % len(dims)]) != self._domain.position:
            return None
        if score != -math.inf:
            if not self._may_presume or not self._others_are_scores(a[0]):
                return None
            self.nonempty.append(node)
            if score > max(SURELY_HIDES, torch.finfo(node.meta["val"].dtype).min):
                self.assumptions.append(f"a score of {score:g} weighs nothing in {node.name}: the other scores are far above it")
        return 0

    def _others_are_scores(self, node: fx.Node) -> bool:
        """Whether ``node`` fills padded rows, and those alone, while valid ones keep what a product or a sum has given."""
        node = _behind_views(node)
        name = op_name(node)
        if name not in ("masked_fill", "where"):
            return False
        a = Args(node, self._table)
        condition = a["mask" if name == "masked_fill" else "condition"]
        valid, padded = self._mask_value.at_valid(condition), self._operand(condition)
        if valid is None or padded is None or bool(valid) == bool(padded):
            return False
        kept = a["other"] if name == "where" and not valid else a["self"]
        return is_tensor(kept) and op_name(_behind_views(kept)) in _SCORES

    def _operand(self, x: Any) -> Number | None:
        """The value of an operand at padded rows: its constant, or that of a scalar that is the same everywhere."""
        if isinstance(x, (bool, int, float)):
            return x
        if not is_tensor(x):
            return None
        if x in self._values:
            return self._values[x]
        if not touches(self._table[x].dims, self._domain):
            return _scalar(x)
        return None

    def _folded(self, node: fx.Node) -> Number | None:
        """Run a pointwise operation on the constants of its operands."""
        if not any(is_tensor(x) and x in self._values for x in node.all_input_nodes):
            return None

        def constant(x: fx.Node) -> torch.Tensor:
            value = self._operand(x)
            if value is None or not is_tensor(x):
                raise LookupError(x.name)
            # Tensors without dimensions have less of a say in the dtype of the result than others.
            return torch.full((1,) if x.meta["val"].dim() else (), value, dtype=x.meta["val"].dtype)

        try:
            args = fx.map_arg(node.args, constant)
            kwargs = {k: v for k, v in fx.map_arg(node.kwargs, constant).items() if k != "device"}
            with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
                result = node.target(*args, **kwargs)  # type: ignore[operator]
            return result.to(node.meta["val"].dtype).item()  # type: ignore[no-any-return]
        except (LookupError, RuntimeError, TypeError):
            return None


def _behind_views(node: fx.Node) -> fx.Node:
    """What ``node`` shows, in whatever shape, dtype and scale."""
    while op_name(node) in _CARRIES | {"to", "_to_copy", "type_as", "float"} or _is_scaled(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_scaled(node: fx.Node) -> bool:
    return op_name(node) in ("mul", "div") and isinstance(node.args[1], (int, float))


def _is_mask_like(node: fx.Node) -> bool:
    """Whether no gradient flows through it: a constant in place of its padded rows must not cut one off."""
    value = node.meta["val"]
    return not (value.is_floating_point() or value.is_complex()) or not node.meta.get("requires_grad", True)


def _scalar(node: fx.Node) -> Number | None:
    """The value of a literal scalar tensor (``full``, ``scalar_tensor``, ``zeros(())``), else None."""
    if node.op != "call_function":
        return None
    name = op_name(node)
    fill: Any = None
    if name in ("full", "scalar_tensor", "full_like", "new_full"):
        fill = node.args[{"full": 1, "scalar_tensor": 0, "full_like": 1, "new_full": 2}[name]]
    elif name in ("zeros", "zeros_like", "new_zeros"):
        fill = 0
    elif name in ("ones", "ones_like", "new_ones"):
        fill = 1
    return _cast(fill, node) if isinstance(fill, (bool, int, float)) else None


def _cast(value: Number, node: fx.Node) -> Number:
    """``value`` as the dtype of ``node`` holds it (``finfo(float32).min`` is −inf in bfloat16)."""
    with torch.utils._python_dispatch._disable_current_modes():
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None).to(node.meta["val"].dtype).item()


def is_finite(value: Number) -> bool:
    return math.isfinite(value)
