"""Packing: padded rows to tokens and back, as operators that are each other's adjoint.

A *plan* is made of the mask of valid positions ``(B, S)``:

* ``index`` (T,), int64: the flat position ``b * S + s`` of each packed row. The first ``count`` rows are the valid positions, one
  sequence after the other, in order; the rest are *dead* rows, which repeat a valid one, so that whatever is computed on them is
  as harmless as a real row.
* ``inverse`` (B * S,), int64: the packed row of each position. A padded position has ``-1 - r`` where ``r`` is some valid row,
  or no row (T or more) if there is none.
* ``cu_seqlens``, int32: offsets of the sequences in the packed rows.

Sequences lie in the order of their rows, or with ``longest_first`` in that of their lengths: kernels work on them in the order in
which they lie, and a long one that is begun last keeps a part of the device waiting for it. Queries and keys of an attention must
lie in one order.

``unpack`` has two ways to fill padded positions: with a constant, or (``repeat=True``) with a copy of a valid row, for values
that go on to be computed upon: zeros could meet a division by their norm, whose gradient is not a number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from varlen_inductor import _compat_operators

from . import host_number, plan_kernels
from .host_number import HostNumber

CHUNKS = (64, 32)
"""Packed rows are whole chunks of those of these lengths that divide what their number is rounded to."""

RowsOf = Callable[[Tensor, Tensor], Tensor]

_LIB = torch.library.Library("varlen_inductor", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)

_LIB.define("pack(Tensor padded, Tensor index, Tensor inverse) -> Tensor", tags=_TAGS)
_LIB.define("unpack(Tensor packed, Tensor index, Tensor inverse, float fill=0.0, bool repeat=False) -> Tensor", tags=_TAGS)
_LIB.define("unpack_adjoint(Tensor grad, Tensor index, Tensor inverse) -> Tensor", tags=_TAGS)
_LIB.define("watch_padded_rows(Tensor rows, Tensor inverse, str name) -> Tensor", tags=_TAGS)
_LIB.define("check_padded_rows(Tensor grad, Tensor inverse, str name) -> Tensor", tags=_TAGS)
_LIB.define("row_offsets(Tensor like, SymInt batch, SymInt length, int empty) -> Tensor", tags=_TAGS)
_LIB.define("plan_static(Tensor mask) -> (Tensor, Tensor, Tensor)", tags=_TAGS)
_LIB.define("plan_in_place(Tensor mask) -> (Tensor, Tensor, Tensor, Tensor)", tags=_TAGS)


def _column(flags: Tensor, like: Tensor) -> Tensor:
    return flags.view(-1, *([1] * (like.dim() - 1)))


def _rows_at(source: Tensor, index: Tensor) -> Tensor:
    return torch.ops.aten.index.Tensor(source, [index])


def pack(padded: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Rows of ``padded`` (N, ...) at ``index`` (T,): (T, ...). Its gradient goes to the valid rows; dead rows have none."""
    return _rows_at(padded, index)


def unpack(
    packed: Tensor, index: Tensor, inverse: Tensor, fill: float = 0.0, repeat: bool = False, *, rows_of: RowsOf = _rows_at
) -> Tensor:
    """Rows of ``packed`` (T, ...) at their positions: (N, ...), padded positions filled with ``fill`` or a valid row's copy.

    Where no row is valid there is none to copy, and what an attention wrote of its rows is anything: zeros then.

    ``rows_of`` gathers rows by index (the lowering has one of its own).
    """
    valid = inverse >= 0
    row = torch.where(valid, inverse, -1 - inverse)
    rows = rows_of(packed, row.clamp(max=packed.shape[0] - 1))
    wanted = row < packed.shape[0] if repeat else valid
    filler = torch.full((), 0.0 if repeat else fill, dtype=packed.dtype, device=packed.device)
    return torch.where(_column(wanted, packed), rows, filler)


def unpack_adjoint(grad: Tensor, index: Tensor, inverse: Tensor, *, rows_of: RowsOf = _rows_at) -> Tensor:
    """The gradient of `unpack`: (N, ...) to (T, ...). Dead rows get zero, and what arrives at padded positions is dropped."""
    row = torch.arange(index.shape[0], device=index.device)
    alive = rows_of(inverse, index) == row
    zero = torch.zeros((), dtype=grad.dtype, device=grad.device)
    return torch.where(_column(alive, grad), rows_of(grad, index), zero)


