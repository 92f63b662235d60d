"""Kernels of generated code that have settled down are launched without Inductor's questions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from varlen_inductor import _compat_inductor
from varlen_inductor.lowering.quick_launches import FIRST, QuickLaunches


class Launcher:
    store_cubin = False

    def __init__(self) -> None:
        self.config = SimpleNamespace()
        self.launched: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any, stream: int) -> str:
        self.launched.append((*args, stream))
        return "quick"


def kernel(launchers: int = 1, **attributes: Any) -> CachingAutotuner:
    """As it is after its first launch; its own `run` answers "slow"."""
    made = CachingAutotuner.__new__(CachingAutotuner)
    made.launchers = [Launcher() for _ in range(launchers)]
    made.triton_interpret = made.dump_launch_params = made.dump_launch_tensors = False
    made.is_statically_launchable = lambda: True
    made.inductor_meta = {}
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of generated code, under an Inductor that does not do this itself."""
    monkeypatch.delattr(CachingAutotuner, "_build_fast_launcher", raising=False)
    monkeypatch.setattr(CachingAutotuner, "run", lambda self, *args, stream, **options: "slow")
    made = ModuleType("generated")
    made.call = lambda args: args  # type: ignore[attr-defined]
    return made


def test_quick(module: ModuleType) -> None:
    module.triton_poi_fused_0 = settled = kernel()  # type: ignore[attr-defined]
    assert settled.run(1, 2, stream=3) == "slow"
    assert _compat_inductor.launch_quickly(module) == 1
    assert module.triton_poi_fused_0.run(1, 2, stream=3) == "quick"
    assert settled.launchers[0].launched == [(1, 2, 3)]
    assert module.triton_poi_fused_0.launchers is settled.launchers
    assert settled.run(1, 2, stream=3) == "slow", "other modules share the kernel, and caches pickle it"
    assert _compat_inductor.launch_quickly(module) == 0, "it is done once"


def test_options_and_profilers_go_the_long_way(module: ModuleType) -> None:
    module.triton_poi_fused_0 = kernel()  # type: ignore[attr-defined]
    _compat_inductor.launch_quickly(module)
    settled = module.triton_poi_fused_0
    assert settled.run(1, stream=3, benchmark_run=True) == "slow"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert settled.run(1, stream=3) == "slow"
    assert settled.run(1, stream=3) == "quick"


STAYS: dict[str, Callable[[], CachingAutotuner]] = {
    "never launched": lambda: kernel(0),
    "still several configurations": lambda: kernel(2),
    "interpreted": lambda: kernel(triton_interpret=True),
    "dumped": lambda: kernel(dump_launch_params=True),
    "still to be tuned": lambda: kernel(inductor_meta={"coordinate_descent_tuning": True}),
    "needs Triton's allocator": lambda: kernel(is_statically_launchable=lambda: False),
}


@pytest.mark.parametrize("case", STAYS)
def test_stays(case: str, module: ModuleType) -> None:
    module.triton_poi_fused_0 = other = STAYS[case]()  # type: ignore[attr-defined]
    assert _compat_inductor.launch_quickly(module) == 0
    assert module.triton_poi_fused_0 is other


