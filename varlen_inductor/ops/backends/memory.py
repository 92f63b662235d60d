"""Memory for results, and for what kernels leave for one another: a packed training step asks for it a hundred times."""

from __future__ import annotations

import torch
from torch import Tensor

from varlen_inductor import _compat_operators

_allocate = _compat_operators.cuda_allocator()


def empty(like: Tensor, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialized and contiguous, on the device of ``like``, of its dtype unless another is given: ``like.new_empty(size)``.

    No dispatch mode sees it; a deterministic mode does not fill it.
    """
    index = like.get_device()
    if _allocate is None or index < 0 or index != _compat_operators.current_device_index():
        return like.new_empty(size, dtype=dtype)
    dtype = like.dtype if dtype is None else dtype
    if len(size) == 3:  # most are; the loop takes longer
        _, rows, columns = size
        return _allocate(size, ((rows or 1) * (columns or 1), columns or 1, 1), dtype)
    if len(size) == 1:
        return _allocate(size, (1,), dtype)
    step, strides = 1, []
    for n in reversed(size):
        strides.append(step)
        step *= n or 1
    return _allocate(size, tuple(strides[::-1]), dtype)


def empty_results(
    like: Tensor, size: tuple[int, int, int], lse_size: tuple[int, int] | None, index: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Of a forward ``out`` and, if it has a size, lse in float32; as `empty`, with one question for both and no loops.

    Args:
        index: of the device of ``like``, where that is known to be the current one, or to be no CUDA device: negative then.
    """
    if index is None:
        index = like.get_device()
        index = index if index >= 0 and index == _compat_operators.current_device_index() else -1
    if _allocate is None or index < 0:
        return like.new_empty(size), None if lse_size is None else like.new_empty(lse_size, dtype=torch.float32)
    _, heads, dim = size
    out = _allocate(size, (heads * dim, dim, 1), like.dtype)
    return out, None if lse_size is None else _allocate(lse_size, (lse_size[1], 1), torch.float32)
