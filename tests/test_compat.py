"""Each private PyTorch name that we use is still there and still does what its comment says.

When PyTorch moves one, the failure is here, beside the reason why we use it, and not in a user's model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn import functional as F

from varlen_inductor import _compat, _compat_inductor, _compat_operators, config

# What lives there for the sake of its neighbours.
PUBLIC_ONLY = {"import_operators"}


def captured(fn: Any, *args: Any) -> fx.GraphModule:
    """The graph that Dynamo hands to a backend."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(fn, backend=backend)(*args)
    return graphs[0]


def test_every_entry_names_the_versions_it_was_read_in() -> None:
    for name, function in inspect.getmembers(_compat, inspect.isfunction):
        if function.__module__ == _compat.__name__ and not name.startswith("_") and name not in PUBLIC_ONLY:
            assert "2.11" in (function.__doc__ or ""), f"{name}: say in its docstring in which versions of PyTorch it was read"


def test_inductor_wrapper() -> None:
    wrapper = _compat.make_inductor_wrapper("max-autotune-no-cudagraphs", {"epilogue_fusion": False}, None)
    assert type(wrapper) is _compat.inductor_wrapper_class()
    assert wrapper.config["max_autotune"] is True
    assert wrapper.config["epilogue_fusion"] is False
    assert wrapper.dynamic is None
    assert callable(wrapper.get_compiler_config)
    assert issubclass(torch._TorchCompileAOTInductorWrapper, _compat.inductor_wrapper_class())
    with pytest.raises(RuntimeError):
        _compat.make_inductor_wrapper(None, {"no_such_option": 1}, None)


def test_named_wrapper() -> None:
    wrapper = _compat.named_wrapper_class()("eager", None, {"a": 1}, True)
    assert wrapper.compiler_fn is _compat.lookup_backend("eager")
    assert wrapper.kwargs == {"options": {"a": 1}}
    assert wrapper.dynamic is True


def test_innermost_backend() -> None:
    from torch._dynamo.repro.after_dynamo import wrap_backend_debug

    def mine(gm: fx.GraphModule, inputs: Any) -> Any:
        return gm.forward

    wrapper = _compat.named_wrapper_class()(mine, None, None, None)
    assert _compat.innermost_backend(wrap_backend_debug(wrapper, "mine")) is mine
    assert _compat.innermost_backend(mine) is mine


def test_uncompiled() -> None:
    linear = nn.Linear(2, 2)
    assert _compat.uncompiled(torch.compile(linear)) is linear
    assert _compat.uncompiled(linear) is linear

    def fn() -> None: ...

    assert _compat.uncompiled(torch.compile(torch.compile(fn))) is fn


def test_control_flow_exceptions() -> None:
    assert all(issubclass(one, Exception) for one in _compat.control_flow_exceptions())


def test_compile_id() -> None:
    seen: list[str] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        seen.append(_compat.compile_id())
        return gm.forward

    torch.compile(nn.ReLU(), backend=backend)(torch.ones(1))
    assert seen == ["0/0"]
    assert _compat.compile_id() == "-"


def test_dynamo_attributes() -> None:
    linear = nn.Linear(2, 2)
    original = captured(lambda x: linear(x), torch.ones(1, 2))
    assert "dynamo_compile_id" in original.meta
    graph = fx.Graph()
    graph.output(graph.graph_copy(original.graph, {}))
    copy = fx.GraphModule(original, graph)
    copy.register_buffer("constant", torch.ones(1))
    _compat.adopt_dynamo_attributes(copy, original)
    for ours, theirs in zip(copy.graph.find_nodes(op="placeholder"), original.graph.find_nodes(op="placeholder"), strict=True):
        assert ours._dynamo_source is theirs._dynamo_source
        assert ours.meta["example_value"] is theirs.meta["example_value"]
    sources = copy._param_name_to_source
    assert {name: source for name, source in sources.items() if name != "constant"} == original._param_name_to_source
    assert "constant" in sources


