"""GELU of half precision, with fewer instructions.

``1 + erf(z)``, which is what GELU and its gradient make of their input, takes a generated kernel 37 instructions for each number
of a GELU (counted in what Triton 3.6 compiles for Hopper): more than it takes to move the number from memory and back, so that
the kernel waits for arithmetic. Where the input was float16 or bfloat16, and so will be what is made of it, it is written with one
exponential function of a polynomial, 19 instructions in all. For z < 0 nothing is subtracted from one then, and of all numbers of
either dtype fewer come out wrongly rounded.

    1 + erf(z) = erfc(-z) = erfc(|z|) for z < 0, else 2 - erfc(|z|),    erfc(a) = 2^Q(a)

`COEFFICIENTS` are Q's, found by ``benchmarks/erfc_polynomial.py``; the tests try them with every number of float16 and bfloat16.

Inductor counts operations, not instructions, and what takes more than thirty of them it makes a tensor of, in float32, as soon as
it is read twice. So this is done only on the way to a tensor that there is anyway, in half precision: what a product reads, or what
the graph returns.
"""

from __future__ import annotations

import torch
from torch import fx

from varlen_inductor.patterns.nodes import arguments, aten, call_like, calls, tensor

COEFFICIENTS = (
    0.0,
    *(-1.6279290914535522, -0.918171763420105, -0.14945678412914276, 0.030076485127210617),
    *(-0.0025769216008484364, -0.000521350943017751, 0.00017930948524735868, -1.609925129741896e-05),
)
"""Of 1, a, a^2 and so on. Q falls from 0 without end, so that the result is right for large numbers, infinities and NaN, too."""

_convert = torch.ops.prims.convert_element_type.default
_HALF = (torch.float16, torch.bfloat16)
_PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution)
_VIEWS = (aten.view, aten.reshape, aten.permute, aten.transpose, aten.t, aten.unsqueeze, aten.squeeze, aten.expand, aten.slice)


def shorten_erf(graph: fx.Graph, device_type: str = "cuda") -> int:
    """Rewrite ``graph`` in place, a graph after autograd whose nodes have fake tensors; how many times it was done.

    Each reader gets nodes of its own, so that nothing of theirs is read twice; the generated kernels join them again.
    """
    changed = 0
    for erf in graph.find_nodes(op="call_function", target=aten.erf.default):
        if not _of_half(erf, device_type):
            continue
        for node in [user for user in erf.users if _adds_one(user, erf)]:
            readers = tuple(node.users)
            if not all(_is_pointwise(reader) and _becomes_half(reader) for reader in readers):
                continue
            with graph.inserting_before(node):
                made = [_one_plus_erf(arguments(erf)["self"]) for _ in readers]
            for reader, one_plus_erf in zip(readers, made, strict=True):
                reader.replace_input_with(node, one_plus_erf)
            graph.erase_node(node)
            changed += 1
        if not erf.users:
            graph.erase_node(erf)
    return changed


def _of_half(erf: fx.Node, device_type: str) -> bool:
    """Whether the argument is a number times what was float16 or bfloat16."""
    value, z = tensor(erf), arguments(erf)["self"]
    if value is None or value.dtype is not torch.float32 or value.device.type != device_type or not calls(z, aten.mul):
        return False
    factors = arguments(z)
    widened = factors["self"]
    if not isinstance(factors["other"], (int, float)) or not calls(widened, torch.ops.prims.convert_element_type):
        return False
    narrow = tensor(arguments(widened)["a"])
    return narrow is not None and narrow.dtype in _HALF


def _adds_one(node: fx.Node, erf: fx.Node) -> bool:
    if not calls(node, aten.add):
        return False
    terms = arguments(node)
    return terms["self"] is erf and isinstance(terms["other"], (int, float)) and terms["other"] == 1 and terms["alpha"] == 1


def _is_pointwise(node: fx.Node) -> bool:
    return node.target is _convert or torch.Tag.pointwise in getattr(node.target, "tags", ())


def _becomes_half(node: fx.Node) -> bool:
    """Whether one value after another is made of it, each of the one before alone, until one is a tensor in half precision."""
    while not _is_stored(node):
        if len(node.users) != 1:
            return False
        (node,) = node.users
        if calls(node, aten.cat):
            break
        if not _is_pointwise(node) and not calls(node, *_VIEWS):
            return False
    value = tensor(node)
    return value is not None and value.dtype in _HALF


def _is_stored(node: fx.Node) -> bool:
    """Whether somebody needs it as a tensor, whatever else reads it."""
    readers = list(node.users)
    for reader in readers:
        if reader.op == "output" or calls(reader, *_PRODUCTS):
            return True
        if calls(reader, *_VIEWS):
            readers.extend(reader.users)
    return False


def _one_plus_erf(z: fx.Node) -> fx.Node:
    """The new nodes, at the point of insertion."""
    size = call_like(z, aten.abs.default, z)
    *others, last = COEFFICIENTS[1:]
    exponent = call_like(z, aten.mul.Tensor, size, last)
    for coefficient in reversed(others):
        exponent = call_like(z, aten.mul.Tensor, call_like(z, aten.add.Tensor, exponent, coefficient), size)
    erfc = call_like(z, aten.exp2.default, exponent)
    positive = call_like(z, _convert, call_like(z, aten.ge.Scalar, z, 0), torch.float32)
    # |0 - erfc| or |2 - erfc|: erfc is read once.
    return call_like(z, aten.abs.default, call_like(z, aten.sub.Tensor, call_like(z, aten.mul.Tensor, positive, 2), erfc))
