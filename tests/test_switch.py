from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import fx, nn

import varlen_inductor
from helpers import run_python, stub_driver
from varlen_inductor import backend, config, switch


@pytest.fixture(autouse=True)
def switched_on() -> Iterator[None]:
    varlen_inductor.enable()
    varlen_inductor.enable()
    yield
    varlen_inductor.disable()


class Recorder:
    """A driver that notes by which route it was called."""

    def __init__(self) -> None:
        self.routes: list[str] = []
        self.options: list[dict[str, Any]] = []

    def __call__(self, gm: fx.GraphModule, inputs: Any, inner: backend.InnerCompiler, route: str) -> Any:
        self.routes.append(route)
        self.options.append(inner.options)
        return inner.compile(gm, inputs)


@pytest.fixture
def driver() -> Iterator[Recorder]:
    recorder = Recorder()
    with stub_driver(recorder), config.patch(inner_backend="eager"):
        yield recorder


def test_plain_torch_compile_goes_through_us(driver: Recorder) -> None:
    linear, x = nn.Linear(4, 4), torch.randn(2, 4)
    torch.testing.assert_close(torch.compile(linear, mode="max-autotune-no-cudagraphs")(x), linear(x))
    assert driver.routes == ["enable"]
    assert driver.options[0]["max_autotune"] is True


def test_disable(driver: Recorder) -> None:
    varlen_inductor.disable()
    assert not switch.is_enabled()
    wrapper = torch._TorchCompileInductorWrapper(None, None, None)
    assert not switch.takes(wrapper)


def test_config_enabled_false(driver: Recorder) -> None:
    with config.patch(enabled=False):
        assert not switch.takes(torch._TorchCompileInductorWrapper(None, None, None))


def test_aotinductor_and_other_backends_are_left_alone(driver: Recorder) -> None:
    assert not switch.takes(torch._TorchCompileAOTInductorWrapper(None, None, None))
    torch.compile(nn.Linear(4, 4), backend="eager")(torch.randn(2, 4))
    assert driver.routes == []


def test_late_options_are_kept(driver: Recorder) -> None:
    wrapper = torch._TorchCompileInductorWrapper(None, {"max_autotune": True}, None)
    gm = fx.symbolic_trace(nn.ReLU())
    wrapper(gm, [torch.ones(1)], config_patches={"epilogue_fusion": False})
    assert driver.options[0]["epilogue_fusion"] is False
    assert driver.options[0]["max_autotune"] is True


def test_what_we_compile_ourselves_is_not_rewritten_again() -> None:
    routes: list[str] = []

    def compile_graph(gm: fx.GraphModule, inputs: Any, inner: backend.InnerCompiler, route: str) -> Any:
        routes.append(route)

        def body(*args: Any) -> Any:
            return gm(*args)

        nested = inner.nested(body)
        return lambda *args: nested(*args)

    linear, x = nn.Linear(4, 4), torch.randn(2, 4)
    with stub_driver(compile_graph), config.patch(strict=True):
        torch.testing.assert_close(torch.compile(linear)(x), linear(x))
        assert routes == ["enable"]
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(linear, backend="varlen_inductor")(x), linear(x))
    assert routes == ["enable", "backend"]


def test_direct_inner_compile_is_plain() -> None:
    recorder = Recorder()
    linear, x = nn.Linear(4, 4), torch.randn(2, 4)
    with stub_driver(recorder), config.patch(strict=True):
        torch.testing.assert_close(torch.compile(linear)(x), linear(x))
    assert recorder.routes == ["enable"]


def import_torch(**env: str) -> str:
    """What ``import torch`` has loaded of us, and whether Inductor's wrapper leads to us afterwards, in a fresh process."""
    return run_python(
        """
        import sys
        from importlib.metadata import entry_points
        import torch
        # Where the package is not installed PyTorch cannot find the entry point, so the program stands in for it.
        installed = any(entry.name == "varlen_inductor" for entry in entry_points(group="torch.backends"))
        if not installed and __import__("os").environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1":
            from varlen_inductor._autoload import autoload
            autoload()
        switch = sys.modules.get("varlen_inductor.switch")
        print(sorted(name for name in sys.modules if name.startswith("varlen_inductor.")))
        print(switch is not None and switch.is_enabled(), "torch._dynamo" in sys.modules)
        """,
        **env,
    )


def test_import_torch_loads_next_to_nothing_when_the_variable_is_unset() -> None:
    assert import_torch(VARLEN_INDUCTOR="0").splitlines() == ["['varlen_inductor._autoload']", "False False"]


def test_import_torch_enables_when_the_variable_is_set() -> None:
    modules, state = import_torch(VARLEN_INDUCTOR="1").splitlines()
    assert state == "True False"
    assert "varlen_inductor.backend" not in modules


def test_torch_can_be_told_not_to_load_us() -> None:
    state = import_torch(VARLEN_INDUCTOR="1", TORCH_DEVICE_BACKEND_AUTOLOAD="0").splitlines()[-1]
    assert state == "False False"


def test_autoload_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    from varlen_inductor import _autoload

    def broken() -> None:
        raise ImportError("half an installation")

    monkeypatch.setenv("VARLEN_INDUCTOR", "1")
    monkeypatch.setattr(switch, "enable", broken)
    with pytest.warns(UserWarning, match="half an installation"):
        _autoload.autoload()
