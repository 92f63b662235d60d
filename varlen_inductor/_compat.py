"""Every private PyTorch name that the package uses, in one place; those of Inductor are in ``_compat_inductor``,
those that are called at every step in ``_compat_operators``.

Each entry says what it is and in which versions of PyTorch it was read. ``tests/test_compat.py`` calls each of them, so a
name that moves fails there, with its reason beside it, and not in a user's model.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

CompiledFn = Callable[..., Any]
CompilerFn = Callable[..., CompiledFn]
ExampleInputs = Sequence[Any]


# --- torch.compile's own classes -------------------------------------------------------------------------------------


def inductor_wrapper_class() -> type:
    """The callable that ``torch.compile(backend="inductor")`` builds: it holds mode and options and calls ``compile_fx``.

    Read in 2.11, 2.12, 2.13. AOTInductor's wrapper is a subclass of it.
    """
    return torch._TorchCompileInductorWrapper  # type: ignore[attr-defined,no-any-return]


def named_wrapper_class() -> type:
    """The callable that ``torch.compile`` builds for any other backend: it looks the name up and keeps mode and options.

    Read in 2.11, 2.12, 2.13.
    """
    return torch._TorchCompileWrapper  # type: ignore[attr-defined,no-any-return]


def make_inductor_wrapper(mode: str | None, options: dict[str, Any] | None, dynamic: bool | None) -> Any:
    """Inductor's wrapper for this mode and these options; raises as ``torch.compile`` does if one of them is unknown.

    The constructor takes its arguments by position; 2.13 adds ``name`` at the end. It applies both a mode and options if it
    is given both, so nothing is lost. Read in 2.11, 2.12, 2.13.
    """
    return inductor_wrapper_class()(mode, options, dynamic)


def control_flow_exceptions() -> tuple[type[BaseException], ...]:
    """What Dynamo throws through a backend to start over or to skip a frame: not failures, never to be swallowed.

    Read in 2.11, 2.13.
    """
    from torch._dynamo import exc

    return (exc.RestartAnalysis, exc.SkipFrame, exc.TensorifyScalarRestartAnalysis)


def compile_failures() -> tuple[type[BaseException], ...]:
    """What a call of a compiled function raises when compiling it fails. (What it raises when it runs is of other classes.)

    Everything of Dynamo's is a ``TorchDynamoException``; errors of Inductor and AOTAutograd come as its subclass
    ``BackendCompilerFailed``, ``FailOnRecompileLimitHit`` (compiled too often already) does not.
    Not among them is ``RecompileError``: it is for the user who set ``error_on_recompile``. Read in 2.11, 2.13.
    """
    from torch._dynamo import exc

    failures = (exc.BackendCompilerFailed, exc.Unsupported, exc.TorchRuntimeError, exc.InternalTorchDynamoError, exc.UserError)
    return (*failures, exc.FailOnRecompileLimitHit)


def lookup_backend(name: str) -> CompilerFn:
    """The Dynamo backend of that name. Read in 2.11, 2.13."""
    from torch._dynamo.backends.registry import lookup_backend as lookup

    return lookup(name)  # type: ignore[no-any-return]


def forward_compiler_config(backend_class: type) -> None:
    """Let ``torch.compile`` ask a backend of this class for ``get_compiler_config(**kwargs)``, as it asks Inductor.

    ``_TorchCompileWrapper`` holds a backend and its ``mode`` and ``options`` but forwards nothing, so Dynamo, which looks for
    ``get_compiler_config`` on what it is given, never reaches the backend, and a wrong option is noticed only when the model
    is first run. The attribute exists for wrappers of our backend only. Read in 2.11, 2.13.
    """
    wrapper_class = named_wrapper_class()
    if hasattr(wrapper_class, "get_compiler_config"):
        return

    def get_compiler_config(self: Any) -> Callable[[], Any]:
        if not isinstance(getattr(self, "compiler_fn", None), backend_class):
            raise AttributeError("get_compiler_config")
        answer = self.compiler_fn.get_compiler_config(**self.kwargs)
        return lambda: answer

    wrapper_class.get_compiler_config = property(get_compiler_config)  # type: ignore[attr-defined]


def innermost_backend(backend: Any) -> Any:
    """The backend the user asked for, under the wrappers that ``torch.compile`` and Dynamo put around it.

    ``WrapBackendDebug`` and ``ConvertFrame`` keep what they wrap in ``_torchdynamo_orig_backend``; ``_TorchCompileWrapper``
    keeps it in ``compiler_fn``. Read in 2.11, 2.13.
    """
    while True:
        inner = getattr(backend, "_torchdynamo_orig_backend", None) or getattr(backend, "compiler_fn", None)
        if inner is None:
            return backend
        backend = inner


def uncompiled(model: Any) -> Any:
    """A module or function without ``torch.compile`` and DistributedDataParallel around it.

    ``OptimizedModule`` keeps the module in ``_orig_mod``, a compiled function keeps the function in
    ``_torchdynamo_orig_callable``. Running a DDP forward without its backward would upset the reducer. Read in 2.11, 2.13.
    """
    while True:
        if isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in getattr(model, "_modules", {}):
            model = model._orig_mod
        elif getattr(model, "_torchdynamo_orig_callable", None) is not None:
            model = model._torchdynamo_orig_callable
        else:
            return model


def reset_cudagraph_trees() -> None:
    """Forget all recorded CUDA graphs, as Inductor's own ``reset`` does.

    A mode is not a global setting, so whether there are any is told by the module being loaded. Read in 2.11, 2.13.
    """
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


# --- graphs ----------------------------------------------------------------------------------------------------------


def materialise(gm: fx.GraphModule) -> None:
    """Generate the code of a lazy GraphModule now.

    Dynamo hands out GraphModules whose ``forward`` is generated on first call; a nested compile that meets such a stub
    traces nothing. ``_LazyGraphModule.real_recompile`` was read in 2.11, 2.13.
    """
    if hasattr(gm, "real_recompile"):
        gm.real_recompile()  # type: ignore[operator]


def adopt_dynamo_attributes(gm: fx.GraphModule, original: fx.GraphModule) -> None:
    """Give a graph with the same inputs what Dynamo noted on the original: attributes that live outside ``meta``.

    AOTAutograd reads from them which inputs are parameters (static addresses for CUDA graphs), DDP's splitter which
    gradients belong together. Without ``dynamo_compile_id`` in ``gm.meta`` all of it is ignored. Read in 2.11, 2.13.
    """
    for key, value in original.meta.items():
        gm.meta.setdefault(key, value)
    for name in ("_param_name_to_source", "_source_to_user_stacks", "_backend_id", "compile_subgraph_reason"):
        if hasattr(original, name) and not hasattr(gm, name):
            setattr(gm, name, getattr(original, name))
    placeholders = gm.graph.find_nodes(op="placeholder")
    for ours, theirs in zip(placeholders, original.graph.find_nodes(op="placeholder"), strict=True):
        for name in ("_dynamo_source",):
            if hasattr(theirs, name) and not hasattr(ours, name):
                setattr(ours, name, getattr(theirs, name))
        for key in ("example_value", "tensor_dict", "grapharg"):
            if key in theirs.meta:
                ours.meta.setdefault(key, theirs.meta[key])
    declare_constants(gm)


def declare_constants(gm: fx.GraphModule) -> None:
    """Say where the tensors that the module itself holds come from.

    AOTAutograd makes them inputs of the graph and wants a source for each once ``_param_name_to_source`` is there. Read in
    2.11, 2.13.
    """
    from torch._dynamo.source import ConstantSource

    known = getattr(gm, "_param_name_to_source", None)
    if known is None:
        return
    names = [name for name, _ in (*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False))]
    ours = {name: ConstantSource(f"varlen_constant_{name}") for name in names if name not in known}
    gm._param_name_to_source = {**known, **ours}  # type: ignore[assignment]


def compile_id() -> str:
    """Dynamo's name for the graph being compiled, like ``"0/0"``, or ``"-"`` outside of Dynamo. Read in 2.11, 2.13."""
    from torch._guards import CompileContext

    current = CompileContext.current_compile_id()
    return "-" if current is None else str(current)


