"""The operators: attention over packed sequences, and what packs and unpacks them.

``api`` is what users call, ``attention`` registers the operator with PyTorch, ``backends`` holds the kernels,
``reference`` the readable definition that each kernel is tested against.
"""

from __future__ import annotations

from varlen_inductor.ops import flops  # noqa: F401  (registers the formulas)
from varlen_inductor.ops.api import AuxRequest, varlen_attn, varlen_attn_out

__all__ = ["AuxRequest", "varlen_attn", "varlen_attn_out"]
