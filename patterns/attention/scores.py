"""Back from the softmax to the product of queries and keys: scale, masks and casts, in whatever order they were written.

%s = matmul(%q, %kt)               the product, where the walk ends
%s = mul(%s, 0.125)                scale
%s = mul(tanh(div(%s, 50)), 50)    softcap
%s = add(%s, %mask)                mask: add
%s = masked_fill(%s, %c, -inf)     mask: fill
%s = where(%c, %s, -1e9)           mask: where_keep
%s = to(%s, float32)               cast up
%w = softmax(%s, -1)               where the walk begins
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import fx

from varlen_inductor import _compat

from ..literals import number_of
from ..masks import MaskOp
from ..nodes import arguments, aten, calls, operator_name, same_size, shape
from .candidate import NotAttention

_SAME = (aten.to, aten._to_copy, aten.type_as, aten.contiguous, aten.clone, aten.alias)
_VIEWS = (aten.view, aten.reshape, aten._unsafe_view, aten.unflatten, aten.flatten)
_PRODUCTS = (aten.matmul, aten.bmm, aten.baddbmm)
_NEAR_PRODUCT = (
    *_SAME, *_VIEWS, aten.mul, aten.div, aten.add, aten.sub, aten.rsub, aten.neg, aten.masked_fill, aten.where, aten.expand,
    aten.tanh, aten.clamp, aten.dropout, aten.relu, aten.add_, aten.mul_, aten.div_, aten.masked_fill_, aten.sub_, aten.fill_,
    aten.maximum, aten.minimum, aten.index_put, aten.index_put_, aten.slice_scatter, aten.select_scatter, aten.copy_,
    aten.square, aten.pow,
)  # fmt: skip


SMALLEST_CAP, LARGEST_CAP = 1e-3, 4000.0
"""Kernels compute with a cap in float32. Up to the largest, every mask that is taken to hide a key does (`masks.scores.HIDES`)."""


@dataclass
class Scores:
    """What is done to the product of queries and keys before the softmax.

    Attributes:
        product: the matrix product.
        query, key_transposed: its factors.
        scale: factor on the product.
        softcap: if above 0, the scaled product s becomes softcap * tanh(s / softcap), before any mask.
        factors: further factors, one value per row of queries, that are known only when the graph runs: nodes, and
            whether the product is divided by them.
        mask_ops: on the scaled scores, the innermost first.
        mask_shapes: the shape of the scores at each of them.
        dtypes: in which the masks are applied; that of the product if there are none.  Just one.
        passed: the nodes from the product to before the softmax.
    """

    product: fx.Node
    query: fx.Node
    key_transposed: fx.Node
    scale: float = 1.0
    softcap: float = 0.0
    factors: list[tuple[fx.Node, bool]] = field(default_factory=list)
    mask_ops: list[MaskOp] = field(default_factory=list)
    mask_shapes: list[tuple[object, ...]] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)
    passed: list[fx.Node] = field(default_factory=list)


def comes_from_product(node: object, depth: int = 12) -> bool:
    """Whether a matrix product lies behind `node`, with nothing but arithmetic in between."""
    if not isinstance(node, fx.Node) or depth == 0:
        return False
    if calls(node, *_PRODUCTS):
        return True
    return calls(node, *_NEAR_PRODUCT) and any(comes_from_product(a, depth - 1) for a in node.all_input_nodes)


def trace(scores: fx.Node) -> Scores:
    """Walk back from `scores`, the argument of a softmax, to the product; `comes_from_product` must hold.

    Raises:
        NotAttention: something on the way is not part of attention, or not in an order that can be undone.
    """
    walk = _Walk()
    node = scores
    while not calls(node, *_PRODUCTS):
        walk.passed.append(node)
        node = walk.step(node)
    return walk.finish(node)


class _Walk:
    """The state of the walk; `scale` is the product of the factors applied after what is still to come."""

    def __init__(self) -> None:
        self.scale = 1.0
        self.softcap = 0.0
        self.factors: list[tuple[fx.Node, bool]] = []
        self.factor_ranks: set[int] = set()
        self.mask_ops: list[MaskOp] = []
        self.mask_shapes: list[tuple[object, ...]] = []
        self.dtypes: set[torch.dtype] = set()
        self.cast_down = False
        self.passed: list[fx.Node] = []

    def step(self, node: fx.Node) -> fx.Node:
        """Take account of `node` and return the scores that it was applied to."""
        if calls(node, *_SAME, *_VIEWS):
            return self._unchanged(node)
        if calls(node, aten.mul, aten.div):
            return self._scaled(node)
        if calls(node, aten.add):
            return self._added(node)
        if calls(node, aten.masked_fill):
            given = arguments(node)
            self._mask(node, MaskOp("fill", given["mask"], self._filled_with(given["value"])))
            return given["self"]  # type: ignore[no-any-return]
        if calls(node, aten.where):
            return self._chosen(node)
        if calls(node, aten.tanh):
            return self._capped(node)
        raise NotAttention(f"its scores go through {operator_name(node)} before the softmax")

    def finish(self, product: fx.Node) -> Scores:
        query, key_transposed = product.args[:2]
        if calls(product, aten.baddbmm):
            bias, query, key_transposed = product.args[:3]
            given = arguments(product)
            if given["beta"] != 0:
                if given["beta"] != 1:
                    raise NotAttention("baddbmm scales its mask (beta)")
                self._mask(product, self._add(bias))  # type: ignore[arg-type]
            self.scale *= given["alpha"]
        if self.softcap:
            self.scale *= self.softcap  # c * tanh(a * x) is c * tanh(s * x / c) with s = c * a
        if not math.isfinite(self.scale):
            raise NotAttention("its scores are scaled by no finite number")
        if self.factor_ranks - {len(shape(product))}:
            raise NotAttention("its scores are scaled in another layout than that of its queries")
        if not self.dtypes:
            self.dtypes.add(product.meta["val"].dtype)
        if len(self.dtypes) > 1:
            raise NotAttention("its masks are applied in different dtypes")
        return Scores(
            product=product,
            query=query,  # type: ignore[arg-type]
            key_transposed=key_transposed,  # type: ignore[arg-type]
            scale=self.scale,
            softcap=self.softcap,
            factors=self.factors,
            mask_ops=self.mask_ops[::-1],
            mask_shapes=self.mask_shapes[::-1],
            dtypes=self.dtypes,
            passed=[*self.passed, product],
        )

    def _unchanged(self, node: fx.Node) -> fx.Node:
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        before, after = source.meta["val"], node.meta["val"]
        if not after.dtype.is_floating_point or not before.dtype.is_floating_point:
            raise NotAttention("its scores are not floating-point numbers all the way")
        if torch.finfo(before.dtype).bits > torch.finfo(after.dtype).bits:
            self.cast_down = True
        if calls(node, *_VIEWS) and not all(map(same_size, before.shape[-2:], after.shape[-2:])):
            raise NotAttention("its scores are reshaped across queries and keys")
        return source

    def _scaled(self, node: fx.Node) -> fx.Node:
        left, right = node.args[:2]
        if calls(node, aten.div) and node.kwargs.get("rounding_mode") is not None:
            raise NotAttention("its scores are rounded")
        scores, factor = (left, right) if comes_from_product(left) else (right, left)
        divides = calls(node, aten.div)
        if divides and scores is right:
            raise NotAttention("its scores are a divisor")
        number = number_of(factor)
        if number is not None:
            if divides and number == 0:
                raise NotAttention("its scores are divided by zero")
            self.scale *= 1 / number if divides else number
        elif _one_per_query(factor) and node.meta["val"].dtype == scores.meta["val"].dtype:  # type: ignore[union-attr]
            self.factors.append((factor, divides))  # type: ignore[arg-type]
            self.factor_ranks.add(len(shape(node)))
        else:
            raise NotAttention(f"its scores are multiplied with {factor}, which is no scale")
        return scores  # type: ignore[return-value]

    def _capped(self, node: fx.Node) -> fx.Node:
        """What was multiplied behind tanh is the cap; what is still to come is inside, where nothing but a scale may be."""
        if self.softcap:
            raise NotAttention("its scores go through tanh twice")
        if self.factors or not SMALLEST_CAP <= self.scale <= LARGEST_CAP:
            limits = f"{SMALLEST_CAP} to {LARGEST_CAP:g}"
            raise NotAttention(f"its scores are multiplied behind tanh with what is no number from {limits}")
        self.softcap, self.scale = self.scale, 1.0
        return node.args[0]  # type: ignore[return-value]

    def _added(self, node: fx.Node) -> fx.Node:
        left, right = node.args[:2]
        if node.kwargs.get("alpha", 1) != 1:
            raise NotAttention("its mask is scaled while it is added (alpha)")
        if comes_from_product(left) and comes_from_product(right):
            raise NotAttention("its scores are the sum of two matrix products (a position bias computed from the queries)")
        scores, mask = (left, right) if comes_from_product(left) else (right, left)
        if not isinstance(mask, fx.Node):
            if self.softcap:
                raise NotAttention("a number is added to its scores before tanh")
            if any(op.kind != "add" for op in self.mask_ops):
                raise NotAttention("a number is added to its scores before some are replaced")
            # A constant on all scores changes nothing.
            return scores  # type: ignore[return-value]
        self._mask(node, self._add(mask))
        return scores  # type: ignore[return-value]

    def _add(self, mask: fx.Node) -> MaskOp:
        if self.scale != 1.0 or self.factors:
            raise NotAttention("its mask is added before the scores are scaled")
        return MaskOp("add", mask, None)

    def _chosen(self, node: fx.Node) -> fx.Node:
        given = arguments(node)
        condition, kept, other = given["condition"], given["self"], given["other"]
        if comes_from_product(kept) and comes_from_product(other):
            raise NotAttention("its scores are chosen from two matrix products")
        if comes_from_product(kept):
            self._mask(node, MaskOp("where_keep", condition, self._filled_with(other)))
            return kept  # type: ignore[no-any-return]
        self._mask(node, MaskOp("fill", condition, self._filled_with(kept)))
        return other  # type: ignore[no-any-return]

    def _filled_with(self, value: object) -> float | fx.Node:
        """What a masked score holds in the end: it is scaled with the others if the scale comes later."""
        number = number_of(value)
        if number is None and isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.SymFloat):
            number = _compat.fix_symbol(value.meta["val"])
        if number is None and not _is_one_element(value):
            raise NotAttention("its masked scores are replaced by a tensor of different values")
        if self.factors or (number is None and self.scale != 1.0):
            raise NotAttention("its mask is applied before the scores are scaled")
        return value if number is None else float(number) * self.scale  # type: ignore[return-value]

    def _mask(self, node: fx.Node, op: MaskOp) -> None:
        if self.softcap:
            raise NotAttention("its scores are masked before tanh, which hides nothing")
        if self.cast_down:
            raise NotAttention("its scores are cast to a lower precision after they are masked")
        self.mask_ops.append(op)
        self.mask_shapes.append(shape(node))
        self.dtypes.add(node.meta["val"].dtype)


def _is_one_element(value: object) -> bool:
    fake = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(fake, torch.Tensor) and fake.numel() == 1


def _one_per_query(factor: object) -> bool:
    """Whether a factor of the scores can as well be one of the queries: a scalar, or the same for all keys."""
    value = factor.meta.get("val") if isinstance(factor, fx.Node) else None
    if isinstance(value, torch.SymFloat | torch.SymInt):
        return True
    return isinstance(value, torch.Tensor) and (value.dim() == 0 or same_size(value.shape[-1], 1))
