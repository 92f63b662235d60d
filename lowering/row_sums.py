"""Sums over packed rows, in chunks whose length is a number.

The gradient of a bias or of a norm's weight is a sum over the rows. To keep a GPU busy Inductor sums chunks of rows first, and then
those sums. Where the number of rows is a symbol it chooses the number of chunks, so that their length is a symbol too: every index
is then computed with a division, in 64 bits, and every load has a mask. On one H100 the sums over 8960 rows of 768 numbers took
16.9 us that way, and 5.0 us where 8960 was a number; those of layer norms 41.8 and 22.1 us (24 and 23 of each in a training step of
14.6 ms; benchmarks/model.py, B 32, S 512). Packed rows come in blocks (`runtime`), so chunks can have a length that is a number.

    before                                    after
    %s = sum(%x [64*s0, 768], [0])            %y = reshape(%x, [-1, 64, 768])
                                              %p = sum(%y, [1], dtype=float32)
                                              %s = sum(%p, [0])    # and back to the dtype of %x
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch import fx

from varlen_inductor import _compat_inductor
from varlen_inductor.patterns.nodes import arguments, aten, tensor

CHUNKS = (128, 64, 32)
"""Lengths of chunks, the preferred first."""
MOST_COLUMNS = 16384
"""With more sums than this side by side a GPU is busy without chunks. (Inductor's own limit depends on the device.)"""


def split_row_sums(graph: fx.Graph, device_type: str = "cuda") -> int:
    """Rewrite ``graph`` in place, a graph after autograd whose nodes have fake tensors; the number of sums that were split."""
    sums = [node for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList) if _chunk(node, device_type)]
    if sums and _compat_inductor.inductor_setting("triton.mix_order_reduction"):
        # Inductor sums such rows in the kernel that reduces each of them, which is better still.
        reduced = {source for node in graph.nodes if _reduces_rows(node) for source in _sources(node)}
        sums = [node for node in sums if reduced.isdisjoint(_sources(node))]
    for node in sums:
        _split(graph, node, _chunk(node, device_type))
    return len(sums)


def _chunk(node: fx.Node, device_type: str) -> int:
    """The length of chunks for this sum; 0 if it stays."""
    x = tensor(node.args[0])
    if x is None or x.device.type != device_type or x.dim() < 2 or not x.dtype.is_floating_point:
        return 0
    dims: Any = arguments(node)["dim"]
    if [d % x.dim() for d in dims or ()] != [0]:
        return 0
    rows, *rest = x.shape
    if not isinstance(rows, torch.SymInt) or not all(isinstance(n, int) for n in rest):
        return 0
    if not 0 < torch.Size(rest).numel() <= MOST_COLUMNS:
        return 0
    return next((n for n in CHUNKS if sympy.Mod(rows.node.expr, n) == 0), 0)


def _split(graph: fx.Graph, node: fx.Node, chunk: int) -> None:
    given = arguments(node)
    x = tensor(given["self"])
    assert x is not None
    wanted = node.meta["val"].dtype
    summed_in = torch.float32 if wanted in (torch.float16, torch.bfloat16) else wanted

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        new = graph.call_function(target, args, kwargs)
        new.meta = {**node.meta, "val": target(*fx.map_arg(args, lambda n: n.meta["val"]), **kwargs)}
        return new

    with graph.inserting_before(node):
        parts = call(aten.reshape.default, given["self"], [-1, chunk, *x.shape[1:]])
        sums = call(aten.sum.dim_IntList, parts, [1], dtype=summed_in)
        total = call(aten.sum.dim_IntList, sums, [0], given["keepdim"])
        if summed_in != wanted:
            total = call(torch.ops.prims.convert_element_type.default, total, wanted)
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def _reduces_rows(node: fx.Node) -> bool:
    """Whether each row of a matrix is reduced to a number, as by norms and their gradients."""
    if node.op != "call_function" or node.target not in _REDUCTIONS:
        return False
    x = tensor(node.args[0])
    dims: Any = node.args[1]
    return x is not None and isinstance(dims, (list, tuple)) and [d % x.dim() for d in dims] == [x.dim() - 1]


_REDUCTIONS = frozenset({aten.sum.dim_IntList, aten.mean.dim, aten.var_mean.correction, aten.amax.default})


def _sources(node: fx.Node) -> set[fx.Node]:
    """The matrices that a reduction reads, before pointwise operators."""
    found: set[fx.Node] = set()
    numbers = _numel(node.args[0])
    seen: set[Any] = set()
    stack: list[Any] = [node.args[0]]
    while stack:
        at = stack.pop()
        if not isinstance(at, fx.Node) or at in seen or _numel(at) != numbers:
            continue
        seen.add(at)
        if torch.Tag.pointwise in getattr(at.target, "tags", ()) or at.target in _THROUGH:
            stack.extend(at.all_input_nodes)
        else:
            found.add(at)
    return found


def _numel(node: Any) -> Any:
    """The number of elements of a node's tensor, which may be an expression; None if it has no tensor."""
    x = tensor(node)
    return None if x is None else math.prod(n.node.expr if isinstance(n, torch.SymInt) else n for n in x.shape)


_THROUGH = frozenset({torch.ops.prims.convert_element_type.default, aten.reshape.default, aten.view.default})
