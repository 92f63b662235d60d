"""The mask prover: what an attention mask means, proven from how the graph computes it.

`prove` takes the steps that a mask applies to the attention scores and returns a `MaskProof`, or raises `NotProven` with a
reason in words for the user.  `docs/masks.md` lists the families of masks that are recognised.
"""

from .errors import NotProven
from .predicate import Obligation, Predicate
from .proof import MaskKind, MaskOp, MaskProof, NoValidKey, ScoreLayout, Spelling
from .prove import prove

__all__ = [
    "MaskKind",
    "MaskOp",
    "MaskProof",
    "NoValidKey",
    "NotProven",
    "Obligation",
    "Predicate",
    "ScoreLayout",
    "Spelling",
    "prove",
]