def test_not_where_inductor_does_it(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    module.triton_poi_fused_0 = kernel()  # type: ignore[attr-defined]
    monkeypatch.setattr(CachingAutotuner, "_build_fast_launcher", lambda self, launcher: None, raising=False)
    assert _compat_inductor.launch_quickly(module) == 0


def test_only_code_that_was_loaded_since(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """And code that is loaded late, a first backward's, is found later."""
    before, early, late = module, ModuleType("early"), ModuleType("late")
    modules = before, early, late

    def launched() -> list[str]:
        return [each.triton_poi_fused_0.run(stream=0) for each in modules]

    for each in modules:
        each.triton_poi_fused_0 = kernel()  # type: ignore[attr-defined]
    monkeypatch.setattr(PyCodeCache, "modules", [before])
    launches = QuickLaunches()
    PyCodeCache.modules.append(early)
    for _ in range(FIRST - 1):
        launches.called()
    assert launched() == ["slow", "slow", "slow"]
    launches.called()
    PyCodeCache.modules.append(late)
    assert launched() == ["slow", "quick", "slow"]
    for _ in range(FIRST):
        launches.called()
    assert launched() == ["slow", "quick", "quick"]


def test_a_failure_stays_inside(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def moved(module: ModuleType) -> int:
        raise AttributeError("launchers")

    monkeypatch.setattr(PyCodeCache, "modules", [])
    monkeypatch.setattr(_compat_inductor, "launch_quickly", moved)
    launches = QuickLaunches()
    PyCodeCache.modules.append(ModuleType("generated"))
    for _ in range(4 * FIRST):
        launches.called()
    assert sum("more quickly" in record.message for record in caplog.records) == 1


# --- inputs ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def checking(module: ModuleType) -> tuple[ModuleType, list[tuple[Any, ...]]]:
    """A module whose calls check an input as 2.11 does, one as 2.13 does, and a result; and what was checked."""
    checked: list[tuple[Any, ...]] = []
    module.assert_size_stride = lambda *args: checked.append(args)  # type: ignore[attr-defined]

    def call() -> None:
        module.assert_size_stride("x", (1,), (1,))
        module.assert_size_stride("y", (1,), (1,), "input")
        module.assert_size_stride("buf0", (1,), (1,), "torch.ops.mine.op")

    module.call = call  # type: ignore[attr-defined]
    return module, checked


def test_inputs_are_trusted_and_results_are_not(checking: tuple[ModuleType, list[tuple[Any, ...]]]) -> None:
    module, checked = checking
    module.call()
    assert [args[0] for args in checked] == ["x", "y", "buf0"]
    for _ in range(2):
        _compat_inductor.trust_inputs(module)
        checked.clear()
        module.call()
        assert checked == [("buf0", (1,), (1,), "torch.ops.mine.op")]
    _compat_inductor.trust_inputs(ModuleType("without checks"))


@pytest.mark.parametrize(("ours", "source", "trusted"), [(False, "", False), (True, "", True), (True, "tangents_1", False)])
def test_only_forwards_of_packed_graphs_trust_their_inputs(
    checking: tuple[ModuleType, list[tuple[Any, ...]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ours: bool,
    source: str,
    trusted: bool,
) -> None:
    """What is saved for a backward may pass through hooks, of which no guard knows."""
    module, checked = checking
    (tmp_path / "code.py").write_text(source)
    module.__file__ = str(tmp_path / "code.py")
    launches = QuickLaunches((SimpleNamespace(modules={module} if ours else set()),))  # type: ignore[arg-type]
    monkeypatch.setattr(PyCodeCache, "modules", [*PyCodeCache.modules, module])
    for _ in range(2 * FIRST):
        launches.called()
    module.call()
    assert len(checked) == (1 if trusted else 3)


# --- addresses -------------------------------------------------------------------------------------------------------

only_of_its_kind = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) >= "2.14", reason="another launcher; nobody gives it addresses after 2.11"
)


def static_launcher(launched: list[tuple[Any, ...]], kinds: str = "OOi", **scratch: bool) -> Any:
    """As Inductor makes it for a kernel that takes two tensors and a number; what starts kernels is noted."""
    from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedCudaKernel

    made = StaticallyLaunchedCudaKernel.__new__(StaticallyLaunchedCudaKernel)
    made.__dict__["C_impl"] = SimpleNamespace(_launch_kernel=lambda *args: launched.append(args))
    made.module, made.function, made.num_warps, made.shared, made.arg_tys = None, 4711, 8, 512, kinds
    made.has_global_scratch, made.has_profile_scratch = scratch.get("first", False), scratch.get("second", False)
    scope: dict[str, Any] = {"runner": made.run}
    exec("def launcher(a, b, n, stream):\n    runner(-(n // -64), 1, 1, stream, a, b, n)", scope)
    return scope["launcher"]


@only_of_its_kind
@pytest.mark.parametrize("scratch", [{}, {"first": True}, {"first": True, "second": True}])
def test_launches_with_addresses(scratch: dict[str, bool]) -> None:
    """What starts the kernel is given the same, but addresses for tensors."""
    launched: list[tuple[Any, ...]] = []
    slow = static_launcher(launched, **scratch)
    quick = _compat_inductor._with_addresses(slow)
    a, b = torch.zeros(3), torch.zeros(4)
    slow(a, b, 130, stream=7)
    quick(a, b, 130, stream=7)
    told, found = launched
    assert told[:7] == found[:7] == (4711, 3, 1, 1, 8, 512, "OOi" + "O" * len(scratch))
    assert told[8] == found[8] == 7
    nothing = (None,) * len(scratch)
    assert told[7] == (a, b, 130, *nothing) and found[7] == (a.data_ptr(), b.data_ptr(), 130, *nothing)
    assert slow is not quick, "another module may share the launcher"


@only_of_its_kind
@pytest.mark.parametrize("asking", [False, True])
def test_launches_without_a_tensor_as_before(asking: bool) -> None:
    launched: list[tuple[Any, ...]] = []
    a = torch.zeros(3)
    _compat_inductor._with_addresses(static_launcher(launched), asking)(a, None, 130, stream=7)
    assert launched == [(4711, 3, 1, 1, 8, 512, "OOi", (a, None, 130), 7)]


@only_of_its_kind
def test_a_backward_leaves_tensors_of_the_host_to_be_refused() -> None:
    launched: list[tuple[Any, ...]] = []
    on_device, on_host = SimpleNamespace(is_cuda=True, data_ptr=lambda: 4096), torch.zeros(4)
    quick = _compat_inductor._with_addresses(static_launcher(launched), asking=True)
    for b in (on_device, on_host):
        quick(on_device, b, 130, stream=7)
    assert [args[7] for args in launched] == [(4096, 4096, 130), (on_device, on_host, 130)]


@pytest.mark.parametrize("source", ["", "tangents_1"])
def test_only_backwards_ask(source: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []
    (tmp_path / "code.py").write_text(source)
    module.__file__ = str(tmp_path / "code.py")
    module.triton_poi_fused_0 = kernel()  # type: ignore[attr-defined]
    monkeypatch.setattr(_compat_inductor, "_with_addresses", lambda launcher, asking: asked.append(asking) or launcher)
    assert _compat_inductor.launch_quickly(module) == len(asked) > 0
    assert set(asked) == {source != ""}


def test_other_launchers_stay() -> None:
    def launcher() -> None: ...

    changed = static_launcher([])
    changed.__globals__["runner"] = lambda *args: None
    not_loaded = static_launcher([])
    not_loaded.__globals__["runner"].__self__.function = None
    for each in (launcher, Launcher(), changed, not_loaded):
        assert _compat_inductor._with_addresses(each) is each