def test_materialise() -> None:
    from torch.fx._lazy_graph_module import _LazyGraphModule

    lazy = _LazyGraphModule(nn.Module(), fx.symbolic_trace(nn.ReLU()).graph)
    assert lazy._needs_recompile()
    _compat.materialise(lazy)
    assert not lazy._needs_recompile()
    _compat.materialise(fx.symbolic_trace(nn.ReLU()))


def test_graph_pass() -> None:
    base = _compat_inductor.graph_pass_class()
    assert {"__call__", "uuid"} <= set(dir(base))
    assert _compat_inductor.inductor_setting("post_grad_custom_post_pass") is None
    assert _compat_inductor.inductor_setting("triton.cudagraphs") is False
    assert _compat_inductor.has_inductor_setting("triton.mix_order_reduction")
    assert _compat_inductor.has_inductor_setting("triton.autotune_pointwise")
    assert _compat_inductor.has_inductor_setting("realize_reads_threshold")
    assert not _compat_inductor.has_inductor_setting("triton.no_such_setting")
    assert isinstance(_compat_inductor.passes_may_be_lists(), bool)


def test_results_of_the_user() -> None:
    from torch._inductor import config as inductor

    graph = fx.Graph()
    x = graph.placeholder("x")
    output = graph.output((x, x, x))
    assert _compat_inductor.results_of_the_user(graph) == {0, 1, 2}
    output.meta["user_visible_output_idxs"] = [1]
    assert _compat_inductor.results_of_the_user(graph) == {1}
    with inductor.patch(keep_output_stride=False):
        assert _compat_inductor.results_of_the_user(graph) == {0, 1, 2}


def test_counters() -> None:
    _compat.counters()["something"] += 1
    assert torch._dynamo.utils.counters["varlen_inductor"]["something"] == 1


def test_register_log() -> None:
    from torch._logging._internal import log_registry

    _compat.register_log()
    assert log_registry.is_log("varlen_inductor")
    assert log_registry.log_alias_to_log_qnames["varlen_inductor"] == ["varlen_inductor"]


def test_structured_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._logging._internal import LazyTraceHandler, trace_log

    assert not _compat.structured_trace_wanted()
    handler = LazyTraceHandler("/nowhere")
    monkeypatch.setattr(trace_log, "handlers", [handler])
    assert _compat.structured_trace_wanted()
    seen: list[Any] = []
    monkeypatch.setattr(handler, "handle", seen.append)
    _compat.trace_artifact("name", "string", lambda: "payload")
    assert seen[-1].metadata["artifact"] == {"name": "name", "encoding": "string"}
    assert seen[-1].payload == "payload"


def test_ddp_optimizer() -> None:
    optimizer = _compat.ddp_optimizer_class()
    if optimizer is None:
        pytest.skip("this build of PyTorch has no distributed package")
    parameters = inspect.signature(optimizer.__init__).parameters
    assert {"bucket_bytes_cap", "backend_compile_fn", "first_bucket_cap"} <= set(parameters)
    assert list(inspect.signature(optimizer.compile_fn).parameters)[:3] == ["self", "gm", "example_inputs"]


# --- recording a graph ---


def test_probes_of_the_caller() -> None:
    assert not _compat.functorch_level_active()
    assert not _compat.saved_tensor_hooks_active()
    seen: list[bool] = []

    def probe(x: torch.Tensor) -> torch.Tensor:
        seen.append(_compat.functorch_level_active())
        return x

    torch.vmap(probe)(torch.ones(2))
    assert seen == [True]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        assert _compat.saved_tensor_hooks_active()
    assert torch._C._set_grad_enabled in _compat.recorded_side_effects()
    assert not _compat.is_tensor_subclass(torch.ones(1))
    assert not _compat.is_fake(torch.ones(1))


