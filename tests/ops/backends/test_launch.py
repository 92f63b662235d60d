"""Launches of Triton kernels: what they are told, without Triton and without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from varlen_inductor import _compat_operators
from varlen_inductor.ops.backends import launch
from varlen_inductor.ops.backends.launch import Launcher


class Rows:
    """A tensor of device 0, as far as launches look at one."""

    def get_device(self) -> int:
        return 0


class Hooks:
    """Triton 3.6's ``HookChain``."""

    def __init__(self) -> None:
        self.calls: list[Any] = []


class Compiled:
    """Triton 3.6's ``CompiledKernel``: how it was launched."""

    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args: self.log.append(("by Triton", grid, args))

    def run(self, *args: Any) -> None:
        self.log.append(("directly", args))


class Kernel:
    """A ``triton.jit`` function."""

    def __init__(self, compiled: Any, log: list[Any]) -> None:
        self.compiled, self.log = compiled, log

    def __getitem__(self, grid: Any) -> Any:
        def first(*args: Any, **options: Any) -> Any:
            self.log.append(("first", grid, args, options))
            return self.compiled

        return first


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    runtime = SimpleNamespace(launch_enter_hook=Hooks(), launch_exit_hook=Hooks())
    monkeypatch.setattr(launch, "knobs", SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(_compat_operators, "current_stream_pointer", lambda index: 40 + index)
    monkeypatch.setattr(_compat_operators, "current_device_index", lambda: 0)
    return runtime


ROWS = Rows()
DIRECTLY = ("directly", (2, 3, 1, 40, 7, (4, 1, 0), None, None, None, ROWS, 5))


def test_the_second_launch_is_direct(hooks: SimpleNamespace) -> None:
    log: list[Any] = []
    launcher = Launcher(Kernel(Compiled(log), log))
    launcher((2, 3, 1), "key", ROWS, 5, num_warps=8)
    launcher((2, 3, 1), "key", ROWS, 5, num_warps=8)
    assert log == [("first", (2, 3, 1), (ROWS, 5), {"num_warps": 8}), DIRECTLY]
    launcher((2, 3, 1), "another key", ROWS, 5)
    assert log[-1] == ("first", (2, 3, 1), (ROWS, 5), {})


def test_again(hooks: SimpleNamespace) -> None:
    log: list[Any] = []
    launcher = Launcher(Kernel(Compiled(log), log))
    assert not launcher.again((2, 3, 1), "key", 40, ROWS, 5)
    launcher((2, 3, 1), "key", ROWS, 5)
    assert launcher.again((2, 3, 1), "key", 40, ROWS, 5)
    assert log[1:] == [DIRECTLY]
    hooks.launch_exit_hook.calls.append(print)
    assert not launcher.again((2, 3, 1), "key", 40, ROWS, 5)
    assert len(log) == 2


def test_with_addresses(hooks: SimpleNamespace) -> None:
    """A launch that is known gets the addresses, any other the tensors: the first, one on no device, one that a hook hears of."""
    log: list[Any] = []
    launcher = Launcher(Kernel(Compiled(log), log))
    given = ((ROWS, None), (4096, None), 5)
    launcher.with_addresses((2, 3, 1), "key", 41, *given, num_warps=8)
    launcher.with_addresses((2, 3, 1), "key", 41, *given, num_warps=8)
    assert log[0] == ("first", (2, 3, 1), (ROWS, None, 5), {"num_warps": 8})
    assert log[1] == ("directly", (2, 3, 1, 41, 7, (4, 1, 0), None, None, None, 4096, None, 5))
    launcher.with_addresses((2, 3, 1), "key", None, *given)
    assert log[2] == ("directly", (2, 3, 1, 40, 7, (4, 1, 0), None, None, None, ROWS, None, 5))
    hooks.launch_enter_hook.calls.append(print)
    launcher.with_addresses((2, 3, 1), "key", 41, *given)
    assert log[3:] == [("by Triton", (2, 3, 1), (ROWS, None, 5))]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_are_called_by_triton(name: str, hooks: SimpleNamespace) -> None:
    log: list[Any] = []
    launcher = Launcher(Kernel(Compiled(log), log))
    launcher((2, 3, 1), "key", ROWS, 5)
    by_triton = ("by Triton", (2, 3, 1), (ROWS, 5))
    getattr(hooks, name).calls.append(print)
    launcher((2, 3, 1), "key", ROWS, 5)
    assert log.pop() == by_triton
    setattr(hooks, name, print)  # a hook by itself, as in older releases
    launcher((2, 3, 1), "key", ROWS, 5)
    assert log.pop() == by_triton
    setattr(hooks, name, None)
    launcher((2, 3, 1), "key", ROWS, 5)
    assert log.pop() == DIRECTLY


def test_a_triton_that_is_not_known(hooks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    by_triton = ("by Triton", (2, 3, 1), (ROWS, 5))
    for missing in ("function", "packed_metadata", "run"):
        log: list[Any] = []
        launcher = Launcher(Kernel(type("Other", (Compiled,), {missing: None})(log), log))
        for _ in range(2):
            launcher((2, 3, 1), "key", ROWS, 5)
        assert log[1:] == [by_triton]
        assert not launcher.again((2, 3, 1), "key", 40, ROWS, 5)
    log = []
    launcher = Launcher(Kernel(Compiled(log), log))
    for knobs in (None, SimpleNamespace(runtime=SimpleNamespace())):
        monkeypatch.setattr(launch, "knobs", knobs)
        for _ in range(2):
            launcher((2, 3, 1), "key", ROWS, 5)
        assert log.pop() == by_triton


def test_nothing_is_kept_where_triton_interprets(hooks: SimpleNamespace) -> None:
    log: list[Any] = []
    launcher = Launcher(Kernel(None, log))
    for _ in range(2):
        launcher((2, 3, 1), "key", ROWS, 5)
    assert [kind for kind, *_ in log] == ["first", "first"]


def test_on_another_device(hooks: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is launched on its tensors' device, on the stream that is current there."""
    log: list[Any] = []
    current = [3]

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(_compat_operators, "current_device_index", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(Compiled, "run", lambda self, *args: log.append((current[-1], args[3])))
    launcher = Launcher(Kernel(Compiled(log), log))
    launcher((2, 3, 1), "key", ROWS, 5)
    launcher((2, 3, 1), "key", ROWS, 5)
    assert log[1:] == [(0, 40)]
    assert current == [3]
