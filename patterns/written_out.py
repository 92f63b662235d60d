"""`torch.tensor` of numbers on a device: recorded as operators instead of made while recording.

`torch.tensor` runs below every mode that records: what it makes on a device would be made there at compile time, a constant of
which nothing is known, and moving it there from the host, as PyTorch does, waits and cannot be part of a CUDA graph.

before                                                   after
%c = torch.tensor(0.0, device="cuda:0")                  %c = aten.full.default([], 0.0, device="cuda:0")
%c = torch.tensor([1.0, 2.0], device="cuda:0")           %t = %_tensor_constant0, %c = aten.to.device(%t, "cuda:0", ...)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_FACTORIES = frozenset({torch.tensor, torch.as_tensor, torch.asarray})


def decomposition(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Tensor] | None:
    """The function to call in place of a tensor of numbers on a device other than the CPU, or None if it is none."""
    if target not in _FACTORIES or len(args) != 1 or set(kwargs) - {"device", "dtype"} or not _holds_numbers(args[0]):
        return None
    device = kwargs.get("device")
    if device is None or torch.device(device).type == "cpu":
        return None
    return _number if isinstance(args[0], (bool, int, float)) else _numbers


def _holds_numbers(data: Any) -> bool:
    return all(map(_holds_numbers, data)) if isinstance(data, (list, tuple)) else isinstance(data, (bool, int, float))


def _number(number: float, *, device: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.full((), number, device=device, dtype=dtype)


def _numbers(data: Any, *, device: Any, dtype: torch.dtype | None = None) -> Tensor:
    return torch.tensor(data, dtype=dtype).to(device)
