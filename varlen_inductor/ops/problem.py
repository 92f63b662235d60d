"""The arguments of one varlen attention, sorted by what they are to a kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

UNBOUNDED = -1
"""A window side without a limit."""


class Layout(NamedTuple):
    """Where the sequences lie in the rows of query, key and value: data, known to the device only."""

    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int
    seqused_k: Tensor | None = None
    position_q: Tensor | None = None
    position_k: Tensor | None = None
    tails_unread: bool = False
    block_table: Tensor | None = None
    """(N, pages of a sequence) int32: keys and values lie in pages (pages, page_size, H_k, D), and ``cu_seq_k`` says nothing."""
    lse_by_row: bool = False
    """Whether lse is (T_q, H), and so is its gradient."""
    seeds_at: int = 0
    """Where in ``seeds`` the two numbers of this attention are."""
    seeds: Tensor | None = None
    """(n,) int64, n at least ``seeds_at + 2``, from two of which a forward draws what it drops; without it the forward draws these
    numbers, too."""


class Rule(NamedTuple):
    """What is done to the scores: the scale, who sees whom, and how many weights are dropped."""

    scale: float
    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED
    dropout_p: float = 0.0
    softcap: float = 0.0
    """Scores become softcap * tanh(scores / softcap) behind the scale and before the window; 0 is off."""
    batch_invariant: bool = False
    """Whether a sequence's result must be the same bit by bit whatever the others of its batch are."""

    @property
    def windowed(self) -> bool:
        """Whether a query may see fewer keys than its sequence has. Causality is a window too."""
        return self.window_left != UNBOUNDED or self.window_right != UNBOUNDED

    @property
    def causal(self) -> bool:
        """Whether a query sees every key up to its own and none behind."""
        return self.window_left == UNBOUNDED and self.window_right == 0


class Problem(NamedTuple):
    """What a backend must know to say whether it can run an attention. No token counts, so that a model has few problems."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_heads_k: int
    head_dim: int
    head_dim_v: int
    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED
    dropout_p: float = 0.0
    seqused_k: bool = False
    positions: bool = False
    length: int = 0
    """The bound of the query lengths, rounded up to a power of two. 0 where it is a symbol, and with ``batch_invariant``, so that
    the choice of kernel is one too."""
    softcap: float = 0.0
    deterministic: bool = False
    """Whether the same operands must give the same gradients bit by bit (``torch.use_deterministic_algorithms``)."""
    paged: bool = False
    page_size: int = 0
    batch_invariant: bool = False
    tails_unread: bool = False
    """As of the layout: kernels that would read or leave anything behind the last sequence need no help then."""
    seeded: bool = False
    """Whether something is dropped by the seeds of the layout."""

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule) -> Problem:
        """The problem that these operands (real or fake) pose. Heads and head dims that are symbols become numbers."""
        _, num_heads, head_dim = query.shape
        return cls(
            query.device,
            query.dtype,
            int(num_heads),
            int(key.shape[-2]),
            int(head_dim),
            int(value.shape[-1]),
            rule.window_left,
            rule.window_right,
            rule.dropout_p,
            layout.seqused_k is not None,
            layout.position_q is not None,
            0 if rule.batch_invariant else length_class(layout.max_q),
            rule.softcap,
            must_be_deterministic(),
            layout.block_table is not None,
            0 if layout.block_table is None else int(key.shape[1]),
            rule.batch_invariant,
            layout.tails_unread,
            layout.seeds is not None and rule.dropout_p > 0.0,
        )

    @property
    def windowed(self) -> bool:
        """Whether a query may see fewer keys than its sequence has. Causality is a window too."""
        return self.window_left != UNBOUNDED or self.window_right != UNBOUNDED


def length_class(max_q: int) -> int:
    """`Problem.length` for a bound of the lengths; nothing is asked of a symbol, so that no guard is made."""
    return 1 << (max_q - 1).bit_length() if isinstance(max_q, int) and max_q > 0 else 0


def must_be_deterministic() -> bool:
    """``Problem.deterministic`` here and now. A mere warning is no obligation, as for PyTorch's own kernels."""
    return torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of lse, and of what exact kernels accumulate in, for operands of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