def _unpack_eager(packed: Tensor, index: Tensor, inverse: Tensor, fill: float = 0.0, repeat: bool = False) -> Tensor:
    if packed.shape[0] == 0:
        return packed.new_full((inverse.shape[0], *packed.shape[1:]), fill)
    return unpack(packed, index, inverse, fill, repeat)


def plan_static(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A plan without a data-dependent size: as many packed rows as there are positions, and no host synchronisation.

    Args:
        mask: (B, S) bool, True at valid positions.

    Returns:
        ``index`` (B*S,): valid positions first, then repeats of one; ``inverse`` (B*S,); ``cu_seqlens`` (B+1,) int32, which
        ends at the number of valid positions.
    """
    if plan_kernels.available(mask):
        return plan_kernels.plan(mask, 0)[:3]
    flat = mask.reshape(-1)
    rank = flat.cumsum(0)
    count = rank[-1:] if flat.numel() else rank.new_zeros(1)
    positions = torch.arange(flat.numel(), device=mask.device)
    # Valid positions go to their rank, padded ones behind them: a permutation, so that no two positions collide.
    target = torch.where(flat, rank - 1, count + positions - rank)
    order = torch.empty_like(positions).scatter_(0, target, positions)
    index = torch.where(positions < count, order, order[:1])
    inverse = torch.where(flat, rank - 1, torch.where(count > 0, -1, -1 - flat.numel()))
    cu_seqlens = torch.zeros(mask.shape[0] + 1, dtype=torch.int32, device=mask.device)
    cu_seqlens[1:] = mask.sum(1).cumsum(0)
    return index, inverse, cu_seqlens


class PendingPlan:
    """A plan whose number of rows is not fixed yet: everything about it that does not need that number is under way.

    Args:
        mask: (B, S) of any dtype, not zero at valid positions.
        round_to: rows are rounded up to a multiple of this.
        on_host: the kernel is to give the host the number of valid positions (only where ``plan_kernels.available``).
        flag: one number; where it is zero, the number of valid positions counts as 0.
        longest_first: whether the longest sequences come first.
        labels: as many as there are positions, in their order, and the label that counts for nothing; where another stands at a
            position that is not valid, the number of valid positions counts as 0.

    ``count`` is the number of valid positions: (1,) int64 on the device of the mask, or what the kernel gives the host.
    """

    def __init__(
        self,
        mask: Tensor,
        round_to: int,
        on_host: bool = False,
        flag: Tensor | None = None,
        longest_first: bool = False,
        labels: tuple[Tensor, int] | None = None,
    ) -> None:
        self.round_to = round_to
        self.longest_first = longest_first
        self.mask = mask
        by_kernel = plan_kernels.available(mask)
        if labels is not None and not (by_kernel and plan_kernels.reads_labels(mask, labels[0])):
            agree = ((labels[0].reshape(-1) == labels[1]) | (mask.reshape(-1) != 0)).all()
            flag, labels = agree if flag is None else flag * agree, None
        self._early: tuple[Tensor, Tensor, Tensor] | None = None
        self.count: Tensor | HostNumber
        if by_kernel:
            number = host_number.take() if on_host else None
            *early, count = plan_kernels.plan(mask, round_to, number, flag, longest_first, labels)
            self._early = tuple(early)  # type: ignore[assignment]
            self.count = number or count  # type: ignore[assignment]
        else:
            self.mask = mask if mask.dtype == torch.bool else mask != 0
            count = self.mask.sum().view(1)
            self.count = count if flag is None else count * flag

    def rows_for(self, count: int) -> int:
        """The number of packed rows for ``count`` valid positions: rounded up, with at least one dead row.

        One more than the count, so that there always is a dead row and their sequence is never empty.
        """
        return (count // self.round_to + 1) * self.round_to

    def finish(self, count: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """``index`` (T,), ``inverse`` (B*S,), ``cu_seqlens`` (B+2,) for ``rows`` packed rows, of which ``count`` are tokens."""
        if self._early is None:
            return plan_packed(self.mask, rows, self.longest_first)
        index, inverse, cu_seqlens = self._early
        if rows != self.rows_for(count):
            cu_seqlens[-1:].fill_(rows)
        if rows > index.shape[0]:
            # More rows than positions: a small domain that is all valid, beside others that are not.
            index = torch.cat([index, index[:1].expand(rows - index.shape[0])])
        return _compat_operators.reinterpret(index, (rows,), (1,), 0), inverse, cu_seqlens  # index[:rows], sooner


def plan_packed(mask: Tensor, rows: int, longest_first: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """A plan with ``rows`` packed rows, more than there are valid positions; the rest are dead rows, a sequence of their own.

    A function and not an operator: it runs between graphs, where the number of valid positions is known.

    Args:
        mask: (B, S) bool, True at valid positions, of which there is at least one and at most ``rows - 1``.
        rows: the number of packed rows, T.
        longest_first: in which order the sequences come; those of one length come as in ``mask``, as all do otherwise.

    Returns:
        ``index`` (T,), ``inverse`` (B*S,), ``cu_seqlens`` (B+2,) int32, which ends at T.
    """
    batch, length = mask.shape
    order = mask.sum(1).argsort(descending=True, stable=True) if longest_first else None
    placed = mask if order is None else mask[order]
    flat = placed.reshape(-1)
    rank = flat.cumsum(0)
    index = torch.nonzero_static(flat, size=rows, fill_value=-1).view(-1)
    inverse = torch.where(flat, rank - 1, -1)
    index = torch.where(index < 0, index[:1], index)
    if order is not None:
        index = order[index // length] * length + index % length
        inverse = torch.empty_like(inverse.view(batch, length)).index_copy_(0, order, inverse.view(batch, length)).view(-1)
    cu_seqlens = torch.full((batch + 2,), rows, dtype=torch.int32, device=mask.device)
    cu_seqlens[0] = 0
    cu_seqlens[1:-1] = rank.view(batch, length)[:, -1]
    return index, inverse, cu_seqlens


def row_offsets(like: Tensor, batch: int, length: int, empty: int) -> Tensor:
    """``cu_seqlens`` of ``batch`` sequences of ``length`` rows each, then ``empty`` empty ones: (batch + empty + 1,) int32."""
    rows = torch.arange(batch + empty + 1, dtype=torch.int32, device=like.device)
    return rows.clamp(max=batch).mul(length)


def watch_padded_rows(rows: Tensor, inverse: Tensor, name: str) -> Tensor:
    """A copy of ``rows`` (B * S, ...) whose gradient `check_padded_rows` looks at: what ``config.debug`` does to outputs."""
    return rows.clone()


def check_padded_rows(grad: Tensor, inverse: Tensor, name: str) -> Tensor:
    """A copy of ``grad`` (B * S, ...), the gradient of the output ``name``.

    Raises:
        RuntimeError: it is not zero at some padded position. The rows there were never computed, so a loss outside of the
            compiled model that depends on them has been given zeros for their value and loses their gradient.
    """
    padded = (grad != 0).flatten(1).any(1) if grad.dim() > 1 else grad != 0
    padded = padded & (inverse < 0)
    if padded.any():
        raise RuntimeError(
            f"varlen_inductor: the gradient of {name} is not zero in {int(padded.sum())} of its {int((inverse < 0).sum())} padded"
            " rows, which were not computed. A loss outside of the compiled model reads them: mask it, move it into the compiled"
            ' function, or set varlen_inductor.config.padded_rows = "keep".'
        )
    return grad.clone()


def plan_in_place(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A plan that moves nothing: every sequence stays where it is and is followed by one that holds its padding.

    Args:
        mask: (B, S) bool, True at valid positions, which must be the first ones of each row.

    Returns:
        ``index`` (B*S,), the identity; ``inverse`` (B*S,), where padded positions name the first row of their own sequence;
        ``cu_seqlens`` (2*B+1,) int32; ``used`` (2*B,) int32, the keys in use: all of each sequence, none of its padding.
    """
    batch, length = mask.shape
    flat = mask.reshape(-1)
    index = torch.arange(batch * length, device=mask.device)
    inverse = torch.where(flat, index, -1 - index // length * length)
    lengths = mask.sum(1)
    offset = torch.arange(2 * batch + 1, device=mask.device)
    own = lengths[(offset // 2).clamp(max=batch - 1)]
    cu_seqlens = (offset // 2 * length + offset % 2 * own).to(torch.int32)
    used = torch.where(offset % 2 == 0, own, 0)[: 2 * batch].to(torch.int32)
    return index, inverse, cu_seqlens, used


_FUNCTIONS: dict[str, Callable[..., object]] = {
    "row_offsets": row_offsets,
    "pack": pack,
    "unpack": _unpack_eager,
    "unpack_adjoint": unpack_adjoint,
    "plan_static": plan_static,
    "plan_in_place": plan_in_place,
    "watch_padded_rows": watch_padded_rows,
    "check_padded_rows": check_padded_rows,
}
for _name, _function in _FUNCTIONS.items():
    _LIB.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("varlen_inductor::pack")
def _(padded: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return padded.new_empty((index.shape[0], *padded.shape[1:]))


@torch.library.register_fake("varlen_inductor::unpack")
def _(packed: Tensor, index: Tensor, inverse: Tensor, fill: float = 0.0, repeat: bool = False) -> Tensor:
    return packed.new_empty((inverse.shape[0], *packed.shape[1:]))


@torch.library.register_fake("varlen_inductor::unpack_adjoint")
def _(grad: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return grad.new_empty((index.shape[0], *grad.shape[1:]))


@torch.library.register_fake("varlen_inductor::watch_padded_rows")
def _(rows: Tensor, inverse: Tensor, name: str) -> Tensor:
    return torch.empty_like(rows)


@torch.library.register_fake("varlen_inductor::check_padded_rows")
def _(grad: Tensor, inverse: Tensor, name: str) -> Tensor:
    return torch.empty_like(grad)


@torch.library.register_fake("varlen_inductor::row_offsets")
def _(like: Tensor, batch: int, length: int, empty: int) -> Tensor:
    return like.new_empty((batch + empty + 1,), dtype=torch.int32)


@torch.library.register_fake("varlen_inductor::plan_in_place")
def _(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = mask.new_empty((mask.shape[0] * mask.shape[1],), dtype=torch.int64)
    cu_seqlens = mask.new_empty((2 * mask.shape[0] + 1,), dtype=torch.int32)
    return index, torch.empty_like(index), cu_seqlens, mask.new_empty((2 * mask.shape[0],), dtype=torch.int32)


@torch.library.register_fake("varlen_inductor::plan_static")
def _(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    positions = mask.shape[0] * mask.shape[1]
    index = mask.new_empty((positions,), dtype=torch.int64)
    return index, torch.empty_like(index), mask.new_empty((mask.shape[0] + 1,), dtype=torch.int32)


def _keep_plan(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1], inputs[2])


def _pack_backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    index, inverse = ctx.saved_tensors
    return torch.ops.varlen_inductor.unpack(grad, index, inverse), None, None


def _unpack_backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    index, inverse = ctx.saved_tensors
    return torch.ops.varlen_inductor.unpack_adjoint(grad, index, inverse), None, None, None, None


def _adjoint_backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    index, inverse = ctx.saved_tensors
    return torch.ops.varlen_inductor.unpack(grad, index, inverse), None, None


def _keep_name(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(inputs[1])
    ctx.name = inputs[2]


def _watch_backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    return torch.ops.varlen_inductor.check_padded_rows(grad, *ctx.saved_tensors, ctx.name), None, None


torch.library.register_autograd("varlen_inductor::watch_padded_rows", _watch_backward, setup_context=_keep_name, lib=_LIB)
torch.library.register_autograd("varlen_inductor::pack", _pack_backward, setup_context=_keep_plan, lib=_LIB)
torch.library.register_autograd("varlen_inductor::unpack", _unpack_backward, setup_context=_keep_plan, lib=_LIB)
torch.library.register_autograd("varlen_inductor::unpack_adjoint", _adjoint_backward, setup_context=_keep_plan, lib=_LIB)