def import_operators() -> None:
    """Register our operators and their lowerings, which compiled artifacts from a cache call by name."""
    importlib.import_module("varlen_inductor.ops")
    importlib.import_module("varlen_inductor.lowering")


# --- seeing it ---------------------------------------------------------------------------------------------------------


def counters() -> Counter[str]:
    """Our page of ``torch._dynamo.utils.counters``, a ``defaultdict(Counter)`` that users print. Read in 2.11, 2.13."""
    from torch._dynamo.utils import counters as pages

    return pages["varlen_inductor"]  # type: ignore[no-any-return]


def known_true(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds whatever they are, without making it a guard. Read in 2.11, 2.13."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def register_log() -> None:
    """Make ``varlen_inductor`` a name that ``TORCH_LOGS`` knows. Read in 2.11, 2.13."""
    from torch._logging._internal import register_log as register

    register("varlen_inductor", "varlen_inductor")


def structured_trace_wanted() -> bool:
    """Whether anyone reads structured traces (``TORCH_TRACE``; in 2.13 ``TORCH_COMPILE_DEBUG`` too).

    There is always a handler; without a folder to write to it removes itself when it is first used. Read in 2.11, 2.13.
    """
    from torch._logging._internal import LazyTraceHandler, trace_log

    return any(isinstance(handler, LazyTraceHandler) and handler.root_dir for handler in trace_log.handlers)


def trace_artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Add an artifact to the structured trace, for tlparse. Read in 2.11, 2.13."""
    from torch._logging import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=payload)


# --- DistributedDataParallel -------------------------------------------------------------------------------------------


def ddp_optimizer_class() -> Any:
    """The class whose ``compile_fn`` splits a Dynamo graph at DDP's buckets before any backend sees it.

    ``None`` if this build of PyTorch has no distributed package. Read in 2.11, 2.13.
    """
    if not torch.distributed.is_available():
        return None
    from torch._dynamo.backends.distributed import DDPOptimizer

    return DDPOptimizer


# --- recording a graph (patterns/normalise.py) -----------------------------------------------------------------------

# The calls by which a graph changes grad mode and autocast. Read in 2.11, 2.13.
SET_GRAD_ENABLED = torch._C._set_grad_enabled
ENTER_AUTOCAST = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST = torch.amp.autocast_mode._exit_autocast
# Whether Dynamo can trace a graph with these calls, as a nested compile makes it do. 2.11 cannot, 2.13 can; the class came with it.
DYNAMO_TRACES_AUTOCAST_CALLS = hasattr(torch.amp.autocast_mode, "_UnmanagedAutocast")


def storage_id(value: torch.Tensor) -> int:
    """The same number for tensors that share memory, while one of them lives. Read in 2.11, 2.13."""
    return value.untyped_storage()._cdata


def rename(node: fx.Node, name: str) -> None:
    """Give a node another name, or one like it if that is taken. Read in 2.11, 2.13."""
    node._rename(name)


def functorch_level_active() -> bool:
    """Whether the caller runs under vmap, grad or jvp. Read in 2.11, 2.13."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def saved_tensor_hooks_active() -> bool:
    """Whether saved-tensor hooks are in force (activation offload, ...). Read in 2.11, 2.13."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def recorded_side_effects() -> frozenset[Any]:
    """Functions that are no ATen operators and yet are recorded: ``_set_grad_enabled``, autocast. Read in 2.11, 2.13."""
    from torch.fx.node import _side_effectful_need_to_be_preserved_pre_dispatch as preserved

    return frozenset(preserved)


def is_tensor_subclass(value: Any) -> bool:
    """DTensor, NestedTensor, quantised tensors and the like. Read in 2.11, 2.13."""
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    return is_traceable_wrapper_subclass(value)


def is_fake(value: Any) -> bool:
    """Whether it is a FakeTensor, which carries ``fake_mode``. Read in 2.11, 2.13."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor)


def trace_pre_dispatch(function: Callable[..., Any], inputs: Sequence[Any]) -> fx.GraphModule:
    """``make_fx`` above autograd and autocast, on fake inputs in the caller's fake mode.

    ``_disable_torch_fn_metadata_mode`` saves a call per operator: the names it records are not read. Read in 2.11, 2.13.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    traced = make_fx(function, tracing_mode="real", pre_dispatch=True, _disable_torch_fn_metadata_mode=True)(*inputs)
    # A lazy module compiles its code when it is first called, which must not happen under another trace.
    materialise(traced)
    return traced


def current_tracer() -> Any:
    """The tracer of the ``make_fx`` in progress. Read in 2.11, 2.13."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    if mode is None:
        raise RuntimeError("no make_fx in progress")
    return mode.tracer


def recording_disabled() -> Any:
    """Context in which operators run on fakes without being recorded. Read in 2.11, 2.13."""
    from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

    return disable_proxy_modes_tracing()


def torch_functions_not_recorded() -> Any:
    """Context in which a trace above autograd does not see switches of grad mode and the like. Read in 2.11, 2.13."""
    return torch._C.DisableTorchFunction()


def track(value: Any, proxy: fx.Proxy, tracer: Any) -> Any:
    """Tell the tracer that ``value`` (fakes, sizes, nested in tuples) is what ``proxy`` stands for. Read in 2.11, 2.13."""
    from torch.fx.experimental.proxy_tensor import track_tensor_tree

    return track_tensor_tree(value, proxy, constant=None, tracer=tracer)


def proxy_of(value: Any, tracer: Any) -> Any:
    """The proxy of a tensor or size that the tracer knows; anything else as it is.

    ``unwrap_proxy`` gives a tensor's proxy, and for a size the thunk already forced. Read in 2.11, 2.13.
    """
    if isinstance(value, (torch.Tensor, torch.SymInt, torch.SymFloat, torch.SymBool)):
        return tracer.unwrap_proxy(value)
    return value


def set_current_meta(node: fx.Node) -> Any:
    """Context in which recorded nodes take over ``stack_trace`` and ``nn_module_stack`` of ``node``. Read in 2.11, 2.13."""
    return fx.traceback.set_current_meta(node)


# --- finding attention (patterns/attention) --------------------------------------------------------------------------


def find_anchors(gm: fx.GraphModule, targets: Sequence[Any]) -> list[fx.Node]:
    """The nodes that call one of ``targets``, in graph order, found by Inductor's pattern matcher.

    The pass visits the graph from its end. Read in 2.11, 2.13.
    """
    from torch._inductor.pattern_matcher import CallFunctionVarArgs, Match, PatternMatcherPass, register_graph_pattern

    found: list[fx.Node] = []
    anchors = PatternMatcherPass(pass_name="varlen_attention_anchors")

    def keep(match: Match, *args: Any, **kwargs: Any) -> None:
        found.append(match.nodes[0])

    for target in targets:
        register_graph_pattern(CallFunctionVarArgs(target), pass_dict=anchors)(keep)  # type: ignore[arg-type]
    anchors.apply(gm)
    return found[::-1]


# --- fake values -----------------------------------------------------------------------------------------------------


def run_fake(target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What an operator makes of fake values, in their own fake mode; sizes may be symbols. Read in 2.11, 2.13.

    The Python dispatcher keeps operators that decompose in C++ from fixing symbolic sizes.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch.utils._pytree import tree_leaves

    modes = [value.fake_mode for value in tree_leaves((args, kwargs)) if is_fake(value)]
    if not modes:
        raise ValueError(f"{target} was given no fake tensor to say in which fake mode it runs")
    with modes[0], enable_python_dispatcher(), torch.no_grad():
        return target(*args, **kwargs)


# --- the way of a graph (driver.py, runtime.py) ------------------------------------------------------------------------


def is_partial_graph(gm: fx.GraphModule) -> bool:
    """Whether Dynamo broke the user's function in this graph's end, so that its outputs feed code that we do not see.

    Dynamo leaves ``compile_subgraph_reason`` on the module; a graph that ends with the function's return has a reason whose
    ``graph_break`` is false. A module without one did not come from Dynamo. Read in 2.11, 2.13.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    return bool(getattr(reason, "graph_break", False))


def called_by_uncompiled_code() -> bool:
    """Whether the function being compiled was called by a part of the compiled program that runs uncompiled.

    That is how Dynamo goes on when it cannot inline a call: the caller is broken there, and the callee is compiled on its
    own, as a whole graph whose results nevertheless feed code that we do not see. It shows on the stack: between Dynamo at
    work (``_compile`` in ``convert_frame.py``, whose ``code`` is being compiled) and the call of what the user gave to
    ``torch.compile`` (``compile_wrapper`` in ``eval_frame.py``) there are other functions. Those that merely pass a call on
    are left out; a resume function continues its caller, which therefore is no caller. Read in 2.11, 2.13.
    """
    frame: Any = sys._getframe()
    while frame is not None and not _is_frame(frame, "_dynamo/convert_frame.py", "_compile"):
        frame = frame.f_back
    if frame is None:
        return False
    callers = []
    resumes = _is_resume(getattr(frame.f_locals.get("code"), "co_name", ""))
    frame = frame.f_back
    while frame is not None and not _is_frame(frame, "_dynamo/eval_frame.py", "compile_wrapper"):
        if not _is_frame(frame, "_dynamo/"):
            callers.append(frame)
        frame = frame.f_back
    if frame is None:
        return False
    while resumes and callers:
        resumes = _is_resume(callers.pop(0).f_code.co_name)
    return not all(any(_is_frame(caller, part) for part in _PASSES_CALLS_ON) for caller in callers)


_PASSES_CALLS_ON = (
    "nn/modules/module.py",
    "nn/parallel/distributed.py",
    "distributed/fsdp/",
    "utils/_contextlib.py",
    "amp/autocast_mode.py",
)
_TORCH = str(torch.__path__[0]).replace("\\", "/") + "/"


def _is_frame(frame: Any, path: str, name: str | None = None) -> bool:
    filename = frame.f_code.co_filename.replace("\\", "/")
    return filename.startswith(_TORCH + path) and name in (None, frame.f_code.co_name)


def _is_resume(name: str) -> bool:
    return name.startswith("torch_dynamo_resume_in_")


@contextmanager
def default_stance() -> Iterator[None]:
    """A context without the stance that the user set with ``torch.compiler.set_stance``.

    Another stance may let Dynamo run eagerly what it has not compiled yet, or raise. The public setter refuses to work
    while Dynamo's frame callback is set. Read in 2.11, 2.13.
    """
    from torch._dynamo import eval_frame

    stance = eval_frame._stance
    eval_frame._stance = eval_frame.DynamoStance()
    try:
        yield
    finally:
        eval_frame._stance = stance


def outputs_that_objects_keep(outputs: int) -> frozenset[int]:
    """Which of the outputs of the graph that is being compiled the model puts into objects that outlive the call.

    ``self.memory = h`` and ``self.seen.append(h)`` leave nothing in the graph but an output: Dynamo makes the assignment after
    the graph has run. It notes what it will assign in ``OutputGraph.side_effects``, there for the translator at work in this
    thread (``InstructionTranslator.current_tx``); a variable that is modified and not new is an object from outside, and all that
    can be reached from it counts as kept. Read in 2.11, 2.13.

    Args:
        outputs: how many values the graph returns. If Dynamo's graph has another number, all count as kept.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.variables.base import AttributeMutationNew, ValueMutationNew, VariableTracker
    from torch._dynamo.variables.lazy import LazyVariableTracker

    try:
        output_graph = InstructionTranslator.current_tx().output
    except AttributeError:  # no translator: the graph is not from Dynamo
        return frozenset()
    effects = output_graph.side_effects
    kept: set[Any] = set()
    seen: dict[int, Any] = {}
    pending: list[Any] = [
        variable
        for variable in effects._get_modified_vars()
        if not isinstance(variable.mutation_type, (AttributeMutationNew, ValueMutationNew))
    ]

    def see(variable: Any) -> None:
        if isinstance(variable, LazyVariableTracker):
            return  # nobody has looked at it, so it was there before; to ask it for anything would make it an input of the graph
        kept.add(getattr(vars(variable).get("proxy"), "node", None))
        pending.extend(effects.store_attr_mutations.get(variable, {}).values())
        items = vars(variable).get("items")  # a dict's keys; what is no dict may have a method of this name, or raise when asked
        if isinstance(items, dict):
            pending.extend(key.vt for key in items if hasattr(key, "vt"))

    if not pending:
        return frozenset()
    while pending:
        VariableTracker.visit(see, pending.pop(), seen)
    (returned,) = output_graph.graph.find_nodes(op="output")[-1].args
    if len(returned) != outputs:
        return frozenset(range(outputs))
    return frozenset(i for i, node in enumerate(returned) if node in kept)


def is_parameter_or_buffer(placeholder: fx.Node) -> bool:
    """Whether an input of a Dynamo graph is a parameter or buffer of a module, and so the same in every batch.

    Dynamo marks them in ``tensor_dict``. Read in 2.11, 2.13.
    """
    return "_dynamo_static_input_type" in placeholder.meta.get("tensor_dict", {})


def no_dispatch_modes() -> Any:
    """A context in which no fake-tensor, tracing or other dispatch mode is active: operators run on real tensors.

    The mask prover folds constants and evaluates truth tables with them, also from inside a trace. Read in 2.11, 2.13.
    """
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()


def hint(size: int | torch.SymInt) -> int | None:
    """The number that a size had when the graph was traced, without a guard; None if there was none. Read in 2.11, 2.13."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else None
    return int(size)


def upstream_varlen_ops() -> tuple[frozenset[Any], frozenset[Any]]:
    """PyTorch's own varlen attention and its backward, under all names that a graph may call them by.

    They register themselves when their module is imported, so without it no graph can have them. Read in 2.11, 2.13.
    """
    if "torch.nn.attention.varlen" not in sys.modules:
        return frozenset(), frozenset()
    packets = (torch.ops.torch_attn._varlen_attn, torch.ops.torch_attn._varlen_attn_backward)
    forward, backward = (frozenset({packet, packet.default}) for packet in packets)
    return forward, backward


def fix_symbol(value: Any) -> Any:
    """The number or truth behind a symbolic one; Dynamo then guards on it. None for anything else, and if it is known only when
    the graph runs.

    Guards that are added while a backend compiles are checked like any other. Read in 2.11, 2.13.
    """
    numbers: tuple[tuple[Any, Callable[[Any], Any]], ...] = ((torch.SymInt, int), (torch.SymFloat, float), (torch.SymBool, bool))
    for symbol, number in numbers:
        if isinstance(value, symbol):
            return number(value) if value.node.has_hint() else None
    return None


