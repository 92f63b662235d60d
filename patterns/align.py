"""A wide linear with an odd number of outputs gets zero rows in its weight, so that its products read aligned rows.

Half precision products want rows that are multiples of 16 bytes; for others there are slower kernels only. Inductor lays out
its buffers so, but only where all sizes are numbers, which the number of packed rows is not. The vocabulary of a language model
is such a linear: BERT's has 30522 words.

    before                                   after
    %y = linear(%x, %w, %b)                  %w8 = constant_pad_nd(%w, [0, 0, 0, 6], 0.0)     # (30528, E)
                                             %b8 = constant_pad_nd(%b, [0, 6], 0.0)
                                             %y8 = linear(%x, %w8, %b8)
                                             %y = slice(%y8, -1, 0, 30522)
"""

from __future__ import annotations

import torch
from torch import fx

from .nodes import arguments, calls, overload_packet, tensor

aten = torch.ops.aten
varlen = torch.ops.varlen_inductor

ALIGNMENT = 8
"""Numbers of half precision in 16 bytes."""
MIN_OUTPUTS = 1024
"""Below this a product is too small for its alignment to be worth the copy of the weight."""

# What may read a tensor with gaps between its rows: operators that make no view of it, and those that copy if they must.
_READERS = frozenset(
    {
        aten.cross_entropy_loss, aten.log_softmax, aten.softmax, aten.reshape, aten.to, aten._to_copy, aten.argmax, aten.logsumexp,
        aten.gelu, aten.mul, aten.div, aten.add, aten.tanh, aten.sigmoid, varlen.pack, varlen.unpack,
    }
)  # fmt: skip
_MAY_BE_VIEWS = frozenset({aten.reshape, aten.to})
"""Those of them whose result may be the same memory, gaps and all."""


def align_wide_linears(gm: fx.GraphModule) -> int:
    """Rewrite the packed linears of ``gm`` that gain by it, in place; how many there were."""
    wide = [node for node in gm.graph.nodes if _gains(node)]
    for node in wide:
        _align(node)
    if wide:
        gm.graph.lint()
        gm.recompile()
    return len(wide)


def _gains(node: fx.Node) -> bool:
    if not calls(node, aten.linear):
        return False
    x, weight = arguments(node)["input"], tensor(arguments(node)["weight"])
    # Nodes that were packed have no value of known size; where all sizes are numbers Inductor needs no help.
    if weight is None or tensor(x) is not None or weight.dim() != 2:
        return False
    half = weight.device.type == "cuda" and weight.dtype in (torch.float16, torch.bfloat16)
    outputs = weight.shape[0]
    if not half or not isinstance(outputs, int) or outputs < MIN_OUTPUTS or outputs % ALIGNMENT == 0:
        return False
    return all(_may_read_gaps(user) for user in node.users)


def _may_read_gaps(node: fx.Node) -> bool:
    packet = overload_packet(node)
    return packet in _READERS and (packet not in _MAY_BE_VIEWS or all(_may_read_gaps(user) for user in node.users))


def _align(node: fx.Node) -> None:
    x, weight, bias = (arguments(node)[name] for name in ("input", "weight", "bias"))
    outputs = weight.meta["val"].shape[0]
    more = -outputs % ALIGNMENT
    graph = node.graph
    with graph.inserting_before(node):
        weight = graph.call_function(aten.constant_pad_nd.default, (weight, [0, 0, 0, more], 0.0))
        if bias is not None:
            bias = graph.call_function(aten.constant_pad_nd.default, (bias, [0, more], 0.0))
        padded = graph.call_function(aten.linear.default, (x, weight, bias))
        rows = graph.call_function(aten.slice.Tensor, (padded, -1, 0, outputs))
    for made in (weight, bias, padded, rows):
        if isinstance(made, fx.Node):
            made.meta = {key: value for key, value in node.meta.items() if key != "val"}
    node.replace_all_uses_with(rows)
    graph.erase_node(node)
