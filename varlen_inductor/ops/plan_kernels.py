"""The plan on CUDA: one or two small Triton kernels instead of a dozen operators.

The plan stands between the host and the rest of a packed step: until the host knows the number of tokens it can launch nothing
else. So everything that does not need that number is launched before the host asks for it.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton 3.6 evaluates annotations, so nothing but constexpr has one.)

from __future__ import annotations

import torch
from torch import Tensor

from varlen_inductor.ops.backends.launch import Launcher, stream_of
from varlen_inductor.ops.host_number import HostNumber

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch without Triton
    triton = None

_BLOCK = 1024
_MOST_ROWS = 4 * _BLOCK
_MOST_READ = 2**22
_MOST_POSITIONS = 2**30
"""Their numbers are added up in 32 bits."""


def available(mask: Tensor) -> bool:
    """Whether the kernels can plan for this mask (B, S)."""
    return triton is not None and mask.is_cuda and 0 < mask.shape[0] <= _MOST_ROWS and 0 < mask.numel() <= _MOST_POSITIONS


def reads_labels(mask: Tensor, labels: Tensor) -> bool:
    """Whether the kernels for this mask, which are `available`, can look at these labels on the way."""
    one_by_one = labels.numel() == mask.numel() and labels.is_contiguous() and labels.device == mask.device
    return one_by_one and labels.dtype in (torch.int32, torch.int64) and mask.shape[0] * mask.numel() <= _MOST_READ


def plan(
    mask: Tensor,
    round_to: int,
    on_host: HostNumber | None = None,
    flag: Tensor | None = None,
    longest_first: bool = False,
    labels: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``index`` (B*S,), ``inverse`` (B*S,), ``cu_seqlens`` and the number of valid positions (1,), all on the device.

    Args:
        mask: (B, S) of any dtype, not zero at valid positions.
        round_to: positive: ``cu_seqlens`` (B+2,) ends at the first multiple of it that is larger than the number of valid
            positions (dead rows are a sequence of their own); 0: ``cu_seqlens`` (B+1,) ends at that number.
        on_host: gets the number of valid positions; the last result is then ``None``.
        flag: one number of any dtype; where it is zero, the number of valid positions is given as 0. The rest is as without.
        longest_first: in which order the sequences come; those of one length come as in ``mask``, as all do otherwise.
        labels: one for each position, in their order, and the label that counts for nothing; where any other stands at a position
            that is not valid, the number of valid positions is given as 0. (Only if `reads_labels`.)
    """
    batch, length = mask.shape
    mask = mask.contiguous()
    positions = batch * length
    index = mask.new_empty(positions, dtype=torch.int64)
    inverse = torch.empty_like(index)
    cu_seqlens = mask.new_empty(batch + (2 if round_to else 1), dtype=torch.int32)
    made = mask.new_empty(1, dtype=torch.int64) if on_host is None else None
    count = on_host.memory if made is None else made  # type: ignore[union-attr]
    # No row knows where its tokens go before all rows are counted. To count them again in every program costs less than one more
    # kernel, as long as that is not much to read.
    alone = batch * positions <= _MOST_READ
    rows = cu_seqlens if alone else mask.new_empty((2, batch), dtype=torch.int32)  # what is given in its place is not read
    given = mask if flag is None else flag
    device, at, count_at, flag_at = mask.get_device(), mask.data_ptr(), count.data_ptr(), given.data_ptr()
    looked_at, ignored = (mask, 0) if labels is None else labels
    labels_at = looked_at.data_ptr()
    kinds: tuple[object, ...] = (mask.dtype, at % 16, count_at % 16, given.dtype, flag_at % 16, flag is None, longest_first)
    if labels is not None:
        kinds = (*kinds, looked_at.dtype, labels_at % 16, ignored)
    key = (device, kinds, batch, length, round_to, alone)
    grid = (batch, 1, 1)
    if not alone:
        _launch_count(grid, key, mask, rows, length, batch, _BLOCK)
    options = (round_to != 0, alone, flag is not None, longest_first, labels is not None, ignored)
    numbers = (length, batch, round_to, _BLOCK, 1 << (batch - 1).bit_length(), *options)
    stream = stream_of(device)
    if stream is not None:
        # Until this is launched the host has nothing else to do: addresses are given, about which Triton asks nothing.
        made_at = (index.data_ptr(), inverse.data_ptr(), cu_seqlens.data_ptr(), count_at, flag_at, labels_at)
        if _launch_fill.again(grid, key, stream, at, rows.data_ptr(), *made_at, *numbers):
            return index, inverse, cu_seqlens, made
    _launch_fill(grid, key, mask, rows, index, inverse, cu_seqlens, count, given, looked_at, *numbers)
    return index, inverse, cu_seqlens, made


