"""The private names of Inductor that the package uses: passes and cache keys, decompositions and lowerings, timing.

Kept as ``_compat`` is: each entry says in which versions of PyTorch it was read, and ``tests/test_compat.py`` calls it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from varlen_inductor._compat import no_dispatch_modes


def graph_pass_class() -> type:
    """``CustomGraphPass``: what Inductor accepts as a pass that takes part in its cache keys. Read in 2.11, 2.12, 2.13."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return CustomGraphPass


def passes_may_be_lists() -> bool:
    """Whether ``*_custom_*_pass`` settings take a list. One callable only in 2.11; a list as well from 2.12 on."""
    from torch._inductor import custom_graph_pass

    return hasattr(custom_graph_pass, "get_custom_graph_passes")


def inductor_setting(name: str) -> Any:
    """The value of one of Inductor's settings, as it holds now; None if this version has none such. Read in 2.11, 2.13."""
    from torch._inductor import config

    return getattr(config, name) if has_inductor_setting(name) else None


def has_inductor_setting(name: str) -> bool:
    """Whether this version of Inductor has the setting. Read in 2.11, 2.13."""
    from torch._inductor import config

    return name in config.get_config_copy()


def register_inductor_decompositions(table: dict[Any, Callable[..., Any]]) -> None:
    """Add decompositions to Inductor's table, before or after its first compile.

    ``fast_random_decomps`` and, where it exists, ``select_decomp_table`` keep a copy of the table that is made once, so
    their caches are dropped. Read in 2.11, 2.13.
    """
    from torch._inductor import decomposition

    for op, function in table.items():
        if op not in decomposition.decompositions:
            decomposition.register_decomposition([op])(function)
    for cached in (decomposition.fast_random_decomps, decomposition.select_decomp_table):
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


def compiles_ahead_of_time() -> bool:
    """Whether Inductor is at work for AOTInductor, whose code runs without Python. Read in 2.11, 2.13."""
    from torch._inductor.virtualized import V

    return bool(V.aot_compilation)


def results_of_the_user(graph: fx.Graph) -> frozenset[int]:
    """Which results of a graph that Inductor is at work on are for the user, and not kept for the backward; all, if it is not said.

    Read in 2.11, 2.13.
    """
    output = graph.output_node()
    places = output.meta.get("user_visible_output_idxs")
    # Where Inductor is told not to keep the strides of results it says that there are none of the user's.
    said = all(inductor_setting(name) for name in ("keep_output_stride", "bw_outputs_user_visible"))
    return frozenset(places if said and places is not None else range(len(pytree.tree_leaves(output.args[0]))))


@contextlib.contextmanager
def measuring(device: torch.device) -> Iterator[None]:
    """A context in which kernels run on real tensors as they will in compiled code, from inside of a trace.

    No dispatch mode, no Python dispatcher (each operator would pass through Python), no autograd, no autocast; the random
    generators are as before afterwards. Read in 2.11, 2.13.
    """
    from torch._dispatch.python import no_python_dispatcher

    cuda = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    with (
        no_dispatch_modes(),
        no_python_dispatcher(),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.random.fork_rng(devices=cuda),
    ):
        yield


def benchmark(run: Callable[[], Any], device: torch.device) -> float:
    """The time that ``run()`` takes in milliseconds, as Inductor measures its own candidates. Read in 2.11, 2.13."""
    from torch._inductor.runtime.benchmarking import benchmarker

    time = benchmarker.benchmark_cpu(run) if device.type == "cpu" else benchmarker.benchmark_gpu(run)
    return float(time)


def autotune_cache_folder() -> str | None:
    """Where Inductor keeps its caches; None if it is not to keep what it times. Read in 2.11, 2.13."""
    from torch._inductor import config
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return cache_dir() if config.autotune_local_cache and not config.force_disable_caches else None


def lower_to_operator(op: Any) -> None:
    """Let Inductor call the operator itself wherever its decomposition declines.

    ``make_fallback`` does not allow both unless it is told to. Read in 2.11, 2.13.
    """
    from torch._inductor import lowering

    if op not in lowering.lowerings:
        lowering.make_fallback(op, warn=False, override_decomp=True)


