"""Launches of Triton kernels without Triton and without a GPU: what they were told, the first one and later ones."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from varlen_inductor.ops.backends import launch

STREAM = 1234


class Compiled:
    """A kernel as Triton compiles one: notes its name, the grid, and what it is launched with, tensors as their addresses."""

    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self, name: str, log: list[Any]) -> None:
        self.name, self.log = name, log
        self.options: dict[str, Any] = {}
        """Of the last launch that compiles."""

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> Compiled:
            assert any(isinstance(x, Tensor) for x in args)
            self.options = options
            self.log.append((self.name, grid, tuple(x.data_ptr() if isinstance(x, Tensor) else x for x in args)))
            return self

        return launch

    def run(self, *args: Any) -> None:
        assert args[3] == STREAM
        assert not any(isinstance(x, Tensor) for x in args)
        self.log.append((self.name, args[:3], args[9:]))


def note_launches(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> list[Any]:
    """Tensors of the CPU pass for such of a device, and the launchers of ``modules`` only write to the list that is returned."""
    log: list[Any] = []
    runtime = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    monkeypatch.setattr(launch, "knobs", SimpleNamespace(runtime=runtime))
    for module in modules:
        monkeypatch.setattr(module, "_with_triton", lambda x: True)
        monkeypatch.setattr(module, "stream_of", lambda index: STREAM)
        for name, value in list(vars(module).items()):
            if isinstance(value, launch.Launcher):
                monkeypatch.setattr(module, name, launch.Launcher(Compiled(name.removeprefix("_launch_"), log)))
    return log


def compiled(*modules: ModuleType) -> int:
    """How many kernels the launchers of ``modules`` know."""
    return sum(len(x.compiled) for module in modules for x in vars(module).values() if isinstance(x, launch.Launcher))
