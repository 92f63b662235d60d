"""The backend around the passes: names, options, failures, and the compiler that finishes the work. The passes are stubs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._inductor import config as inductor

from helpers import stub_driver
from varlen_inductor import backend, config, inductor_pass, nested, report

EAGER = {"varlen.inner_backend": "eager"}
AOT = {"varlen.inner_backend": "aot_eager"}


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["aot_autograd"]["ok"]


def test_listed_and_found_by_name() -> None:
    assert "varlen_inductor" in torch._dynamo.list_backends()
    linear, x = nn.Linear(4, 4), torch.randn(2, 4)
    with stub_driver():
        torch.testing.assert_close(torch.compile(linear, backend="varlen_inductor", options=AOT)(x), linear(x))
    assert compiled_graphs() == 1


def test_options_are_split() -> None:
    knobs, rest = backend.split_options({"varlen.packing": "off", "varlen.round-tokens": 64, "max_autotune": True})
    assert knobs == {"packing": "off", "round_tokens": 64}
    assert rest == {"max_autotune": True}
    assert backend.split_options(None) == ({}, {})


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"varlen.pack": "model"}, ValueError, "no knob 'pack'"),
        ({"varlen.packing": "all"}, ValueError, "must be one of"),
        ({"no_such_option": 1}, RuntimeError, "no_such_option"),
    ],
)
def test_wrong_options_are_refused_when_torch_compile_is_called(
    options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        torch.compile(nn.Linear(2, 2), backend="varlen_inductor", options=options)


def test_wrong_mode_is_refused_when_torch_compile_is_called() -> None:
    with pytest.raises(RuntimeError, match="Unrecognized mode=fastest"):
        torch.compile(nn.Linear(2, 2), backend="varlen_inductor", mode="fastest")


def test_other_backends_are_not_asked_for_their_configuration() -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend="eager", options={"anything": 1})
    assert compiled.get_compiler_config() is None


def test_knobs_hold_while_the_graph_is_compiled_and_only_then() -> None:
    seen: list[tuple[str, int]] = []

    def compile_graph(gm: fx.GraphModule, inputs: Any, inner: backend.InnerCompiler, route: str) -> Any:
        seen.append((config.packing, config.round_tokens))
        assert route == "backend"
        return inner.compile(gm, inputs)

    options = {**EAGER, "varlen.packing": "attention", "varlen.round_tokens": 16}
    with stub_driver(compile_graph):
        torch.compile(nn.Linear(2, 2), backend="varlen_inductor", options=options)(torch.ones(1, 2))
    assert seen == [("attention", 16)]
    assert config.packing == "model"


def test_mode_and_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def call(self: Any, gm: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        seen.append(self.config)
        return gm.forward

    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", call)
    with stub_driver():
        x = torch.ones(1, 2)
        torch.compile(nn.Linear(2, 2), backend="varlen_inductor", mode="max-autotune-no-cudagraphs")(x)
        torch._dynamo.reset()
        torch.compile(nn.Linear(2, 2), backend="varlen_inductor", options={"epilogue_fusion": False})(x)
    assert seen[0]["max_autotune"] is True
    assert seen[1]["epilogue_fusion"] is False
    assert all(inductor_pass.is_marked(options) for options in seen)


def test_dynamic_and_fullgraph() -> None:
    sizes: list[Sequence[Any]] = []

    def compile_graph(gm: fx.GraphModule, inputs: Any, inner: backend.InnerCompiler, route: str) -> Any:
        sizes.append([x for x in inputs if isinstance(x, torch.SymInt)])
        return inner.compile(gm, inputs)

    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with stub_driver(compile_graph):
        torch.compile(lambda x: x + 1, backend="varlen_inductor", dynamic=True, options=EAGER)(torch.ones(5))
        assert len(sizes[0]) == 1
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(broken, backend="varlen_inductor", fullgraph=True, options=EAGER)(torch.ones(5))


def test_failure_is_reported_and_the_graph_compiled_as_it_came() -> None:
    def compile_graph(*args: Any) -> Any:
        raise RuntimeError("a pass stumbled")

    linear, x = nn.Linear(4, 4), torch.randn(2, 4)
    with stub_driver(compile_graph), report.collect() as reports:
        torch.testing.assert_close(torch.compile(linear, backend="varlen_inductor", options=AOT)(x), linear(x))
    assert compiled_graphs() == 1
    assert [one.error.splitlines()[-1] for one in reports] == ["RuntimeError: a pass stumbled"]
    assert torch._dynamo.utils.counters["varlen_inductor"]["failures"] == 1


def test_strict_raises() -> None:
    def compile_graph(*args: Any) -> Any:
        raise RuntimeError("a pass stumbled")

    with stub_driver(compile_graph), config.patch(strict=True), pytest.raises(Exception, match="a pass stumbled"):
        torch.compile(nn.Linear(4, 4), backend="varlen_inductor", options=AOT)(torch.randn(2, 4))


def test_dynamo_may_start_over() -> None:
    """What Dynamo throws through a backend is no failure of ours."""
    from torch._dynamo.exc import SkipFrame

    def compile_graph(*args: Any) -> Any:
        raise SkipFrame("leave this frame alone")

    with stub_driver(compile_graph), report.collect() as reports:
        torch.compile(nn.Linear(4, 4), backend="varlen_inductor", options=AOT)(torch.randn(2, 4))
    assert reports == []


def test_disabled_is_plain_inductor() -> None:
    def compile_graph(*args: Any) -> Any:
        raise AssertionError("must not be called")

    with stub_driver(compile_graph), config.patch(enabled=False, strict=True):
        torch.compile(nn.Linear(4, 4), backend="varlen_inductor", options=AOT)(torch.randn(2, 4))
    assert compiled_graphs() == 1


def test_a_mistyped_environment_variable_is_an_error() -> None:
    with stub_driver(), config.patch(packing="modle"), pytest.raises(Exception, match="'modle'"):
        torch.compile(nn.Linear(4, 4), backend="varlen_inductor")(torch.randn(2, 4))


def nested_backend(number_of_calls: list[int]) -> Any:
    """A driver that compiles what it is given by a nested torch.compile."""

    def compile_graph(gm: fx.GraphModule, inputs: Any, inner: backend.InnerCompiler, route: str) -> Any:
        number_of_calls.append(1)

        def body(*args: Any) -> Any:
            return gm(*args)

        compiled = inner.nested(body)
        return lambda *args: compiled(*args)

    return compile_graph


def test_nested_compiles_every_graph() -> None:
    """More graphs than Dynamo's recompile limit: with a shared code object the ninth would run eagerly, unnoticed."""
    calls: list[int] = []
    with stub_driver(nested_backend(calls)):
        for width in range(2, 14):
            linear, x = nn.Linear(width, width), torch.randn(3, width)

            def outer(x: torch.Tensor, linear: nn.Linear = linear) -> torch.Tensor:
                return linear(x).relu()

            compiled = torch.compile(nested.with_own_code(outer), backend="varlen_inductor", options=AOT)
            torch.testing.assert_close(compiled(x), outer(x))
    assert len(calls) == 12
    assert compiled_graphs() == 12