def test_pre_dispatch_trace_keeps_attention_whole() -> None:
    gm = captured(lambda q: F.scaled_dot_product_attention(q, q, q), torch.ones(1, 1, 2, 4))
    fakes = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")]
    assert all(_compat.is_fake(fake) for fake in fakes)
    traced = _compat.trace_pre_dispatch(lambda *inputs: gm(*inputs), fakes)
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert torch.ops.aten.scaled_dot_product_attention.default in targets
    assert _compat.find_anchors(traced, [torch.ops.aten.scaled_dot_product_attention.default])


def test_tracer() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def body(x: torch.Tensor) -> torch.Tensor:
        tracer = _compat.current_tracer()
        with _compat.recording_disabled():
            hidden = x + 1
        proxy = tracer.create_proxy("call_function", torch.ops.aten.add.Tensor, (_compat.proxy_of(x, tracer), 1), {})
        return _compat.track(hidden, proxy, tracer)

    gm = make_fx(body, tracing_mode="fake")(torch.ones(2))
    assert [node.target for node in gm.graph.nodes if node.op == "call_function"] == [torch.ops.aten.add.Tensor]
    with pytest.raises(RuntimeError, match="no make_fx"):
        _compat.current_tracer()


def test_current_meta() -> None:
    node = fx.Graph().placeholder("x")
    with _compat.set_current_meta(node):
        pass


def test_run_fake() -> None:
    gm = captured(lambda x: x + 1, torch.ones(3, 4))
    fake = gm.graph.find_nodes(op="placeholder")[-1].meta["example_value"]
    assert _compat.run_fake(torch.ops.aten.t.default, (fake,), {}).shape == (4, 3)
    with pytest.raises(ValueError, match="no fake tensor"):
        _compat.run_fake(torch.ops.aten.t.default, (torch.ones(2, 2),), {})


# --- operators ---


def test_dispatch_below_autograd() -> None:
    x = torch.ones(1, requires_grad=True)
    assert _compat_operators.any_requires_grad(None, x)
    assert not _compat_operators.any_requires_grad(None, x.detach())
    with _compat_operators.below_autograd():
        assert not (x + 1).requires_grad
    assert (x + 1).requires_grad


def test_goes_straight() -> None:
    """With nothing in the way, in and out of inference mode; not where the dispatcher has something to do."""
    from torch.utils._python_dispatch import TorchDispatchMode

    x = torch.ones(2, requires_grad=True)
    assert _compat_operators.goes_straight(x, nn.Parameter(x))
    with torch.no_grad():
        assert _compat_operators.goes_straight(x)
    with torch.inference_mode():
        assert _compat_operators.goes_straight(x)
    in_the_way = (
        _compat_operators.below_autograd(),
        torch.autocast("cpu", torch.bfloat16),
        TorchDispatchMode(),
        torch.device("cpu"),
        torch.profiler.profile(),
    )
    for context in in_the_way:
        with context:
            assert not _compat_operators.goes_straight(x), context
        assert _compat_operators.goes_straight(x)
    seen = []
    torch.func.vmap(lambda x: seen.append(_compat_operators.goes_straight(torch.ones(1))) or x)(x)
    torch.func.functionalize(lambda x: seen.append(_compat_operators.goes_straight(torch.ones(1))) or x)(x)
    torch.fx.experimental.proxy_tensor.make_fx(lambda x: seen.append(_compat_operators.goes_straight(torch.ones(1))) or x)(x)
    torch.jit.trace(lambda x: seen.append(_compat_operators.goes_straight(torch.ones(1))) or x * 2, x.detach(), check_trace=False)
    assert seen
    assert not any(seen)
    assert not _compat_operators.goes_straight(torch.ones(1, dtype=torch.complex64).conj().imag)
    assert not _compat_operators.goes_straight(x.detach().as_subclass(type("Sub", (torch.Tensor,), {})))


