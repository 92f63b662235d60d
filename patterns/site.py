"""The canonical attention node: one spelling for every attention whose mask has been proven.

Detection (`patterns.attention`) finds candidates without touching the graph; once a candidate's mask is proven, `insert_site` puts
one `attention_site` node in its place. All later passes know only this node, and the last of them replaces it by a varlen call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

if TYPE_CHECKING:
    from .attention import Candidate
    from .masks import MaskProof

META_KEY = "varlen_attention"


@dataclass(frozen=True)
class Attention:
    """What an `attention_site` node computes, beyond its query, key and value arguments.

    ``scale`` None means ``1/sqrt(head_dim)``; ``kv_groups`` query heads share one key/value head; ``padded_output`` is the node
    of the original attention, whose ancestors stay in the graph until it is known whether the original is needed.
    """

    proof: MaskProof
    scale: float | None
    dropout_p: float
    kv_groups: int
    original: fx.Node


def attention_site(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Masked attention over ``(B, H, S_q, D)``, ``(B, H_k, S_k, D)``, ``(B, H_k, S_k, D_v)``; never run, always replaced."""
    raise NotImplementedError("attention_site is replaced before the graph runs")


def attention_of(node: fx.Node) -> Attention | None:
    """The attention that ``node`` stands for, or None if it is no canonical attention."""
    return node.meta.get(META_KEY) if node.target is attention_site else None