def lower_to_call(op: Any, module: str, function: str, first_operand: int = 0) -> None:
    """Let Inductor's Python code call ``module.function`` where a graph has the operator ``op``, which takes the same arguments.

    Where heads and head dims of query, key and value, the arguments from ``first_operand`` on, are numbers, and no size is zero,
    it calls what ``module.site(function, ...)`` returns when the code is loaded, which is given the options that are constants. It
    looks at what kernels give by itself, so the code does not assert at every call how the results lie.

    ``FallbackKernel`` is the node that calls an operator; Python code writes its ``python_kernel_name``, and an import with
    ``add_import_once`` of the outermost wrapper. Code in C++ calls the operator.
    A decomposition that declines leaves the operator to this lowering. Read in 2.11, 2.13.
    """
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V
    from torch.utils import _pytree

    alias = f"{module.replace('.', '_')}_{function}"

    class Call(ir.FallbackKernel):
        def codegen(self, wrapper: Any) -> None:
            if not (V.graph.cpp_wrapper or V.graph.fx_wrapper):
                outermost = wrapper
                while hasattr(outermost, "parent_wrapper"):
                    outermost = outermost.parent_wrapper
                self.python_kernel_name = alias
                options = self._site_options()
                if options is None:
                    outermost.add_import_once(f"from {module} import {function} as {alias}")
                else:
                    number = outermost.varlen_sites = getattr(outermost, "varlen_sites", 0) + 1
                    self.python_kernel_name = f"{alias}_{number}"
                    if function == "drawn" and self._first_result_is_all():
                        options["alone"] = True
                    given = "".join(f", {name}={value!r}" for name, value in options.items())
                    outermost.add_import_once(f"from {module} import site as varlen_site")
                    made_for = self._site_is_made_for(first_operand)
                    outermost.add_import_once(f"{self.python_kernel_name} = varlen_site({function!r}{given})  # {made_for}")
                    for output in self.outputs:
                        output.skip_size_stride_alignment_checks = True  # of ``MultiOutput``
            super().codegen(wrapper)

        def _first_result_is_all(self) -> bool:
            """Whether the code reads no other; the scheduler has taken out what reads those that nobody needs."""
            others = list(self.outputs)[1:]
            return all(x.get_name() in V.graph.removed_buffers for x in others)

        def _site_options(self) -> dict[str, Any] | None:
            """The options that are constants, or None where every call must look at its operands."""
            args, kwargs = self.unflatten_args(self.inputs, self.constant_args)
            query, key, value = args[first_operand : first_operand + 3]
            sizes = [size for x in (query, key, value) for size in x.get_size()]
            known = V.graph.sizevars.statically_known_gt
            if not all(known(size, 0) for size in (*sizes, args[first_operand + 3].get_size()[0] - 1)):
                return None
            heads = [size for x in (query, key, value) for size in x.get_size()[1:]]
            if kwargs.get("kernels") is None or not all(getattr(size, "is_number", True) for size in heads):
                return None
            given = {name: value for name, value in kwargs.items() if value is not None and not isinstance(value, ir.IRNode)}
            return given if all(isinstance(value, (bool, int, float, str)) for value in given.values()) else None

        def _site_is_made_for(self, first_operand: int) -> str:
            """What a site knows and the rest of the code need not say: equal code is loaded once, and would share its sites."""
            query = self.unflatten_args(self.inputs, self.constant_args)[0][first_operand]
            settings = "deterministic" if torch.are_deterministic_algorithms_enabled() else "not deterministic"
            return f"{query.get_device()}, {query.get_dtype()}, {settings}"

        def codegen_kwargs(self, skip_out: bool = False) -> list[str]:
            if str(self.python_kernel_name).startswith(f"{alias}_"):
                # The site has the others.
                self.kwargs = {k: v for k, v in self.kwargs.items() if not isinstance(v, (bool, int, float, str, type(None)))}
            return super().codegen_kwargs(skip_out)  # type: ignore[no-any-return]

    def lower(*args: Any, **kwargs: Any) -> Any:
        def boxed(x: Any) -> Any:
            return ir.TensorBox.create(x) if isinstance(x, ir.IRNode) else x

        if compiles_ahead_of_time():
            # Its code would run, and pass the operator wrong numbers: sizes among the options confuse it.
            raise RuntimeError(f"{op} cannot be called by the code of AOTInductor, which runs without Python")
        outputs: Any = Call.create(op, *args, **kwargs)
        for output in _pytree.tree_leaves(outputs):
            # Allocated by the call, so aligned, although Inductor supposes that from unaligned operands come unaligned results.
            V.graph.unaligned_buffers.discard(output.get_name())
        return _pytree.tree_map(boxed, outputs)

    if op not in lowering.lowerings:
        lowering.add_needs_realized_inputs(op)
        lowering.register_lowering(op, type_promotion_kind=None)(lower)


