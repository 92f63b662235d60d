"""The Dynamo backend ``"varlen_inductor"``, and the compiler that finishes what the passes have rewritten.

``torch.compile(model, backend="varlen_inductor")`` finds :data:`varlen_inductor` through an entry point. It takes ``mode``
and ``options`` as Inductor does, keeps the options that begin with ``varlen.`` for itself, and gives the rest, with the
rewritten graph, to Inductor. What the passes do with the graph is decided in :mod:`varlen_inductor.driver`.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import fx

from varlen_inductor import _compat, _compat_inductor, config, ddp, inductor_pass, report, switch
from varlen_inductor.nested import Nested

Route = Literal["backend", "enable"]
OPTION_PREFIX = "varlen."

_SETTINGS = {
    # Of a pointwise kernel Inductor tries two configurations. What it finds is no measure where the kernel works in place: each
    # try then includes a copy of its operand, from the host's memory if the device's was never so full before. So the second was
    # taken for GELU in inference, at 58.8 us instead of 40.7. Of the kernels timed without such a copy, and for more than 30 us, it
    # was the faster one for none. The first is what Inductor takes when it does not try ("max-autotune" tries in any case).
    "triton.autotune_pointwise": (True, False),
}
"""For the packed graph of a model and for the padded one beside it: Inductor's own, and ours in its place (where there is another,
the user has set it). What is said of it was seen in packed graphs.

Measured with benchmarks/model.py's encoder, B 32, S 512, on a H200, torch 2.11, by a script that is not kept, as the other below.
"""
_SETTINGS_FOR_PACKED_GRAPHS = {
    # Inductor can sum the gradient of a norm's weight in the kernel of the norm's backward, and then launches four small kernels
    # more for each norm. That saves the device reading a tensor twice, and costs a packed training step more than that, the device
    # as well as the host: with CUDA graphs kernels ran for 13.03 ms of a step with it and for 12.35 without.
    "triton.mix_order_reduction": (True, False),
}
_SETTINGS_WITHOUT_GRADIENTS = {
    # What several operations read is computed anew by each of them, unless it is put together from more tensors than this. So a
    # norm of a residual stream reads every summand since the sum was last stored, up to five: it reads and writes 4.75 times the
    # size of its input on average, and with 2 it is 4 times, in as many kernels. Norms are a tenth of that encoder's forward.
    # It saves 2 to 4% of the time that kernels run in bfloat16 (docs/benchmarks). Training stores the sums in any case.
    # (For packed graphs that are compiled while gradients are off. In half precision a stored sum is rounded, as in eager mode:
    # docs/benchmarks says how far results are from float64 then.)
    "realize_reads_threshold": (4, 2),
}


class InnerCompiler:
    """Inductor as the user configured it, without our passes.

    Args:
        options: Inductor's own options, a mode among them already spelled out.
        dynamic: what the user gave to ``torch.compile(dynamic=...)``, as far as it is known.
        backend: ``"inductor"``, or any other Dynamo backend's name, which then gets no options.
        original: the graph that Dynamo handed over. What is compiled in its place inherits what Dynamo noted about its
            inputs: without that Inductor would not know which of them are parameters.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        dynamic: bool | None = None,
        backend: str = "inductor",
        original: fx.GraphModule | None = None,
    ) -> None:
        self.options = dict(options)
        self.dynamic = dynamic
        self.backend = backend
        self.original = original

    @property
    def records_cuda_graphs(self) -> bool:
        """Whether Inductor is asked for CUDA graphs, as ``mode="reduce-overhead"`` does."""
        return bool(self.options.get("triton.cudagraphs", _compat_inductor.inductor_setting("triton.cudagraphs")))

    def compile(self, gm: fx.GraphModule, example_inputs: _compat.ExampleInputs) -> _compat.CompiledFn:
        """Compile a graph that takes the same inputs as Dynamo's, under Dynamo's tracing context.

        Args:
            gm: the graph; its placeholders are those of the graph that the backend was given, in the same order. Inductor
                takes it over and may change it.
            example_inputs: the inputs that the backend was given.
        """
        if self.original is not None and gm is not self.original:
            _compat.adopt_dynamo_attributes(gm, self.original)
        return ddp.compile_in_buckets(gm, example_inputs, self._compile_whole)

    def _compile_whole(self, gm: fx.GraphModule, example_inputs: _compat.ExampleInputs) -> _compat.CompiledFn:
        if self.backend != "inductor":
            return _compat.lookup_backend(self.backend)(gm, list(example_inputs))
        with switch.plain_inductor():
            wrapper = _compat.make_inductor_wrapper(None, self.options, self.dynamic)
            return wrapper(gm, example_inputs)  # type: ignore[no-any-return]

    def nested(self, fn: Callable[..., Any], *, dynamic: bool | None = None, packed: bool = False) -> Nested:
        """Compile a Python function on its own, when it is first called: see :class:`Nested`.

        This is for graphs with inputs of their own, whose sizes the outer graph does not know.

        Args:
            fn: a plain function. GraphModules that it closes over are generated first: Dynamo would skip a lazy one.
            dynamic: overrides what the user gave to ``torch.compile``.
            packed: whether its graph is a packed one, for which more of Inductor's settings are others.

        Raises:
            TypeError: ``fn`` is not a plain Python function.
        """
        for cell in getattr(fn, "__closure__", None) or ():
            if isinstance(cell.cell_contents, fx.GraphModule):
                _compat.materialise(cell.cell_contents)
        compiler = self._with({**_SETTINGS, **_SETTINGS_FOR_PACKED_GRAPHS} if packed else _SETTINGS)
        without_gradients = compiler._with(_SETTINGS_WITHOUT_GRADIENTS) if packed else compiler

        def compile_whole(gm: fx.GraphModule, example_inputs: _compat.ExampleInputs) -> _compat.CompiledFn:
            return (compiler if torch.is_grad_enabled() else without_gradients)._compile_whole(gm, example_inputs)

        return Nested(fn, compile_whole, self.dynamic if dynamic is None else dynamic)

    def _with(self, settings: Mapping[str, tuple[Any, Any]]) -> InnerCompiler:
        """The same compiler, with these settings of Inductor's where the user has none of their own, for one compile or for all."""
        others = {
            name: ours
            for name, (inductors, ours) in settings.items()
            if name not in self.options and _compat_inductor.inductor_setting(name) == inductors
        }
        return InnerCompiler({**self.options, **others}, self.dynamic, self.backend, self.original)