def test_knob_reader() -> None:

    for name, values in {"debug": (True, False), "kernels": ("math", "auto")}.items():
        read = _compat_operators.knob_reader(config, name)
        assert read() == getattr(config, name)
        for value in values:
            with config.patch(**{name: value}):
                assert read() == getattr(config, name) == value
        before = getattr(config, name)
        for value in (*values, before):
            setattr(config, name, value)
            assert read() == value


def test_dispatch_below_autocast() -> None:
    x = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
        with _compat_operators.below_autocast("cpu"):
            assert (x @ x).dtype == torch.float32


def test_partial_graph() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    assert _compat.is_partial_graph(captured(broken, torch.ones(1)))
    torch._dynamo.reset()
    assert not _compat.is_partial_graph(captured(lambda x: x + 1, torch.ones(1)))
    assert not _compat.is_partial_graph(fx.symbolic_trace(nn.ReLU()))


def test_inductor_decompositions() -> None:
    from torch._inductor import decomposition

    assert isinstance(decomposition.decompositions, dict)
    assert callable(decomposition.fast_random_decomps.cache_clear)
    _compat_inductor.register_inductor_decompositions({})


def test_launches_of_generated_kernels() -> None:
    """Either Inductor launches quickly by itself, or what is looked at is there. (Whether that works: `test_quick_launches`.)"""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    assert isinstance(_compat_inductor.generated_modules(), list)
    assert _compat_inductor.seed_lookup()(torch.tensor([3, 4]), 1).item() == 4
    for with_our_passes in (False, True):
        seeds = _compat_inductor.two_seeds(torch.device("cpu"), with_our_passes)
        assert (seeds.shape, seeds.dtype) == ((2,), torch.int64)
    assert not _compat_inductor.may_compute_random_numbers_again()
    for setting in ({"activation_memory_budget": 0.5}, {"aggressive_recomputation": True}):
        with torch._functorch.config.patch(setting):
            assert _compat_inductor.may_compute_random_numbers_again()
            assert [_compat_inductor.keeps_seeds(ours) for ours in (False, True)] == [False, True]
            assert not _compat_inductor.computes_all_again()
            with torch._inductor.config.patch(fallback_random=True):
                assert not _compat_inductor.keeps_seeds(True)
    with torch._functorch.config.patch(activation_memory_budget=0.0):
        assert _compat_inductor.computes_all_again()
        assert not _compat_inductor.keeps_seeds(True)
    assert _compat_inductor.keeps_seeds(False)
    node = torch.fx.Graph().call_function(_compat_inductor.draws_seeds(), (2, torch.device("cpu")))
    _compat_inductor.keep(node)
    assert node.meta["recompute"] == torch.utils.checkpoint.CheckpointPolicy.MUST_SAVE
    quick = hasattr(CachingAutotuner, "_build_fast_launcher")
    assert quick or callable(CachingAutotuner.is_statically_launchable)
    assert callable(CachingAutotuner.run)


def test_memory_on_cuda() -> None:
    """That it works is shown on a GPU (`tests/gpu`)."""
    assert callable(_compat_operators.cuda_allocator())
    assert callable(_compat_operators.current_device_index)


@pytest.mark.parametrize("reinterpret", [_compat_operators.reinterpret, _compat_operators._as_strided])
def test_reinterpret(reinterpret: Callable[..., torch.Tensor]) -> None:
    x = torch.arange(12)[2:]
    part = reinterpret(x, (2, 3), (4, 1), 1)
    assert part.tolist() == [[3, 4, 5], [7, 8, 9]]
    assert part.data_ptr() == x[1:].data_ptr()


def test_known_true() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    rows = mode.from_tensor(torch.ones(6), symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC])).shape[0]
    assert not _compat.known_true(rows % 3 == 0)
    torch._check(rows % 3 == 0)
    assert _compat.known_true(rows % 3 == 0)
    assert not _compat.known_true(rows == 6)