def two_seeds(device: torch.device, with_our_passes: bool) -> torch.Tensor:
    """Two random numbers (2,) int64 on ``device``, in a graph that is traced with Inductor's decompositions.

    ``inductor_seed`` is the operator whose calls Inductor makes one of; with ``fallback_random`` it looks for none. It is for
    Inductor with our passes only: with another compiler that takes its decompositions AOTAutograd, which knows random operators by
    name, takes all calls for the same. Read in 2.11, 2.13.
    """
    try:
        seed = torch.ops.prims.inductor_seed.default
    except AttributeError:
        seed = None
    if seed is None or not with_our_passes or inductor_setting("fallback_random"):
        return torch.ops.aten.randint.low(0, 2**31, (2,), dtype=torch.int64, device=device)  # type: ignore[no-any-return]
    return torch.stack([seed(device), seed(device)])


def may_compute_random_numbers_again() -> bool:
    """Whether AOTAutograd may draw numbers again in a backward, and other ones: under these settings it does not spare what draws.

    So it does with dropout of any graph. Read in 2.11, 2.13.
    """
    from torch._functorch import config

    return getattr(config, "activation_memory_budget", 1.0) != 1.0 or getattr(config, "aggressive_recomputation", False)


def keeps_seeds(with_our_passes: bool) -> bool:
    """Whether the numbers of `two_seeds` are drawn once, for a backward, too.

    Under the settings above only where `keep` says so of what draws them, and never if all is to be computed again.
    """
    if not may_compute_random_numbers_again():
        return True
    return with_our_passes and not computes_all_again() and not inductor_setting("fallback_random")


def computes_all_again() -> bool:
    """Whether AOTAutograd saves nothing but the inputs of a graph. Read in 2.11, 2.13."""
    from torch._functorch import config

    return getattr(config, "activation_memory_budget", 1.0) == 0.0


def draws_seeds() -> Any:
    """``inductor_seeds(count, device)``, which draws all numbers of a graph. Read in 2.11, 2.13."""
    return torch.ops.prims.inductor_seeds.default


def keep(node: Any) -> None:
    """Let AOTAutograd save the tensor that ``node`` of a joint graph gives, and not compute it again. Read in 2.11, 2.13."""
    from torch.utils.checkpoint import CheckpointPolicy

    node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def seed_lookup() -> Any:
    """``inductor_lookup_seed(seeds, index)``, one of the numbers that Inductor has drawn. Read in 2.11, 2.13."""
    return torch.ops.prims.inductor_lookup_seed.default


def generated_modules() -> list[ModuleType]:
    """The modules of generated Python code that are loaded, in their order. Read in 2.11, 2.13."""
    from torch._inductor.codecache import PyCodeCache

    return list(PyCodeCache.modules)


def launch_quickly(module: ModuleType) -> int:
    """Let the kernels of a module of generated code be launched without the questions that their first launch has settled.

    Only those with one configuration left, and nothing more to tune. While a profiler or a debug mode listens they go Inductor's
    way, and always where they are stored or dumped. From 2.13 on Inductor does this itself. Read in 2.11, 2.13.

    Returns:
        how many kernels that were.
    """
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner, DebugAutotuner

    if hasattr(CachingAutotuner, "_build_fast_launcher"):
        return 0
    quick: dict[str, tuple[Any, Callable[..., Any]]] = {}
    for name, kernel in list(vars(module).items()):
        if not isinstance(kernel, CachingAutotuner) or isinstance(kernel, DebugAutotuner) or len(kernel.launchers) != 1:
            continue
        (launcher,) = kernel.launchers
        special = any(getattr(kernel, name, True) for name in ("triton_interpret", "dump_launch_params", "dump_launch_tensors"))
        tuned = not kernel.inductor_meta.get("coordinate_descent_tuning") or getattr(launcher.config, "found_by_coordesc", False)
        if special or not tuned or getattr(launcher, "store_cubin", True):
            continue
        if kernel.is_statically_launchable():  # then it needs no memory of Triton's allocator, which `run` sets
            quick[name] = kernel, launcher
    backward = bool(quick) and is_backward(module)
    for name, (kernel, launcher) in quick.items():
        # In the module and not on the kernel, which other modules share and caches pickle.
        setattr(module, name, _Quick(kernel, _with_addresses(launcher, asking=backward)))
    return len(quick)


