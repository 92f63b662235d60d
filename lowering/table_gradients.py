"""Gradients of tables that many tokens read, as one of positions is.

A packed graph looks rows up where a padded one broadcasts them, so the gradient is a sum by row. In bfloat16 Inductor leaves that
to PyTorch's own ``index_add``: a kernel by itself that rounds after each addend (54.1 of 12250 us of a training step: a profile of
benchmarks/model.py's B 32, S 512, on a H200 with torch 2.11, by a script that is not kept). The gradient of an embedding adds up
in float32, in a generated kernel; this is written like that. (To look up by an embedding would do the same, but its rows are kept
for the backward, where selected ones are looked up again.)

    before                                               after
    %z = full([512, 768], 0)    # bfloat16               %f = convert_element_type(%z, float32)
    %g = index_add(%z, 0, %i, %x)                        %s = index_put(%f, [%i], convert_element_type(%x, float32), True)
                                                         %g = convert_element_type(%s, bfloat16)
"""

from __future__ import annotations

import torch
from torch import fx

from varlen_inductor import _compat
from varlen_inductor.patterns.nodes import arguments, aten, call_like, calls, tensor

_convert = torch.ops.prims.convert_element_type.default

MOST_NUMBERS = 2**24
"""Of a larger table (32 MB) the sums in float32 would be much memory, and its rows are hardly read by many."""


def add_up_in_single(graph: fx.Graph, device_type: str = "cuda") -> int:
    """Rewrite ``graph`` in place, a graph after autograd whose nodes have fake tensors; how many sums were changed."""
    sums = [x for x in graph.find_nodes(op="call_function", target=aten.index_add.default) if _begins_with_zeros(x, device_type)]
    for node in sums:
        given = arguments(node)
        with graph.inserting_before(node):
            zeros, addends = (call_like(node, _convert, given[name], torch.float32) for name in ("self", "source"))
            total = call_like(node, aten.index_put.default, zeros, [given["index"]], addends, True)
            rounded = call_like(node, _convert, total, torch.bfloat16)
        node.replace_all_uses_with(rounded)
        graph.erase_node(node)
    return len(sums)


def _begins_with_zeros(node: fx.Node, device_type: str) -> bool:
    given, value = arguments(node), tensor(node)
    zeros, index = given["self"], tensor(given["index"])
    if value is None or value.dtype is not torch.bfloat16 or value.device.type != device_type or value.dim() == 0:
        return False
    if index is None or index.dim() != 1 or given["dim"] % value.dim() != 0 or given["alpha"] != 1:
        return False
    if not calls(zeros, aten.full) or arguments(zeros)["fill_value"] != 0:
        return False
    return _compat.known_true(value.numel() <= MOST_NUMBERS)
