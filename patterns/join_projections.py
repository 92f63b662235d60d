"""Projections of the same rows to query, key and value become one.

One product of matrices with three times as many columns keeps a GPU busier than three do, and is launched once; so are its two in
the backward and the sum for its bias. The weights are put side by side in each forward, which costs the device less as long as they
are small beside the rows.

    before                                   after
    %q = linear(%x, %wq, %bq)                %w = cat([%wq, %wk, %wv])                # (3 * E, E)
    %k = linear(%x, %wk, %bk)                %b = cat([%bq, %bk, %bv])
    %v = linear(%x, %wv, %bv)                %y = linear(%x, %w, %b)
    %o = varlen_attn(%q, %k, %v, ...)        %q, %k, %v = split_with_sizes(%y, [E, E, E], -1)
                                             %o = varlen_attn(%q, %k, %v, ...)

A split, for its backward puts the three gradients side by side, which `lowering.joined_gradients` leaves to the attention's kernel.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .nodes import arguments, calls, tensor
from .recompute import group_of

aten = torch.ops.aten
varlen = torch.ops.varlen_inductor

MOST_NUMBERS = 2**22
"""In the weights together: E up to 1182. Wider products keep a GPU busy by themselves, and copying their weights costs more."""
_VIEWS = (aten.reshape, aten.view, aten.unsqueeze, aten.squeeze)


def join_projections(gm: fx.GraphModule, device_type: str = "cuda") -> int:
    """Rewrite the packed projections of ``gm`` that gain by it, in place; for how many attentions."""
    joined = 0
    for attention in gm.graph.find_nodes(op="call_function", target=varlen.varlen_attn.default):
        chains = [_chain_from_linear(operand) for operand in attention.args[:3]]
        if _gain(attention, chains, device_type):
            _join(attention, chains)
            joined += 1
    if joined:
        gm.graph.lint()
        gm.recompile()
    return joined


def _chain_from_linear(operand: Any) -> list[fx.Node]:
    """The linear of which the operand of an attention is a view, and the views in between. Empty if something else reads them."""
    chain: list[fx.Node] = []
    while isinstance(operand, fx.Node) and len(operand.users) == 1:
        chain.insert(0, operand)
        if calls(operand, aten.linear):
            return chain
        if not calls(operand, *_VIEWS):
            break
        operand = operand.args[0]
    return []


def _gain(attention: fx.Node, chains: list[list[fx.Node]], device_type: str) -> bool:
    """Whether the three can be one: of the same packed rows, and alike in all but their widths."""
    given = [arguments(chain[0]) for chain in chains if chain]
    if len(given) != 3 or len({chain[0] for chain in chains}) != 3 or len({each["input"] for each in given}) != 1:
        return False
    if {group_of(node) for chain in chains for node in chain} != {group_of(attention)}:
        return False
    # Nodes that were packed have no value of known size; the rest of the graph is for Inductor.
    if tensor(given[0]["input"]) is not None:
        return False
    kinds = set()
    for each in given:
        weight, bias = tensor(each["weight"]), tensor(each["bias"])
        if weight is None or weight.dim() != 2 or not all(isinstance(n, int) for n in weight.shape):
            return False
        if (bias is None) != (each["bias"] is None):
            return False
        # A gradient that nobody wants must not be computed because the one beside it is wanted.
        trained = [x.meta.get("requires_grad", True) for x in (each["weight"], each["bias"]) if x is not None]
        kinds.add((weight.device, weight.dtype, weight.shape[1], None if bias is None else bias.dtype, *trained))
    numbers = sum(each["weight"].meta["val"].numel() for each in given)
    return len(kinds) == 1 and given[0]["weight"].meta["val"].device.type == device_type and numbers <= MOST_NUMBERS


def _join(attention: fx.Node, chains: list[list[fx.Node]]) -> None:
    first = chains[0][0]
    graph = attention.graph
    given = [arguments(chain[0]) for chain in chains]

    def call(target: Any, *args: Any) -> fx.Node:
        made = graph.call_function(target, args)
        made.meta = {key: value for key, value in first.meta.items() if key != "val"}
        return made

    # Right before the attention, for there all operands are known; nothing else reads the views.
    with graph.inserting_before(attention):
        weight = call(aten.cat.default, [each["weight"] for each in given])
        bias = None if given[0]["bias"] is None else call(aten.cat.default, [each["bias"] for each in given])
        rows = call(aten.linear.default, given[0]["input"], weight, bias)
        parts = call(aten.split_with_sizes.default, rows, [each["weight"].meta["val"].shape[0] for each in given], -1)
        for place, (linear, *views) in enumerate(chains):
            linear.replace_all_uses_with(call(operator.getitem, parts, place))
            graph.erase_node(linear)
            for view in views:
                attention.prepend(view)
