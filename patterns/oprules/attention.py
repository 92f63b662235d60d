"""Attention, as PyTorch spells it and as the passes mark it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from ..dims import Dims, broadcast
from .core import Args, Mixed, Typing, is_tensor, rule, tie

SITE_NAME = "attention_site"


def _attention_dims(q: Dims, k: Dims, v: Dims) -> Dims:
    tie(q[0], k[0])
    tie(q[0], v[0])
    tie(k[-2], v[-2])
    tie(q[-1], k[-1])
    return (*q[:-1], v[-1])


def _attention_mixed(q: fx.Node, k: fx.Node, v: fx.Node) -> Mixed:
    rank = len(q.meta["val"].shape)
    return ((q, rank - 1), (k, rank - 2), (k, rank - 1), (v, rank - 2))


@rule("scaled_dot_product_attention")
def _sdpa(a: Args) -> Typing:
    q, k, v = a["query"], a["key"], a["value"]
    dims = _attention_dims(a.dims(q), a.dims(k), a.dims(v))
    mixed = _attention_mixed(q, k, v)
    mask = a.get("attn_mask")
    if is_tensor(mask):
        scores = (*a.dims(q)[:-1], a.dims(k)[-2])
        broadcast([scores, a.dims(mask)], [*q.meta["val"].shape[:-1], k.meta["val"].shape[-2]], a.origin)
        mixed += ((mask, len(a.dims(mask)) - 1),)
    return Typing(dims, mixed)


def attention_site(node: fx.Node, table: Mapping[fx.Node, Typing]) -> Typing:
    q, k, v = node.args[:3]
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    return Typing(_attention_dims(table[q].dims, table[k].dims, table[v].dims), _attention_mixed(q, k, v))
