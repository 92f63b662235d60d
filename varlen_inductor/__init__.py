"""varlen_inductor: padded attention becomes varlen attention inside ``torch.compile``.

    model = torch.compile(model, backend="varlen_inductor")

Importing this package loads nothing but itself; each public name loads what it needs when it is first used. PyTorch
imports the package at the end of ``import torch`` when ``TORCH_LOGS`` names it, so it must stay that way.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from varlen_inductor import config
    from varlen_inductor.explanation import Explanation, explain
    from varlen_inductor.inductor_pass import VarlenPass
    from varlen_inductor.ops import AuxRequest, varlen_attn, varlen_attn_out
    from varlen_inductor.switch import disable, enable

__version__ = "0.1.0"

__all__ = [
    "AuxRequest",
    "Explanation",
    "VarlenPass",
    "config",
    "disable",
    "enable",
    "explain",
    "varlen_attn",
    "varlen_attn_out",
]

# The parent of every logger of the package must exist before PyTorch's logging meets its name, or its children are given
# handlers of their own and each line is printed twice.
logging.getLogger(__name__)

_HOME = {
    "AuxRequest": "varlen_inductor.ops",
    "varlen_attn": "varlen_inductor.ops",
    "varlen_attn_out": "varlen_inductor.ops",
    "explain": "varlen_inductor.explanation",
    "Explanation": "varlen_inductor.explanation",
    "enable": "varlen_inductor.switch",
    "disable": "varlen_inductor.switch",
    "VarlenPass": "varlen_inductor.inductor_pass",
}


def __getattr__(name: str) -> Any:
    if name == "config":
        return importlib.import_module("varlen_inductor.config")
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