def split_options(options: Mapping[str, Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our own knobs, without their prefix, and the options that are Inductor's.

    Raises:
        ValueError: one of our options is unknown or has a value it cannot have.
    """
    knobs: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for name, value in (options or {}).items():
        if not name.startswith(OPTION_PREFIX):
            rest[name] = value
            continue
        knob = name.removeprefix(OPTION_PREFIX).replace("-", "_")
        problem = config.problem_with(knob, value)
        if problem is not None:
            raise ValueError(f"torch.compile(options=...): {problem}")
        knobs[knob] = value
    return knobs, rest


def compile_graph(
    gm: fx.GraphModule, example_inputs: _compat.ExampleInputs, inner: InnerCompiler, route: Route
) -> _compat.CompiledFn:
    """Rewrite a Dynamo graph and compile it; if a pass of ours fails, say so and compile the graph as it came.

    Raises:
        Exception: whatever a pass raised, if ``config.strict`` is set; whatever Inductor raises for the original graph.
    """
    try:
        from varlen_inductor import driver

        return driver.compile_graph(gm, example_inputs, inner, route)
    except _compat.control_flow_exceptions():
        raise
    except Exception:
        if config.strict:
            raise
        report.publish(report.Report(error=traceback.format_exc()))
        return inner.compile(gm, example_inputs)


def compile_with_options(
    gm: fx.GraphModule,
    example_inputs: _compat.ExampleInputs,
    options: Mapping[str, Any],
    route: Route,
    dynamic: bool | None = None,
) -> _compat.CompiledFn:
    """What both routes come to once Inductor's options are known and our knobs are set.

    Raises:
        ValueError: a knob holds a value it cannot have.
    """
    config.check()
    if not config.enabled:
        return InnerCompiler(options, dynamic, config.inner_backend).compile(gm, example_inputs)
    inner = InnerCompiler(inductor_pass.marked(options), dynamic, config.inner_backend, original=gm)
    return compile_graph(gm, example_inputs, inner, route)


class VarlenBackend:
    """The backend that ``torch.compile(backend="varlen_inductor")`` calls with each Dynamo graph. It has no state."""

    __name__ = "varlen_inductor"
    compiler_name = "varlen_inductor"

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: _compat.ExampleInputs,
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> _compat.CompiledFn:
        """Compile one graph.

        Args:
            gm: Dynamo's graph.
            example_inputs: its inputs, fake tensors and symbolic integers among them.
            mode: as for Inductor, e.g. ``"max-autotune"``.
            options: Inductor's options, and our knobs with the prefix ``varlen.``.

        Raises:
            ValueError: one of our options is unknown or has a value it cannot have.
            RuntimeError: a mode or one of Inductor's options is unknown.
        """
        knobs, rest = split_options(options)
        wrapper = _compat.make_inductor_wrapper(mode, rest, None)
        with config.patch(knobs):
            return compile_with_options(gm, example_inputs, wrapper.config, "backend")

    def get_compiler_config(self, mode: str | None = None, options: Mapping[str, Any] | None = None) -> Any:
        """Inductor's configuration under this mode and these options, as ``OptimizedModule.get_compiler_config`` shows it.

        Raises:
            ValueError, RuntimeError: as for a call, but already when ``torch.compile`` is called.
        """
        _, rest = split_options(options)
        return _compat.make_inductor_wrapper(mode, rest, None).get_compiler_config()

    def reset(self) -> None:
        """What ``torch._dynamo.reset()`` does to us: forget recorded CUDA graphs and past reports."""
        _compat.reset_cudagraph_trees()
        report.forget()


def is_ours(backend: Any) -> bool:
    """Whether a Dynamo backend, without the wrappers around it, leads to our passes."""
    return isinstance(backend, VarlenBackend) or switch.takes(backend)


varlen_inductor = VarlenBackend()
"""The object that the entry point names."""


def register_by_name() -> None:
    """Make ``backend="varlen_inductor"`` work where the package is on the path but not installed, so without entry points."""
    if "varlen_inductor" not in torch._dynamo.list_backends():
        torch._dynamo.register_backend(varlen_inductor, name="varlen_inductor")  # type: ignore[arg-type]


# `torch.compile` looks a backend up, and so imports this module, before it compiles anything: from here on it tells us the
# options it was given, and DDP's optimizer leaves the graphs that are ours in one piece.
_compat.forward_compiler_config(VarlenBackend)
ddp.install(is_ours)
