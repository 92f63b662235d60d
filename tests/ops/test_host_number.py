"""A number in memory of the host that a kernel writes: here the host itself does."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from varlen_inductor.ops import host_number

CPU = torch.device("cpu")


def test_a_number_is_waited_for() -> None:
    number = host_number.take()

    def write() -> None:
        time.sleep(0.01)
        number.memory.fill_(7)

    thread = threading.Thread(target=write)
    thread.start()
    while int(number.memory) == host_number.UNWRITTEN:  # on the CPU nothing but looking waits
        time.sleep(0.001)
    assert number.wait(CPU) == 7
    thread.join()


def test_one_that_was_read_is_used_again_and_starts_unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_number, "_free", type(host_number._free)())
    first = host_number.take()
    others = [host_number.take() for _ in range(len(host_number._free))]
    first.memory.fill_(3)
    assert first.wait(CPU) == 3
    again = host_number.take()
    assert again is first and int(again.memory) == host_number.UNWRITTEN
    assert len({number.memory.data_ptr() for number in (again, *others)}) == len(others) + 1


def test_one_that_was_not_read_is_never_used_again() -> None:
    forgotten = host_number.take()
    address = forgotten.memory.data_ptr()
    del forgotten
    for _ in range(2 * host_number._IN_A_PIECE):
        assert host_number.take().memory.data_ptr() != address


def test_a_kernel_that_never_writes_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="a kernel on cpu was to write a number"):
        host_number.take().wait(CPU)


def test_it_is_read_once() -> None:
    """By then it may be another's."""
    number = host_number.take()
    number.memory.fill_(3)
    number.wait(CPU)
    with pytest.raises(RuntimeError, match="read already"):
        number.wait(CPU)


def test_a_default_device_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_number, "_free", type(host_number._free)())
    with torch.device("meta"):
        assert host_number.take().memory.device == CPU
