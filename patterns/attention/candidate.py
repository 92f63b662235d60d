"""What detection hands on: an attention (`Candidate`), or why something that looks like one is not taken (`Rejected`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..masks import MaskOp, ScoreLayout, Spelling


@dataclass(frozen=True, eq=False)
class Candidate:
    """One attention in a normalised graph: `dropout(softmax(scale * Q K^T, masked), dropout_p) V`.

    Attributes:
        output: the node that holds the result, in the layout of `query`.
        query: (B, H, S_q, D), or folded (B * H, S_q, D).
        key: (B, H / kv_groups, S_k, D), or folded (B * H, S_k, D).
        value: (B, H / kv_groups, S_k, D_v), or folded (B * H, S_k, D_v).
        mask_ops: what is done to the scaled scores before the softmax, the innermost first; empty if nothing is.
        layout: how the dimensions of the scores, and so of the masks, relate to batch, head, query and key.  The masks
            may be laid out as (B, H, S_q, S_k) where query, key and value are folded.
        scale: factor on the scores; None for 1 / sqrt(D).
        softcap: if above 0, scaled scores s become softcap * tanh(s / softcap) before they are masked.
        dropout_p: probability of dropping an attention weight; 0.0 when the graph does not drop any.
        is_causal: query i sees no key beyond i (both counted from the first), on top of `mask_ops`.
        spelling: "sdpa" (no valid key gives 0) or "decomposed" (it gives what softmax makes of it).
        interior: the nodes that nothing needs once `output` is replaced, `output` included, in graph order.
        kv_groups: so many query heads share one key and value head (grouped-query attention); `key` and `value` are
            the tensors before they are repeated.
        score_dtype: the dtype in which the masks meet the scores; under autocast that of the lower precision.
    """

    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask_ops: tuple[MaskOp, ...]
    layout: ScoreLayout
    scale: float | None
    dropout_p: float
    is_causal: bool
    spelling: Spelling
    interior: tuple[fx.Node, ...]
    kv_groups: int
    score_dtype: torch.dtype
    softcap: float = 0.0

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of both products; under autocast query, key and value may come in others and are cast to it."""
        return self.output.meta["val"].dtype  # type: ignore[no-any-return]

    @property
    def folded(self) -> bool:
        """Whether batch and head are one dimension of query, key and value."""
        return self.query.meta["val"].dim() == 3

    def describe(self) -> str:
        """One line per property, for logs and tests."""
        sizes = ", ".join(f"{name}={self.layout.sizes[name]}" for name in ("b", "h", "q", "k"))
        masks = ", ".join(f"{op.kind} {op.mask}{'' if op.value is None else f' value={op.value}'}" for op in self.mask_ops)
        return "\n".join(
            (
                f"{self.spelling} {self.output} = attention({self.query}, {self.key}, {self.value})",
                f"  sizes: {sizes}, kv_groups={self.kv_groups}{', folded' if self.folded else ''}",
                f"  masks: {masks or 'none'}{', causal' if self.is_causal else ''} in {self.score_dtype}".replace("torch.", ""),
                f"  scale: {'1/sqrt(d)' if self.scale is None else f'{self.scale:.6g}'}, dropout: {self.dropout_p:g}"
                + (f", softcap: {self.softcap:.6g}" if self.softcap else ""),
                f"  interior: {', '.join(n.name for n in self.interior)}",
            )
        )


@dataclass(frozen=True, eq=False)
class Rejected:
    """Something that looks like an attention and is left as it is; `reason` is shown to the user."""

    node: fx.Node
    reason: str


class NotAttention(Exception):
    """Raised inside a walk: it looks like attention up to here, and this is why it is not taken."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Facts:
    """What a spelling needs to know about the graph as a whole.

    Attributes:
        live: the nodes on which an output or an effect depends.
        written: the nodes whose memory is written in place.
    """

    live: frozenset[fx.Node]
    written: frozenset[fx.Node]
