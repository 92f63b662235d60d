"""Attention in a form that needs no rewriting, or has a mask of its own: named to the user, and left alone.

%y = flex_attention(%q, %k, %v, %score_mod, ...)                                 its block mask skips what is hidden
%y = aten._transformer_encoder_layer_fwd.default(...)                            fused, without a mask
%y = tag_activation_checkpoint(%wrap_body_0, ...)                                a checkpoint that cannot be packed through
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .. import recompute
from .candidate import Candidate, Facts, NotAttention

aten = torch.ops.aten


def _reasons() -> dict[Any, str]:
    reasons: dict[Any, str] = {
        torch.ops.higher_order.flex_attention: "it is flex_attention, whose block mask already skips what is hidden",
    }
    no_mask = "it is a fused layer without a mask, so nothing in it is known to be padding"
    for name in ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"):
        reasons[getattr(aten, name).default] = no_mask
    direct = "it calls one kernel of scaled_dot_product_attention directly"
    for name in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"):
        reasons[getattr(aten, f"_scaled_dot_product_{name}").default] = direct
    return reasons


_REASONS = _reasons()
ANCHORS = (*_REASONS, recompute.CHECKPOINT)
_NAMES = ("scaled_dot_product", "softmax", "multi_head_attention", "transformer_encoder_layer")


def match(node: fx.Node, facts: Facts) -> Candidate | None:
    """Always NotAttention, with the reason; None if nothing uses the node."""
    if node not in facts.live:
        return None
    if node.target is recompute.CHECKPOINT:
        if not _may_hold_attention(node):
            return None
        raise NotAttention(f"it is inside torch.utils.checkpoint and left there: {recompute.refusal(node)}")
    raise NotAttention(_REASONS[node.target])


def _may_hold_attention(checkpoint: fx.Node) -> bool:
    body = recompute.body_of(checkpoint)
    called = [] if body is None else [getattr(node.target, "__name__", str(node.target)) for node in body.graph.nodes]
    return any(part in name for part in _NAMES for name in called)
