"""What goes into the mask prover and what comes out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from .predicate import Obligation, Predicate

__all__ = ["MaskKind", "MaskOp", "MaskProof", "NoValidKey", "ScoreLayout", "Spelling"]

MaskKind = Literal["bool", "add", "fill", "where_keep", "where_else", "mul"]
NoValidKey = Literal["zero", "nan", "uniform", "unmasked", "other"]
Spelling = Literal["sdpa", "decomposed"]


@dataclass(frozen=True)
class MaskOp:
    """One step on the attention scores.

    Attributes:
        kind: "bool": a boolean mask as SDPA takes it, True keeps; "add": scores + mask; "fill":
            ``masked_fill(scores, mask, value)``; "where_keep": ``where(mask, scores, value)`` ("where_else" is another name
            for it); "mul": scores * mask.
        mask: the mask, which broadcasts to the shape of the scores.
        value: what "fill" and "where_keep" put in; a number or a node that holds one. None for the others.
    """

    kind: MaskKind
    mask: fx.Node
    value: float | fx.Node | None = None


@dataclass(frozen=True)
class ScoreLayout:
    """How the dimensions of the scores relate to batch row, head, query and key.

    Attributes:
        dims: for each dimension of the scores, what it is made of, outermost first: ``(("b",), ("h",), ("q",), ("k",))``, or
            ``(("b", "h"), ("q",), ("k",))`` where batch rows and heads are folded.
        sizes: the sizes of b, h, q and k.
    """

    dims: tuple[tuple[str, ...], ...]
    sizes: Mapping[str, int | torch.SymInt]


@dataclass(frozen=True)
class MaskProof:
    """What a mask was proven to be.

    Key ``k`` is visible to query ``q`` of batch row ``b`` exactly if ``key`` holds for (b, k), ``query`` holds for (b, q), and
    ``q - window_left <= k <= q + window_right``.  What becomes of a query that sees no key by this rule is ``no_valid_key``.

    Attributes:
        key: which keys are visible; None: all.
        query: which queries see any key, where the mask has that as a condition of its own; None: all.
        window_left, window_right: -1 for unbounded; (-1, 0) is causal.
        document: a value per position; only positions of equal value see each other.  None: no such condition.
        no_valid_key: what eager gives a query that sees no key: "zero"; "nan"; "uniform": the mean over all keys;
            "unmasked": attention as without any mask; "other": none of these.  "zero" too if there is no such query.
        obligations: facts about the data that the proof presumes.
        assumption: what the proof presumes about the attention scores, in words; None: nothing.
        description: the mask in words.
    """

    key: Predicate | None
    query: Predicate | None
    window_left: int
    window_right: int
    document: Predicate | None
    no_valid_key: NoValidKey
    obligations: tuple[Obligation, ...]
    assumption: str | None
    description: str
