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
from ..nodes import arguments, aten, shape, tensor
from . import gqa
from .candidate import Candidate, Facts, NotAttention
from .heads import check_batch, folded_sizes
from .interior import interior_of

ANCHORS = (aten.scaled_dot_product_attention.default,)


def match(node: fx.Node, facts: Facts) -> Candidate | None:
    """The attention that an SDPA node computes; None if nothing uses it.

    Raises:
        NotAttention: a layout that the varlen form does not have.
    """
    if node not in facts.live:
        return None
    given = arguments(node)
    query, key, value = given["query"], given["key"], given["value"]
    rank = len(shape(query))
    if rank not in (3, 4) or len(shape(key)) != rank or len(shape(value)) != rank:
        raise NotAttention(f"its query has {rank} dimensions; (batch, heads, length, head_dim) is expected")
    kv_groups = 1
    repeats: tuple[fx.Node, ...] = ()
    if rank == 4:
        key, value, kv_groups, repeats = gqa.undo_repeat(query, key, value)
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
        interior=interior_of([node], repeats, facts),
        kv_groups=kv_groups,
        score_dtype=output.dtype,
    )


def _is_boolean(mask: fx.Node) -> bool:
    value = tensor(mask)
    return value is not None and value.dtype == torch.bool
