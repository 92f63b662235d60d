"""Reads the sequences out of ``cu_seq_q`` and ``cu_seq_k``, for backends that go through them one by one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from varlen_inductor.ops.problem import Layout


class Run(NamedTuple):
    """Neighbouring sequences of equal lengths: what is done to one can be done to all of them in one batch.

    Sequence ``i`` of ``count`` has its queries at rows ``q_start + i * q_len`` and following, its keys at
    ``k_start + i * k_step`` and following, of which it uses the first ``k_len``.
    """

    count: int  # type: ignore[assignment]  # a tuple's own `count` is not missed
    q_start: int
    q_len: int
    k_start: int
    k_step: int
    k_len: int

    @property
    def q_rows(self) -> slice:
        return slice(self.q_start, self.q_start + self.count * self.q_len)

    def queries(self, rows: Tensor) -> Tensor:
        """The rows (T_q, ...) of this run as a view (count, q_len, ...)."""
        return rows[self.q_rows].unflatten(0, (self.count, self.q_len))

    def keys(self, rows: Tensor) -> Tensor:
        """The rows (T_k, ...) of this run as a view (count, k_len, ...)."""
        stop = self.k_start + self.count * self.k_step
        return rows[self.k_start : stop].unflatten(0, (self.count, self.k_step))[:, : self.k_len]


def runs(layout: Layout) -> list[Run]:
    """The sequences that have at least one query, in order, neighbours of equal lengths merged."""
    q_ends: list[int] = layout.cu_seq_q.tolist()
    k_ends = q_ends if layout.cu_seq_k is layout.cu_seq_q else layout.cu_seq_k.tolist()
    used = None if layout.seqused_k is None else layout.seqused_k.tolist()
    found: list[Run] = []
    for i in range(len(q_ends) - 1):
        q_start, q_len = q_ends[i], q_ends[i + 1] - q_ends[i]
        k_start, k_step = k_ends[i], k_ends[i + 1] - k_ends[i]
        k_len = k_step if used is None else min(used[i], k_step)
        if q_len <= 0:
            continue
        if found:
            last = found[-1]
            follows = (q_start, k_start) == (last.q_start + last.count * q_len, last.k_start + last.count * k_step)
            if follows and (q_len, k_step, k_len) == (last.q_len, last.k_step, last.k_len):
                found[-1] = last._replace(count=last.count + 1)
                continue
        found.append(Run(1, q_start, q_len, k_start, k_step, k_len))
    return found
