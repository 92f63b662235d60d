"""GELU of half precision, with fewer instructions.

``1 + erf(z)``, which is what GELU and its gradient make of their input, takes a generated kernel 37 instructions for each number
of a GELU (counted in what Triton 3.6 compiles for Hopper): more than it takes to move the number from memory and back, so that
the kernel waits for arithmetic. Where the input was float16 or bfloat16, it is written with one exponential function of a
polynomial, 19 instructions in all, and comes out nearer to the truth: for z < 0 nothing is subtracted from one.

    1 + erf(z) = erfc(-z) = erfc(|z|) for z < 0, else 2 - erfc(|z|),    erfc(a) = 2^Q(a)

`COEFFICIENTS` are Q's, found by ``benchmarks/erfc_polynomial.py``; the tests try them with every number of float16 and bfloat16.
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


def shorten_erf(graph: fx.Graph, device_type: str = "cuda") -> int:
    """Rewrite ``graph`` in place, a graph after autograd whose nodes have fake tensors; how many times it was done.

    Each reader gets nodes of its own, which the generated kernels join again: of a value with two readers that takes so many
    operations Inductor would make a tensor, in float32.
    """
    erfs = graph.find_nodes(op="call_function", target=aten.erf.default)
    changed = 0
    for erf in erfs:
        if not _of_half(erf, device_type):
            continue
        for node in [user for user in erf.users if _adds_one(user, erf)]:
            for reader in tuple(node.users):
                with graph.inserting_before(reader):
                    reader.replace_input_with(node, _one_plus_erf(arguments(erf)["self"]))
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


def _one_plus_erf(z: fx.Node) -> fx.Node:
    """The new nodes, at the point of insertion."""
    size = call_like(z, aten.abs.default, z)
    *others, last = COEFFICIENTS[1:]
    exponent = call_like(z, aten.mul.Tensor, size, last)
    for coefficient in reversed(others):
        exponent = call_like(z, aten.mul.Tensor, call_like(z, aten.add.Tensor, exponent, coefficient), size)
    erfc = call_like(z, aten.exp2.default, exponent)
    positive = call_like(z, _convert, call_like(z, aten.ge.Scalar, z, 0), torch.float32)
    # erfc is read once here, for the same reason as above: |0 - erfc| or |2 - erfc|.
    return call_like(z, aten.abs.default, call_like(z, aten.sub.Tensor, call_like(z, aten.mul.Tensor, positive, 2), erfc))
