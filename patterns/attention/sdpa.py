"""`torch.nn.functional.scaled_dot_product_attention`.

    before                                                         candidate
    %y = aten.scaled_dot_product_attention.default(                sdpa %y = attention(%q, %k, %v)
        %q, %k, %v, %mask, 0.1, False, scale=0.25)                   masks: bool %mask (True is visible) or add %mask
                                                                     scale: 0.25, dropout: 0.1
"""

from __future__ import annotations

import torch
from torch import fx

from ..masks import MaskOp, ScoreLayout
from ..nodes import arguments, aten, same_size, shape, tensor
from . import gqa
from .candidate import Candidate, NotAttention
from .heads import folded_sizes

ANCHORS = (aten.scaled_dot_product_attention.default,)


def match(node: fx.Node) -> Candidate:
    """The attention that an SDPA node computes.

    Raises:
        NotAttention: a layout that the varlen form does not have.
    """
    given = arguments(node)
    query, key, value = given["query"], given["key"], given["value"]
    rank = len(shape(query))
    if rank not in (3, 4) or len(shape(key)) != rank or len(shape(value)) != rank:
        raise NotAttention(f"its query has {rank} dimensions; (batch, heads, length, head_dim) is expected")
    interior = {node}
    kv_groups = 1
    if rank == 4:
        key, value, kv_groups, repeats = gqa.undo_repeat(query, key, value)
        interior.update(repeats)
    check_batch(query, key, value, kv_groups)

    mask = given["attn_mask"]
    output = tensor(node)
    assert output is not None
    mask_ops = () if mask is None else (MaskOp("bool" if _is_boolean(mask) else "add", mask, None),)
    b, h = (shape(query)[0], shape(query)[1]) if rank == 4 else folded_sizes(query)
    batch_dims = (("b",), ("h",)) if rank == 4 else (("b", "h"),)
    layout = ScoreLayout(
        dims=(*batch_dims, ("q",), ("k",)),
        sizes={"b": b, "h": h, "q": shape(query)[-2], "k": shape(key)[-2]},
    )
    return Candidate(
        output=node,
        query=query,
        key=key,
        value=value,
        mask_ops=mask_ops,
        layout=layout,
        scale=given["scale"],
        dropout_p=float(given["dropout_p"]),
        is_causal=bool(given["is_causal"]),
        spelling="sdpa",
        interior=tuple(interior),
        kv_groups=kv_groups,
        score_dtype=output.dtype,
    )


def check_batch(query: fx.Node, key: fx.Node, value: fx.Node, kv_groups: int) -> None:
    """Query, key and value must agree in batch and heads; SDPA and matmul would broadcast, a varlen kernel does not."""
    for name, node in (("key", key), ("value", value)):
        for q_size, size, groups in zip(shape(query)[:-2], shape(node)[:-2], (1, kv_groups), strict=False):
            if not same_size(q_size, size * groups):
                raise NotAttention(f"the {name}'s batch and heads {list(shape(node)[:-2])} broadcast to the query's "
                                   f"{list(shape(query)[:-2])}")


def _is_boolean(mask: fx.Node) -> bool:
    value = tensor(mask)
    return value is not None and value.dtype == torch.bool