def _with_addresses(launcher: Callable[..., Any], asking: bool = False) -> Callable[..., Any]:
    """A launcher of Inductor's that gives the kernel the addresses of tensors, or the same one where it is not understood.

    What starts the kernel asks each tensor for its address by name, and CUDA what that address is, at every launch. A number it
    takes as it is, a tensor's of the host, too. Read in 2.11.

    Args:
        asking: whether a tensor may be the host's in a device tensor's place: in a backward it may, from a hook on saved tensors.
            Such a launch goes Inductor's way, which refuses it before the kernel runs. A forward's guards have seen to that.
    """
    runner: Any = getattr(launcher, "__globals__", {}).get("runner")
    kernel: Any = getattr(runner, "__self__", None)
    try:
        from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedCudaKernel as Static

        if torch.version.hip is not None or not isinstance(kernel, Static) or getattr(runner, "__func__", None) is not Static.run:
            return launcher
        launch, function = kernel.C_impl._launch_kernel, kernel.function
        scratch = [kernel.has_global_scratch, kernel.has_profile_scratch].count(True)
        kinds = kernel.arg_tys
        names = [f"x{i}" for i in range(len(kinds))]
        values = [f"{name}.data_ptr()" if kind == "O" else name for name, kind in zip(names, kinds, strict=True)]
        fixed = (kernel.num_warps, kernel.shared, kinds + "O" * scratch)
    except (ImportError, AttributeError):
        return launcher
    if not function:
        return launcher
    arguments = ", ".join(("x, y, z, stream", *names))
    on_device = " and ".join(f"{name}.is_cuda" for name, kind in zip(names, kinds, strict=True) if asking and kind == "O")
    code = f"""
def runner({arguments}):
    try:
        if not ({on_device or True}):
            return otherwise({arguments})
        values = ({"".join(f"{value}, " for value in values)}{"None, " * scratch})
    except AttributeError:  # None in the place of a tensor
        return otherwise({arguments})
    return launch({function}, x, y, z, {", ".join(map(repr, fixed))}, values, stream)
"""
    scope: dict[str, Any] = {"launch": launch, "otherwise": runner}
    exec(code, scope)
    return FunctionType(launcher.__code__, {**launcher.__globals__, "runner": scope["runner"]}, launcher.__name__)


def is_backward(module: ModuleType) -> bool:
    """Whether a module of generated code is that of a backward, or cannot be told from one: AOTAutograd names what it is given
    ``tangents_1`` and so on. Read in 2.11, 2.13."""
    try:
        return "tangents_" in Path(str(module.__file__)).read_text()
    except (OSError, AttributeError):
        return True


def trust_inputs(module: ModuleType) -> None:
    """Let a module of generated code compare the sizes and strides of its inputs no more with those it was compiled for.

    What it says of the results of operators is checked as before: those checks name the operator. Read in 2.11, 2.13.
    """
    check = vars(module).get("assert_size_stride")
    if check is None or getattr(check, "trusts_inputs", False):
        return

    def check_results(x: Any, size: Any, stride: Any, operator: str | None = None) -> None:
        if operator is not None and operator != "input":
            check(x, size, stride, operator)

    check_results.trusts_inputs = True  # type: ignore[attr-defined]
    module.assert_size_stride = check_results  # type: ignore[attr-defined]


class _Quick:
    """What generated code finds in the place of a kernel: the kernel itself, but for its launches."""

    def __init__(self, kernel: Any, launcher: Callable[..., Any]) -> None:
        from torch.autograd import profiler
        from torch.utils._debug_mode import get_active_debug_mode

        def run(*args: Any, stream: Any, **options: Any) -> Any:
            if options or profiler._is_profiler_enabled or get_active_debug_mode():
                return kernel.run(*args, stream=stream, **options)
            return launcher(*args, stream=stream)

        self._kernel = kernel
        self.run = run

    def __getattr__(self, name: str) -> Any:
        if name == "_kernel":  # while it is being made
            raise AttributeError(name)
        return getattr(self._kernel, name)
