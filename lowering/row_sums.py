"""Sums over packed rows, chunk by chunk.

The gradient of a bias or of a norm's weight is a sum over the rows. To keep a GPU busy Inductor sums some groups of rows first,
and then those sums. Where the number of rows is a symbol, so is the length of its groups: every index is then computed from that
symbol, in 64 bits, and every load has a mask. On one H100 the sums over 8960 rows of 768 numbers took 16.9 us that way, and 5.0
us where 8960 was a number; those of layer norms 41.8 and 22.1 us (24 and 23 of each in a training step of 14.6 ms: profiles of
benchmarks/model.py's B 32, S 512, as those below by a script that is not kept; written as here they took 4.8 and 15.0 on a H200).
Packed rows are whole chunks (`runtime`), so the groups can be the first rows of all chunks,
the second rows, and so on: no index has a symbol in it then, and consecutive numbers lie side by side. Their sums are then added
up, 32 at a time, which Inductor does not split again.

    before                                    after
    %s = sum(%x [s0, 768], [0])               %y = view(%x, [s0 // 64, 64, 768])
                                              %p = sum(%y, [0], dtype=float32)    # (64, 768)
                                              %s = sum(%p[:32] + %p[32:], [0])    # and back to the dtype of %x

Where nothing but the caller is waiting for such sums, as is usual with gradients, they are all added up at the end, those of one
shape in one kernel. Otherwise each is a kernel that runs for two microseconds and takes the host longer to launch: a hundred in a
training step of 12 layers.

    %s0 = sum(%p0[:32] + %p0[32:], [0])       %p = view(cat([%p0, %p1]), [2, 64, 768])
    %s1 = sum(%p1[:32] + %p1[32:], [0])       %s = sum(%p[:, :32] + %p[:, 32:], [1])
                                              %s0, %s1 = %s[0], %s[1]

What each is then converted to, all are at once, in the same kernel. The code that Inductor generated for the backward of
benchmarks/model.py's B 32, S 512 (bfloat16, torch 2.11, one H100) had fifty kernels that did nothing else.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from varlen_inductor import _compat, _compat_inductor
from varlen_inductor.ops.packing import CHUNKS
from varlen_inductor.patterns.nodes import arguments, aten, call_like, tensor

_convert = torch.ops.prims.convert_element_type.default

MOST_COLUMNS = 131072
"""With more sums than this side by side a GPU is busy without groups. (With 30528 it is not: the gradient of BERT's vocabulary
bias, summed in the kernel that also computes the gradient of a softmax, took 1.95 ms of a H200; plain Inductor, in two kernels, 1.2
for nearly twice the rows.)"""
ENOUGH_SUMS = 49152
"""So many sums at once keep a GPU busy: 64 groups of 768, about what Inductor makes of as many rows."""
UNSPLIT = 32
"""Inductor sums so many numbers at once without splitting the sum."""


def split_row_sums(graph: fx.Graph, device_type: str = "cuda") -> int:
    """Rewrite ``graph`` in place, a graph after autograd whose nodes have fake tensors; the number of sums that were changed."""
    sums = [node for node in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList) if _chunk(node, device_type)]
    if sums and _compat_inductor.inductor_setting("triton.mix_order_reduction"):
        # Inductor sums such rows in the kernel that reduces each of them, which is better still.
        reduced = {source for node in graph.nodes if _reduces_rows(node) for source in _sources(node)}
        sums = [node for node in sums if reduced.isdisjoint(_sources(node))]
    found = [_Parts(graph, node, _chunk(node, device_type)) for node in sums]
    alike: dict[Any, list[_Parts]] = {}
    for parts in found:
        alike.setdefault(parts if parts.behind is None else parts.form, []).append(parts)
    for group in alike.values():
        _add_up(graph, group)
    return len(sums)


def _chunk(node: fx.Node, device_type: str) -> int:
    """The length of the chunks that this sum is made by; 0 if it stays."""
    x = tensor(node.args[0])
    if x is None or x.device.type != device_type or x.dim() < 2:
        return 0
    if not (x.dtype.is_floating_point and node.meta["val"].dtype.is_floating_point):
        return 0
    dims: Any = arguments(node)["dim"]
    if [d % x.dim() for d in dims or ()] != [0]:
        return 0
    rows, *rest = x.shape
    if not isinstance(rows, torch.SymInt) or not all(isinstance(n, int) for n in rest):
        return 0
    columns = math.prod(rest)
    if not 0 < columns <= MOST_COLUMNS:
        return 0
    possible = [n for n in CHUNKS if _compat.known_true(rows % n == 0)]
    # The shortest that keeps the device busy, or else the longest.
    return next((n for n in sorted(possible) if n * columns >= ENOUGH_SUMS), max(possible, default=0))


class _Parts:
    """The sums (chunk, ...) of groups of rows, for a node that is to become their sum.

    Args:
        node: sums the rows of a matrix.
        chunk: the length of the chunks.

    ``form`` is what the parts of two nodes must have in common to be added up together; ``behind`` is as `_up_to_the_output` says.
    """

    def __init__(self, graph: fx.Graph, node: fx.Node, chunk: int) -> None:
        given = arguments(node)
        x = tensor(given["self"])
        assert x is not None
        self.node = node
        self.wanted = node.meta["val"].dtype
        summed_in = torch.float32 if self.wanted in (torch.float16, torch.bfloat16) else self.wanted
        with graph.inserting_before(node):
            chunks = call_like(node, operator.floordiv, call_like(node, aten.sym_size.int, given["self"], 0), chunk)
            rows = call_like(node, aten.view.default, given["self"], [chunks, chunk, *x.shape[1:]])
            self.sums = call_like(node, aten.sum.dim_IntList, rows, [0], dtype=summed_in)
        self.behind = _up_to_the_output(node)
        self.converted_to = () if self.behind is None else _conversions(node) or ()
        self.form = ((chunk, *x.shape[1:]), (summed_in, self.wanted, *self.converted_to), given["keepdim"], x.device)


def _up_to_the_output(node: fx.Node) -> list[fx.Node] | None:
    """What is made of a node in the way to the output of the graph, in order; None if it is used for anything else.

    On that way are only nodes that may as well come last.
    """
    found: dict[fx.Node, None] = {}
    stack = list(node.users)
    while stack:
        user = stack.pop()
        if user.op == "output" or user in found:
            continue
        if user.target not in _UP_TO_THE_OUTPUT or len(user.all_input_nodes) != 1:
            return None
        found[user] = None
        stack.extend(user.users)
    return [each for each in node.graph.nodes if each in found] if found else []


def _add_up(graph: fx.Graph, group: list[_Parts]) -> None:
    """Replace the nodes of ``group``, whose parts are of one form, by the sums of their parts."""
    first = group[0]
    (chunk, *rest), (dtype, *dtypes), keepdim, _ = first.form
    several = len(group) > 1
    output = graph.output_node()
    with graph.inserting_before(output if several else first.node):
        parts = call_like(first.node, aten.cat.default, [each.sums for each in group]) if several else first.sums
        parts = call_like(first.node, aten.view.default, parts, [len(group), chunk, *rest])
        total = call_like(first.node, aten.slice.Tensor, parts, 1, 0, UNSPLIT)
        for start in range(UNSPLIT, chunk, UNSPLIT):
            more = call_like(first.node, aten.slice.Tensor, parts, 1, start, start + UNSPLIT)
            total = call_like(first.node, aten.add.Tensor, total, more)
        total = call_like(first.node, aten.sum.dim_IntList, total, [1], keepdim)
        for wanted in dtypes:
            if wanted != dtype:
                dtype = wanted
                total = call_like(first.node, _convert, total, dtype)
        for i, each in enumerate(group):
            each.node.replace_all_uses_with(call_like(each.node, aten.select.int, total, 0, i))
            graph.erase_node(each.node)
            for node in each.behind or ():
                if several:
                    output.prepend(node)
                if each.converted_to:
                    _take_converted(node)


def _take_converted(node: fx.Node) -> None:
    """Let a node behind a sum take what has been converted already."""
    if node.target is _convert:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        node.graph.erase_node(node)
    else:
        node.meta["val"] = node.target(*fx.map_arg(node.args, lambda n: n.meta["val"]))  # type: ignore[operator]


def _conversions(node: fx.Node) -> tuple[torch.dtype, ...] | None:
    """What a sum is converted to, one after another, on each of its ways to the output; None if they differ."""
    ways: set[tuple[torch.dtype, ...] | None] = set()
    for user in node.users:
        further = () if user.op == "output" else _conversions(user)
        converts: Any = user.args[1:] if user.target is _convert else ()
        ways.add(None if further is None else (*converts, *further))
    return ways.pop() if len(ways) == 1 else None


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


_THROUGH = frozenset({_convert, aten.reshape.default, aten.view.default})
_UP_TO_THE_OUTPUT = _THROUGH | {aten.slice.Tensor}
