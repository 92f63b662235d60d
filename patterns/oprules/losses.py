"""Losses of labels."""

from __future__ import annotations

from .core import Args, Mixed, Typing, is_tensor, rule, tie

LOSSES_OF_TOKENS = frozenset({"cross_entropy_loss", "nll_loss_nd"})
"""Losses of labels, of which some may be ignored."""


@rule("cross_entropy_loss", "nll_loss", "nll_loss_nd")
def _cross_entropy(a: Args) -> Typing:
    """Scores (N, C, ...) and labels (N, ...), or probabilities like the scores. Every row reads all of the weights of classes."""
    x, target = a.dims(0), a.dims("target")
    classes = min(len(x) - 1, 1)
    rows = (*x[:classes], *x[classes + 1 :])
    probabilities = len(target) == len(x)
    for one, other in zip(x if probabilities else rows, target, strict=True):
        tie(one, other)
    mixed: Mixed = ((a["weight"], 0),) if is_tensor(a["weight"]) else ()
    if a["reduction"] == 0:
        mixed += ((a[0], classes), *([(a["target"], classes)] if probabilities else []))
        return Typing(rows, mixed)
    return Typing((), mixed + tuple((a[0], i) for i in range(len(x))) + tuple((a["target"], i) for i in range(len(target))))