if triton is not None:

    @triton.jit
    def _count_rows(mask, rows, length, batch, BLOCK: tl.constexpr):
        """The number of valid positions of each row, and the first of them (or the length)."""
        b = tl.program_id(0)
        total = 0
        first = length
        for start in range(0, length, BLOCK):
            at = start + tl.arange(0, BLOCK)
            valid = (tl.load(mask + b.to(tl.int64) * length + at, mask=at < length, other=0) != 0).to(tl.int32)
            total += tl.sum(valid, 0)
            first = tl.minimum(first, tl.min(tl.where(valid != 0, at, length), 0))
        tl.store(rows + b, total)
        tl.store(rows + batch + b, first)

    @triton.jit
    def _counted(rows, length, batch, BATCH: tl.constexpr):
        """What `_count_rows` found: the length of each sequence, and some valid position (none: as many as there are)."""
        every = tl.arange(0, BATCH)
        lengths = tl.load(rows + every, mask=every < batch, other=0)
        firsts = tl.load(rows + batch + every, mask=every < batch, other=0)
        return lengths, tl.min(tl.where((every < batch) & (lengths > 0), every * length + firsts, batch * length), 0)

    @triton.jit
    def _count_all(mask, length, batch, BATCH: tl.constexpr, BLOCK: tl.constexpr):
        """The same, counted once more by every program."""
        row, column = tl.arange(0, BATCH)[:, None], tl.arange(0, BLOCK)[None, :]
        # Elementwise in the loop, summed once: a sum over the block costs more than to read it.
        found = tl.zeros((BATCH, BLOCK), tl.int32)
        first = tl.zeros((BATCH, BLOCK), tl.int32) + batch * length
        for start in range(0, length, BLOCK):
            at = row * length + start + column
            inside = (row < batch) & (start + column < length)
            valid = (tl.load(mask + at, mask=inside, other=0) != 0).to(tl.int32)
            found += valid
            first = tl.minimum(first, tl.where(valid != 0, at, batch * length))
        return tl.sum(found, 1), tl.min(tl.min(first, 1), 0)

    @triton.jit
    def _fill(
        mask,
        rows,
        index,
        inverse,
        cu_seqlens,
        count,
        flag,
        labels,
        length,
        batch,
        round_to,
        BLOCK: tl.constexpr,
        BATCH: tl.constexpr,
        ROUND: tl.constexpr,
        ALONE: tl.constexpr,
        FLAGGED: tl.constexpr,
        LONGEST_FIRST: tl.constexpr,
        LABELED: tl.constexpr,
        IGNORED: tl.constexpr,
    ):
        b = tl.program_id(0)
        if ALONE:
            COLUMNS: tl.constexpr = 4 * BLOCK // BATCH
            lengths, some = _count_all(mask, length, batch, BATCH, COLUMNS)
        else:
            lengths, some = _counted(rows, length, batch, BATCH)
        every = tl.arange(0, BATCH)
        own, total = tl.sum(tl.where(every == b, lengths, 0), 0), tl.sum(lengths, 0)
        earlier = every < b
        if LONGEST_FIRST:
            earlier = (lengths > own) | (earlier & (lengths == own))
        place_of_row = tl.sum(earlier.to(tl.int32), 0)
        before = tl.sum(tl.where(earlier, lengths, 0), 0)
        positions = batch * length
        some = tl.where(total > 0, some, 0)  # a valid position for dead rows to repeat; position 0 if there is none
        tl.store(cu_seqlens + place_of_row + 1, before + own)
        if b == 0:
            tl.store(cu_seqlens, 0)
            found = total
            if FLAGGED:
                found = tl.where(tl.load(flag) != 0, found, 0)
            if LABELED:
                SPAN: tl.constexpr = 4 * BLOCK
                wrong = tl.zeros((SPAN,), tl.int32)
                for start in range(0, positions, SPAN):
                    at = start + tl.arange(0, SPAN)
                    label = tl.load(labels + at, mask=at < positions, other=IGNORED)
                    padded = tl.load(mask + at, mask=at < positions, other=0) == 0
                    wrong |= ((label != IGNORED) & padded).to(tl.int32)
                found = tl.where(tl.max(wrong, 0) == 0, found, 0)
            tl.store(count, found.to(tl.int64))
            if ROUND:
                tl.store(cu_seqlens + batch + 1, (total // round_to + 1) * round_to)
        hole = tl.where(total > 0, -1, -1 - positions)  # of which row a padded position may hold a copy
        rank = before
        for start in range(0, length, BLOCK):
            at = start + tl.arange(0, BLOCK)
            valid = (tl.load(mask + b.to(tl.int64) * length + at, mask=at < length, other=0) != 0).to(tl.int32)
            place = rank + tl.cumsum(valid, 0) - 1
            here = (b * length + at).to(tl.int64)
            tl.store(index + place, here, mask=(at < length) & (valid != 0))
            tl.store(inverse + here, tl.where(valid != 0, place, hole).to(tl.int64), mask=at < length)
            rank += tl.sum(valid, 0)
        for start in range(total + b * BLOCK, positions, batch * BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(index + at, tl.zeros((BLOCK,), tl.int64) + some, mask=at < positions)

    _launch_count, _launch_fill = Launcher(_count_rows), Launcher(_fill)
