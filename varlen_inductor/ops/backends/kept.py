"""What kernels keep with offsets that nothing writes to once they are made.

Whether a tensor still holds what it held cannot be told: generated kernels and replayed CUDA graphs write to one and leave its
version alone. Whoever made one and gives it to nobody who writes to it can say so; what is found out about it then lives as long.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_NAME = "_varlen_inductor_kept"


def never_written(offsets: Tensor) -> None:
    """Says of ``offsets`` that they stay as they are, for all that comes behind what made them.

    Not where CUDA graphs are recorded: they take memory back while a tensor still holds it.
    """
    setattr(offsets, _NAME, {})


def with_tensor(offsets: Tensor) -> dict[Any, Any] | None:
    """What was found out about ``offsets``, to be looked at and added to; ``None`` where they may change."""
    return getattr(offsets, _NAME, None)
