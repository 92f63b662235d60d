"""A number that a kernel hands to the host, in memory that both see.

To ask the device for a number the usual way (``item``) is a copy and a wait, each of which takes the host longer than the kernel
takes to find the number, while the device has nothing to do. Here the kernel writes into pinned memory of the host, and the host
looks there until it has been written.
"""

from __future__ import annotations

import ctypes
from collections import deque

import torch
from torch import Tensor

UNWRITTEN = -1
_LOOKS = 1000
"""So often the host looks before it waits for the device: a tenth of a millisecond, about. Looking keeps Python's lock."""
_IN_A_PIECE = 512


class HostNumber:
    """One int64 that is not negative, in pinned memory.

    Get one with `take`. Once it was read it is used again; if it never is, it is never used again, for a kernel may yet write it.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        """(1,), int64: what the kernel is given."""
        self._cell = ctypes.c_int64.from_address(memory.data_ptr())
        self._taken = False

    def begin(self) -> None:
        self._cell.value = UNWRITTEN
        self._taken = True

    def wait(self, device: torch.device) -> int:
        """The number, once the kernel that was launched on ``device`` has written it. To be called once.

        Raises:
            RuntimeError: all kernels that were launched there are over, and none has written it; or it was read already.
        """
        if not self._taken:
            raise RuntimeError("this number was read already, and may be another's by now")
        cell = self._cell
        for _ in range(_LOOKS):
            if cell.value != UNWRITTEN:
                break
        else:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # lets other threads run, and raises what went wrong there
                if cell.value == UNWRITTEN:  # it was launched on another stream
                    torch.cuda.synchronize(device)
        number = cell.value
        if number == UNWRITTEN:
            raise RuntimeError(f"a kernel on {device} was to write a number for the host; all are over, and none has")
        self._taken = False
        _free.append(self)
        return number


_free: deque[HostNumber] = deque()
# Never given back: PyTorch would lend the memory to others while a kernel that nobody waited for may write to it.
_pieces: list[Tensor] = []


def take() -> HostNumber:
    """One that is not written yet."""
    try:
        number = _free.popleft()
    except IndexError:
        # By name, for a default device may be set.
        piece = torch.zeros(_IN_A_PIECE, dtype=torch.int64, device="cpu", pin_memory=torch.cuda.is_available())
        _pieces.append(piece)
        number, *others = [HostNumber(memory) for memory in piece.split(1)]
        _free.extend(others)
    number.begin()
    return number
