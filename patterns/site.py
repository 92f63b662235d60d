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

    ``scale`` None means ``1/sqrt(head_dim)``; ``softcap`` is 0 where scores are not capped. ``batch`` is the batch size, needed
    where batch and head are one dimension. ``original`` is the node that was replaced; it stays in the graph without being used, in
    case the site is given up.
    """

    proof: MaskProof
    scale: float | None
    dropout_p: float
    batch: int | torch.SymInt
    original: fx.Node
    softcap: float = 0.0


def attention_site(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Masked attention over ``(B, H, S_q, D)``, ``(B, H_k, S_k, D)``, ``(B, H_k, S_k, D_v)``; never run, always replaced."""
    raise NotImplementedError("attention_site is replaced before the graph runs")


def attention_of(node: fx.Node) -> Attention | None:
    """The attention that ``node`` stands for, or None if it is no canonical attention."""
    return node.meta.get(META_KEY) if node.target is attention_site else None


def insert_site(graph: fx.Graph, candidate: Candidate, proof: MaskProof) -> fx.Node:
    """Put a canonical attention in the place of a candidate's output."""
    original = candidate.output
    with graph.inserting_before(original.next):
        operands = tuple(_cast(graph, x, candidate.compute_dtype) for x in (candidate.query, candidate.key, candidate.value))
        site = graph.call_function(attention_site, operands)
    site.meta = dict(original.meta)
    original.replace_all_uses_with(site)
    batch = candidate.layout.sizes["b"]
    site.meta[META_KEY] = Attention(proof, candidate.scale, candidate.dropout_p, batch, original, candidate.softcap)
    return site


def _cast(graph: fx.Graph, x: fx.Node, dtype: torch.dtype) -> fx.Node:
    """``x`` in the dtype that the attention computes in: autocast may lower it inside of a matmul, unseen in the graph."""
    fake = x.meta["val"]
    if fake.dtype == dtype:
        return x
    cast = graph.call_function(torch.ops.aten.to.dtype, (x, dtype))
    cast.meta = {k: v for k, v in x.meta.items() if k != META_KEY}
    with fake.fake_mode:
        cast.meta["val"] = fake.to(dtype)
    return cast


def remove_site(site: fx.Node) -> None:
    """Give a site up: the original attention takes its place again."""
    attention = attention_of(site)
    assert attention is not None
    site.replace_all_uses_with(attention.original)
    site.graph.erase_node(site)
