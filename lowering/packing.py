"""pack and unpack in Inductor: gathers that fuse with what is around them.

Registered as decompositions, so that a pack is an indexed load of its consumer's kernel and an unpack one of its own: reading
``[:, 0]`` of an unpacked value never makes the padded tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from varlen_inductor import _compat_inductor
from varlen_inductor.lowering import ahead
from varlen_inductor.ops import packing

_ops = torch.ops.varlen_inductor


def _rows(source: Tensor, index: Tensor) -> Tensor:
    # The plan made these indices, so Inductor need not check them against the size on the device.
    return torch.ops.aten._unsafe_index.Tensor(source, [index])


def _pack(padded: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return _rows(padded, index)


def _unpack(packed: Tensor, index: Tensor, inverse: Tensor, fill: float = 0.0, repeat: bool = False) -> Tensor:
    return packing.unpack(packed, index, inverse, fill, repeat, rows_of=_rows)


def _unpack_adjoint(grad: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    return packing.unpack_adjoint(grad, index, inverse, rows_of=_rows)


def _plan_static(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Where Python runs, the operator's own kernel plans faster.
    return ahead.plan_static(mask) if _compat_inductor.compiles_ahead_of_time() else NotImplemented


def _row_offsets(like: Tensor, batch: int, length: int, empty: int) -> Tensor:
    return packing.row_offsets(like, batch, length, empty) if _compat_inductor.compiles_ahead_of_time() else NotImplemented


def register() -> None:
    """Register the decompositions with Inductor; further calls do nothing."""
    _compat_inductor.register_inductor_decompositions(
        {
            _ops.pack.default: _pack,
            _ops.unpack.default: _unpack,
            _ops.unpack_adjoint.default: _unpack_adjoint,
            _ops.plan_in_place.default: packing.plan_in_place,
            _ops.plan_static.default: _plan_static,
            _ops.row_offsets.default: _row_offsets,
        }
    )
    for op in (_ops.plan_static.default, _ops.row_offsets.default):
        _compat_inductor.lower_to_operator(op)
