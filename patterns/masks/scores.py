"""What a mask does to the scores, row by row of the truth table, in the arithmetic that eager uses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .errors import NotProven
from .expr import Expr
from .lower import Lowering
from .proof import NoValidKey, Spelling
from .table import evaluate

__all__ = ["Outcome", "ScoreStep", "apply_steps"]

# A score that is lowered by this much, or set this low, is presumed not to count; anything milder is a bias.
HIDES = -9000.0
# Below this no score can reach: hiding presumes nothing.
SURELY_HIDES = -1e30
# Scores are presumed to stay within this when what absorbs them is decided.
_SCORE_BOUND = 1e4
_UNDERFLOW = {torch.float64: 746}


@dataclass(frozen=True)
class ScoreStep:
    """A `MaskOp` with its mask and its value as expressions."""

    kind: str
    mask: Expr
    value: Expr | None = None


@dataclass(frozen=True)
class Outcome:
    """For each row of the truth table: is the score still there, and what was added to it (or what replaced it)?

    ``dtype`` is that of the scores; ``value`` has the dtype that eager computes in.
    """

    is_score: torch.Tensor
    value: torch.Tensor
    dtype: torch.dtype

    @property
    def keep(self) -> torch.Tensor:
        """Rows in which the score is unchanged."""
        return self.is_score & (self.value == 0)

    def check(self) -> None:
        """Raise unless every row keeps the score or hides it."""
        hidden = ~self.keep
        if bool(self.value.isnan().any()):
            raise NotProven("the mask is NaN somewhere (such as 0 * -inf)")
        if bool((hidden & (self.value > HIDES)).any()):
            added = bool((hidden & self.is_score & (self.value > HIDES)).any())
            worst = float(self.value[hidden & (self.value > HIDES)].max())
            what = f"adds {worst:g} to some scores" if added else f"replaces some scores by {worst:g}"
            raise NotProven(f"the mask {what}: a bias, which does not hide a key")

    def assumption(self) -> str | None:
        """What must be presumed about the scores for the hidden ones to weigh exactly nothing."""
        finite = ~self.keep & self.value.isfinite()
        lowest = max(SURELY_HIDES, torch.finfo(self.dtype).min)
        mild = finite & (self.value > lowest)
        if not bool(mild.any()):
            return None
        weakest = float(self.value[mild].max())
        room = -weakest - _UNDERFLOW.get(self.value.dtype, 104)
        if bool((mild & self.is_score).any()):
            return f"adding {weakest:g} hides a key: the attention scores of a query differ by less than {room:g}"
        return f"a score of {weakest:g} hides a key: all attention scores are above {-room:g}"

    def no_valid_key(self, rows: torch.Tensor, spelling: Spelling) -> NoValidKey:
        """What eager gives a query all of whose keys are hidden in one of the ways of ``rows``."""
        if not bool(rows.any()):
            return "zero"
        values = {float(v) for v in self.value[rows].unique().tolist()}
        if values == {-math.inf}:
            return "zero" if spelling == "sdpa" else "nan"
        if len(values) != 1:
            return "other"
        (value,) = values
        added = self.is_score[rows]
        if not bool(added.any()) or (_ulp(value, self.value.dtype) / 2 >= _SCORE_BOUND):
            return "uniform"
        return "unmasked" if bool(added.all()) and _ulp(value, self.value.dtype) <= 2**-7 else "other"


def _ulp(value: float, dtype: torch.dtype) -> float:
    """The distance of neighbouring numbers around ``value``; infinite where the next one is infinite."""
    if math.isinf(value):
        return math.inf
    return math.ldexp(torch.finfo(dtype).eps, math.frexp(value)[1] - 1)


def apply_steps(
    steps: Sequence[ScoreStep], lowering: Lowering, shape: Sequence[int], dtype: torch.dtype, spelling: Spelling
) -> Outcome:
    """Apply the steps to a score of 0 in every row of the table of this shape."""
    # SDPA adds the mask in float32 when the scores are of a half type; spelled out, the mask is added in the dtype given.
    compute = torch.float32 if spelling == "sdpa" and dtype in (torch.float16, torch.bfloat16) else dtype
    is_score = torch.ones(tuple(shape), dtype=torch.bool, device="cpu")
    value = torch.zeros(tuple(shape), dtype=compute, device="cpu")
    for step in steps:
        mask = evaluate(lowering, step.mask, len(shape))
        if step.kind == "add":
            added = mask.to(dtype) if spelling == "sdpa" else mask
            value = value + added
            continue
        fill = -math.inf if step.value is None else float(lowering.tensor(step.value).to(value.dtype))
        keep = ~mask if step.kind == "fill" else mask
        is_score = is_score & keep
        value = torch.where(keep, value, torch.tensor(fill, dtype=value.dtype, device="cpu"))
    return Outcome(is_score, value.expand(tuple(shape)), dtype)