def test_nested_has_gradients() -> None:
    linear, x = nn.Linear(4, 4), torch.randn(2, 4)
    with stub_driver(nested_backend([])):
        torch.compile(linear, backend="varlen_inductor", options=AOT)(x).square().sum().backward()
    got = linear.weight.grad.clone()
    linear.zero_grad()
    linear(x).square().sum().backward()
    torch.testing.assert_close(got, linear.weight.grad)
    assert compiled_graphs() == 1


def test_nested_refuses_what_dynamo_would_skip() -> None:
    inner = backend.InnerCompiler({}, backend="eager")
    gm = fx.symbolic_trace(nn.Linear(2, 2))
    for wrong in (gm, gm.forward):
        with pytest.raises(TypeError, match="plain Python function"):
            inner.nested(wrong)


def test_what_replaces_a_graph_inherits_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Dynamo's notes AOTAutograd would not know that weights are static inputs."""
    from torch._functorch._aot_autograd import frontend_utils

    seen: list[list[int]] = []
    real = frontend_utils._try_get_metadata_from_dynamo

    def spy(*args: Any) -> Any:
        sources, static = real(*args)
        seen.append(static)
        return sources, static

    monkeypatch.setattr(frontend_utils, "_try_get_metadata_from_dynamo", spy)
    monkeypatch.setattr("torch._functorch.aot_autograd._try_get_metadata_from_dynamo", spy)

    def compile_graph(gm: fx.GraphModule, inputs: Any, inner: backend.InnerCompiler, route: str) -> Any:
        graph = fx.Graph()
        values: dict[fx.Node, fx.Node] = {}
        graph.output(graph.graph_copy(gm.graph, values))
        for node in graph.find_nodes(op="placeholder"):
            node.meta = {"val": node.meta.get("example_value")}
        return inner.compile(fx.GraphModule(gm, graph), inputs)

    linear = nn.Linear(4, 4)
    with stub_driver(compile_graph), config.patch(strict=True):
        torch.compile(linear, backend="varlen_inductor", options=AOT)(torch.randn(2, 4))
    assert [len(static) for static in seen] == [2]


def test_reset_forgets_reports() -> None:
    with stub_driver(lambda gm, inputs, inner, route: (report.publish(report.Report()), inner.compile(gm, inputs))[1]):
        torch.compile(nn.Linear(4, 4), backend="varlen_inductor", options=EAGER)(torch.randn(2, 4))
    assert report.recent()
    torch._dynamo.reset()
    assert not report.recent()


@pytest.mark.parametrize("packed", [True, False])
def test_settings_for_nested_graphs(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user has said otherwise."""
    from varlen_inductor.backend import InnerCompiler

    mixed, tried, stored = "triton.mix_order_reduction", "triton.autotune_pointwise", "realize_reads_threshold"
    seen: list[dict[str, Any]] = []

    def compiled_with(self: InnerCompiler, gm: Any, inputs: Any) -> Any:
        seen.append(self.options)
        return gm

    monkeypatch.setattr(InnerCompiler, "_compile_whole", compiled_with)
    given: list[dict[str, Any]] = [{}, {mixed: True, stored: 8}, {tried: True, "shape_padding": False}]
    for options in given:
        nested = InnerCompiler(options).nested(lambda x: x + 1, packed=packed)
        nested(torch.ones(2))
        with torch.no_grad():
            nested(torch.ones(2))
    ours = {mixed: False, tried: False} if packed else {tried: False}
    in_inference = {**ours, stored: 2} if packed else ours
    assert seen == [{**some, **options} for options in given for some in (ours, in_inference)]

    def of_another() -> dict[str, Any]:
        seen.clear()
        with torch.no_grad():
            InnerCompiler({}).nested(lambda x: x + 1, packed=packed)(torch.ones(2))
        return seen[0]

    # What the user has set for all compiles holds, for as long as it is set.
    with inductor.patch({mixed: not inductor.triton.mix_order_reduction, stored: 8}):
        assert of_another() == {tried: False}
    assert of_another() == in_inference
