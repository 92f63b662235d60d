"""Triton kernels that are launched many times: without looking at every argument each time.

A Triton kernel is compiled for the kinds of its arguments: dtypes, which pointers and numbers are multiples of 16, which numbers
are 1. To find the one that fits, Triton looks at each argument of each launch, which takes it longer than the launch itself. A
caller who knows what the kinds depend on gives that as a key.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

_MOST_KERNELS = 1024


class Launcher:
    """Launches ``kernel``, a ``triton.jit`` function."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[Hashable, Any] = {}

    def __call__(self, grid: tuple[int, int, int], key: Hashable, *args: Any, **options: Any) -> None:
        """Launch.

        Args:
            grid: the numbers of programs.
            key: all that decides which compiled kernel fits: the device, dtypes, alignments, and numbers or their kinds.
            args: every argument of the kernel in its order, constants among them; a tensor comes first, and tells the device.
            options: Triton's own, as ``num_warps``.
        """
        device = args[0].get_device()
        if device >= 0 and device != torch.cuda.current_device():  # to look costs less than to switch
            with torch.cuda.device(device):
                self._launch(grid, key, args, options)
        else:
            self._launch(grid, key, args, options)

    def _launch(self, grid: tuple[int, int, int], key: Hashable, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        compiled = self.compiled.get(key)
        if compiled is not None:
            compiled[grid](*args)
            return
        compiled = self.kernel[grid](*args, **options)
        if compiled is not None:  # it is None where Triton interprets
            if len(self.compiled) >= _MOST_KERNELS:
                self.compiled.clear()
            self.compiled[key] = compiled


def kind(number: int) -> int:
    """What Triton makes a difference by in a number: whether it is 1, a multiple of 16, and fits 32 bits."""
    if number == 1:
        return 1
    return (16 if number % 16 == 0 else 2) if -(2**31) <= number < 2**31 else (64 if number % 16 == 0 else 63)
