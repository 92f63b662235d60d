"""Dynamo graph -> one spelling per operator.

Dynamo hands a backend the user's program as it was written: methods, functions of `torch.nn.functional`, operators
of Python, in-place assignments.  Looking for attention there means knowing every spelling.  `normalise` runs that
graph once on fake tensors and records the ATen operators *above* autograd and autocast ("pre-dispatch"), where
attention is still one differentiable node:

    before (Dynamo)                                    after
    %h = torch.nn.functional.linear(%x, %w, %b)        %linear = aten.linear.default(%x, %w, %b)
    %q = %h.view(b, s, 4, 8)                           %view = aten.view.default(%linear, [b, s, 4, 8])
    %q = %q.transpose(1, 2)                            %transpose = aten.transpose.int(%view, 1, 2)
    %a = F.scaled_dot_product_attention(%q, ...)       %sdpa = aten.scaled_dot_product_attention.default(...)

What cannot be recorded without a change of meaning raises `NotNormalisable`, and the graph is then left alone.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._ops import HigherOrderOperator

from varlen_inductor import _compat

from . import broadcasts, einsum, fused_inference, recompute, written_out
from .aliasing import Storages, written_nodes
from .simplify import drop_identities, drop_unused, inline_numbers

__all__ = ["NotNormalisable", "normalise", "replace_body"]


class NotNormalisable(Exception):
    """The graph is left alone; `reason` says why, in words for the user."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def normalise(gm: fx.GraphModule) -> fx.GraphModule:
    """Record `gm`, a Dynamo graph, as a pre-dispatch ATen graph in a new module.

    Args:
        gm: a graph whose placeholders carry their fake value in `meta["example_value"]` (or `meta["val"]`).
            It is not changed.  Grad mode and autocast must be as they will be when the graph runs.

    Returns:
        A module with the same placeholders, in the same order and under the same names, with a copy of their meta,
        and the same output structure.  Every node that has a value carries it in `meta["val"]` (a fake in the fake
        mode of the placeholders; a `SymInt` where it is a size) and whether autograd records it in
        `meta["requires_grad"]`.  `stack_trace` and `nn_module_stack` are those of the user's source.
        Higher-order operators (`autograd.Function`, flex attention, ...) are kept as they are, but for checkpoint: its
        graph is recorded in its place, see `recompute`.

    Raises:
        NotNormalisable: with the reason.
    """
    _refuse_what_tracing_loses(gm)
    inputs = _inputs(gm)
    fake_mode = next((x.fake_mode for x in inputs if _compat.is_fake(x)), None)
    if fake_mode is None:
        raise NotNormalisable("the graph has no tensor among its inputs")
    passed_on: tuple[type[BaseException], ...] = (NotNormalisable, *_compat.control_flow_exceptions())
    try:
        new = _retrace(gm, inputs, fake_mode)
    except passed_on:
        raise
    except Exception as error:
        first_line = str(error).strip().split("\n", 1)[0]
        raise NotNormalisable(f"the graph could not be retraced ({type(error).__name__}: {first_line})") from error
    _copy_placeholders(gm, new)
    _constants_in_mode(new, fake_mode)
    broadcasts.expand_apart(new.graph)
    _mark_requires_grad(new.graph)
    inline_numbers(new.graph)
    drop_identities(new.graph)
    drop_unused(new.graph)
    new.delete_all_unused_submodules()
    for name in [n for n, _ in new.named_buffers() if "." not in n and not new.graph.find_nodes(op="get_attr", target=n)]:
        delattr(new, name)
    _compat.adopt_dynamo_attributes(new, gm)
    new.recompile()
    return new


def replace_body(gm: fx.GraphModule, new: fx.GraphModule) -> None:
    """Put the body of `new` into `gm`, in place.

    For the pass form, where the module is Inductor's and only its graph may change: `gm` keeps its placeholders (and
    with them which inputs are parameters), everything between them and the output is replaced.

    Args:
        gm: the module to change.
        new: a module with the same placeholders in the same order, as `normalise` returns; it is not changed.
    """
    graph = gm.graph
    old_body = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    (output,) = (n for n in graph.nodes if n.op == "output")
    (new_output,) = (n for n in new.graph.nodes if n.op == "output")
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    new_placeholders = [n for n in new.graph.nodes if n.op == "placeholder"]
    if len(placeholders) != len(new_placeholders):
        raise ValueError(f"new has {len(new_placeholders)} placeholders and gm {len(placeholders)}: they must be the same")

    copied: dict[fx.Node, fx.Node] = dict(zip(new_placeholders, placeholders, strict=True))
    with graph.inserting_before(output):
        for node in new.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            copy = graph.node_copy(node, copied.__getitem__)
            if node.op == "get_attr":
                copy.target = _move_attribute(new, gm, str(node.target))
            if "val" in node.meta:
                # The name under which passes on Dynamo's graph look for it.
                copy.meta["example_value"] = node.meta["val"]
            copied[node] = copy
    output.args = fx.map_arg(new_output.args, copied.__getitem__)
    for node in reversed(old_body):
        graph.erase_node(node)
    _compat.declare_constants(gm)
    graph.lint()
    gm.recompile()


# --------------------------------------------------------------------------------------------------------- refusals

_UNRECORDED_METHODS = {
    "requires_grad_": "marks a tensor as requiring a gradient",
    "register_hook": "registers a gradient hook",
    "register_post_accumulate_grad_hook": "registers a gradient hook",
    "retain_grad": "retains the gradient of an intermediate value",
    "backward": "runs backward",
    "set_": "changes what a tensor's storage is",
    "resize_": "changes a tensor's shape in place",
    "resize_as_": "changes a tensor's shape in place",
    "as_strided_": "changes a tensor's shape in place",
    "t_": "changes a tensor's shape in place",
    "transpose_": "changes a tensor's shape in place",
    "swapaxes_": "changes a tensor's shape in place",
    "swapdims_": "changes a tensor's shape in place",
    "squeeze_": "changes a tensor's shape in place",
    "unsqueeze_": "changes a tensor's shape in place",
}

_UNRECORDED_MODULES = {
    "torch._functorch": "it uses a function transform (torch.func: vmap, grad, jvp)",
    "torch._C._functorch": "it uses a function transform (torch.func: vmap, grad, jvp)",
    "torch._C._autograd": "it uses saved-tensor hooks",
    "torch.autograd": "it uses torch.autograd inside the graph",
    "torch.cuda": "it uses CUDA streams or events inside the graph",
    "torch.nn.attention": "it selects an attention kernel (torch.nn.attention.sdpa_kernel) inside the graph",
}

_UNRECORDED_FUNCTIONS = {
    "_enter_inference_mode": "it enters inference mode inside the graph",
    "_exit_inference_mode": "it enters inference mode inside the graph",
}

# Calls that leave nothing behind which a result depends on.
_HARMLESS = frozenset(
    {
        "_assert",
        "_check",
        "_check_is_size",
        "_check_tensor_all",
        "_check_value",
        "_check_with",
        "_log_api_usage_once",
        "lazy_load_decompositions",
    }
)


def _refuse_what_tracing_loses(gm: fx.GraphModule) -> None:
    """Effects outside ATen (hooks, levels, streams) run during a retrace but leave no node: refuse them up front."""
    if _compat.functorch_level_active():
        raise NotNormalisable("it is compiled inside a function transform (torch.func: vmap, grad, jvp)")
    if _compat.saved_tensor_hooks_active():
        raise NotNormalisable("it is compiled under saved-tensor hooks, which see the tensors the backward keeps")
    functions: list[tuple[str, Any]] = []
    for node in gm.graph.nodes:
        if node.op == "call_module":
            raise NotNormalisable(f"it calls the module {node.target!r} without showing what is inside")
        if node.op == "call_method" and node.target in _UNRECORDED_METHODS:
            raise NotNormalisable(f"it {_UNRECORDED_METHODS[node.target]} (.{node.target})")
        if node.op == "call_function" and not isinstance(node.target, (torch._ops.OpOverload, HigherOrderOperator)):
            functions.append((str(getattr(node.target, "__module__", None) or ""), node.target))
    for prefix, reason in _UNRECORDED_MODULES.items():
        for module, target in functions:
            name = getattr(target, "__name__", str(target))
            within = module == prefix or module.startswith(prefix + ".")
            if within and name not in _HARMLESS and not _is_kept_by_tracing(target):
                raise NotNormalisable(_UNRECORDED_FUNCTIONS.get(name, reason))


def _is_kept_by_tracing(target: Any) -> bool:
    return target in _compat.recorded_side_effects() and "functorch" not in str(getattr(target, "__module__", ""))


def _inputs(gm: fx.GraphModule) -> list[Any]:
    inputs = []
    for node in gm.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("example_value", node.meta.get("val"))
        if value is None:
            raise NotNormalisable(f"the input {node.target!r} carries no example value")
        if isinstance(value, torch.Tensor) and not _is_plain_fake(value):
            raise NotNormalisable(f"the input {node.target!r} is a tensor subclass ({_class_name(value)})")
        inputs.append(value)
    return inputs


def _is_plain_fake(value: torch.Tensor) -> bool:
    if not _compat.is_fake(value):
        return False
    return value.layout is torch.strided and not value.is_nested


def _class_name(value: torch.Tensor) -> str:
    if value.is_nested:
        return "nested tensor"
    return type(value).__name__ if value.layout is torch.strided else str(value.layout)


# ---------------------------------------------------------------------------------------------------------- retrace


def _retrace(gm: fx.GraphModule, inputs: Sequence[Any], fake_mode: Any) -> fx.GraphModule:
    with fake_mode:
        # Without requires_grad the recorded operators are the same (they lie above autograd) and recording is faster.
        # Other inputs are taken as they are: the fake of a 0-d tensor remembers the symbol of its `.item()`.
        values = [x.detach() if isinstance(x, torch.Tensor) and x.requires_grad else x for x in inputs]
        opaque = {n: _fresh(n.meta.get("example_value")) for n in gm.graph.nodes if _is_higher_order(n)}
    interpreter = _Recorder(gm, opaque, fake_mode)

    def run(*args: Any) -> Any:
        return interpreter.run(*args)

    with fx.traceback.preserve_node_meta(), _restored_global_state(interpreter), fake_mode:
        return _compat.trace_pre_dispatch(run, values)


def _is_higher_order(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, HigherOrderOperator)


def _can_be_recorded(node: fx.Node) -> bool:
    """Whether a higher-order call is a checkpoint that holds nothing which recording loses."""
    body = recompute.body_of(node)
    if node.target is not recompute.CHECKPOINT or recompute.refusal(node) is not None or body is None:
        return False
    try:
        _refuse_what_tracing_loses(body)
    except NotNormalisable:
        return False
    return True


def _fresh(value: Any) -> Any:
    """Fakes with the metadata of `value` and storages of their own."""

    def fresh(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        if not _is_plain_fake(x):
            raise NotNormalisable(f"a higher-order operator returns a tensor subclass ({_class_name(x)})")
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

    return pytree.tree_map(fresh, value)


@contextlib.contextmanager
def _restored_global_state(interpreter: _Recorder) -> Iterator[None]:
    """Grad mode and autocast are process-wide: a graph that fails between entering and leaving must not change them."""
    grad = torch.is_grad_enabled()
    try:
        yield
    finally:
        interpreter.leave_open_autocasts()
        torch.set_grad_enabled(grad)


class _Recorder(fx.Interpreter):
    """Runs a Dynamo graph under a recording mode, node by node."""

    def __init__(self, gm: fx.GraphModule, opaque: Mapping[fx.Node, Any], fake_mode: Any) -> None:
        super().__init__(gm)
        self.opaque = opaque
        self.fake_mode = fake_mode
        self.autocasts: list[Any] = []
        self.groups = itertools.count()

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "output"):
            return super().run_node(n)
        if n.op == "get_attr":
            # What is done to fetch it switches gradients off and on, which would be recorded.
            with _compat.set_current_meta(n), _compat.torch_functions_not_recorded():
                return self._attribute(str(n.target))
        if _is_higher_order(n):
            with _compat.set_current_meta(n):
                return self._recorded_in_place(n) if _can_be_recorded(n) else self._opaque_call(n)
        tracer = _compat.current_tracer()
        before = len(tracer.graph.nodes)
        result = super().run_node(n)
        if result is None and len(tracer.graph.nodes) == before and not n.users:
            name = getattr(n.target, "__name__", str(n.target))
            if name not in _HARMLESS:
                raise NotNormalisable(f"it has an effect that is no tensor operation ({name})")
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for rewritten in (fused_inference, einsum, written_out):
            decomposition = rewritten.decomposition(target, args, kwargs)
            if decomposition is not None:
                return decomposition(*args, **kwargs)
        if target is _compat.ENTER_AUTOCAST:
            # The function alone would be recorded but not run; the context manager does both.
            autocast = torch.autocast(*args, **kwargs)
            autocast.__enter__()
            self.autocasts.append(autocast)
            return autocast
        if target is _compat.EXIT_AUTOCAST:
            self.autocasts.remove(args[0])
            args[0].__exit__(None, None, None)
            return None
        return super().call_function(target, args, kwargs)

    def leave_open_autocasts(self) -> None:
        while self.autocasts:
            self.autocasts.pop().__exit__(None, None, None)

    def _attribute(self, name: str) -> Any:
        value = operator.attrgetter(name)(self.module)
        if isinstance(value, torch.nn.Module) or not isinstance(value, torch.Tensor):
            return _Attribute(name, value)
        if _compat.is_fake(value):
            fake = value
        elif _compat.is_tensor_subclass(value):
            raise NotNormalisable(f"the constant {name!r} is a tensor subclass ({type(value).__name__})")
        else:
            fake = self.fake_mode.from_tensor(value, static_shapes=True)
        tracer = _compat.current_tracer()
        with _compat.recording_disabled():
            fake = fake.detach()
        _set_attribute(tracer.root, name, value)
        # The tracer looks the name up as it is, so one with a path ("layer.weight", in exported programs) waits until it has.
        flat = name.replace(".", "_")
        _set_attribute(tracer.root, flat, value)
        proxy = tracer.create_proxy("get_attr", flat, (), {})
        if flat != name:
            proxy.node.target = name
            delattr(tracer.root, flat)
        return _compat.track(fake, proxy, tracer)

    def _recorded_in_place(self, n: fx.Node) -> Any:
        """Record the graph of a checkpoint where it is called; `recompute.regroup` makes a call of it again."""
        graph = _compat.current_tracer().graph
        before = len(graph.nodes)
        (body, *args), _ = self.fetch_args_kwargs_from_env(n)
        inner = _Recorder(body.value, {}, self.fake_mode)
        inner.autocasts = self.autocasts
        result = inner.run(*args)
        recompute.mark(list(graph.nodes)[before:], next(self.groups))
        return result

    def _opaque_call(self, n: fx.Node) -> Any:
        """Keep a higher-order call as one node.  Tracing through it would drop what it stands for, as the backward of an
        `autograd.Function`."""
        tracer = _compat.current_tracer()
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        result = self.opaque[n]
        if result is None and n.users:
            raise NotNormalisable(f"the higher-order operator {n.target} carries no example value")

        def to_proxy(value: Any) -> Any:
            if isinstance(value, _Attribute):
                _set_attribute(tracer.root, value.name, value.value)
                return tracer.create_proxy("get_attr", value.name, (), {})
            return _compat.proxy_of(value, tracer)

        def is_leaf(value: Any) -> bool:
            return isinstance(value, _Attribute)

        proxy_args = pytree.tree_map(to_proxy, args, is_leaf=is_leaf)
        proxy_kwargs = pytree.tree_map(to_proxy, kwargs, is_leaf=is_leaf)
        proxy = tracer.create_proxy("call_function", n.target, proxy_args, proxy_kwargs, name=n.name)
        for key, value in n.meta.items():
            if key not in ("example_value", "val"):
                proxy.node.meta.setdefault(key, value)
        return _compat.track(result, proxy, tracer)


class _Attribute:
    """A module or other constant that only a higher-order operator may take."""

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self.value = value


# -------------------------------------------------------------------------------------------------- after the retrace


def _set_attribute(root: torch.nn.Module, name: str, value: Any) -> None:
    *path, last = name.split(".")
    for part in path:
        if not hasattr(root, part):
            root.add_module(part, torch.nn.Module())
        root = getattr(root, part)
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        if last not in root._buffers:
            root.register_buffer(last, value, persistent=False)
    else:
        setattr(root, last, value)


def _move_attribute(source: torch.nn.Module, target: torch.nn.Module, name: str) -> str:
    """Give `target` the attribute `name` of `source`, under a free name if it has another of that name."""
    value = operator.attrgetter(name)(source)
    free, i = name, 0
    while True:
        try:
            if operator.attrgetter(free)(target) is value:
                return free
        except AttributeError:
            break
        free, i = f"{name.replace('.', '_')}_{i}", i + 1
    _set_attribute(target, free, value)
    return free


def _copy_placeholders(gm: fx.GraphModule, new: fx.GraphModule) -> None:
    """Names and meta: Inductor reads from the meta which inputs are parameters, and where each comes from."""
    old = (n for n in gm.graph.nodes if n.op == "placeholder")
    for node, original in zip([n for n in new.graph.nodes if n.op == "placeholder"], old, strict=True):
        node.target = original.target
        _compat.rename(node, original.name)
        node.meta = dict(original.meta)
        node.meta.setdefault("val", original.meta.get("example_value"))
    new.recompile()


def _constants_in_mode(gm: fx.GraphModule, fake_mode: Any) -> None:
    """Tensors written out in the model: tracing has noted their values in a fake mode of its own."""
    for node in gm.graph.find_nodes(op="get_attr"):
        value = node.meta.get("val")
        if _compat.is_fake(value) and value.fake_mode is not fake_mode:
            with fake_mode:
                node.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)


_NO_GRADIENT: frozenset[Any] = frozenset({torch.ops.aten.detach.default, torch.ops.aten.detach_.default})


def _mark_requires_grad(graph: fx.Graph) -> None:
    """`meta["requires_grad"]`: whether autograd will record the value.  It may say True too often, never too seldom."""
    storages = Storages(graph, possible=True)
    written_with_gradient: set[fx.Node] = set()
    enabled = torch.is_grad_enabled()
    for node in graph.nodes:
        if node.target is _compat.SET_GRAD_ENABLED:
            enabled = bool(node.args[0])
        if node.op == "placeholder":
            flag = bool(getattr(node.meta.get("example_value", node.meta.get("val")), "requires_grad", False))
        elif node.op == "get_attr":
            flag = bool(getattr(_attribute_or_none(graph.owning_module, str(node.target)), "requires_grad", False))
        else:
            flag = enabled and node.target not in _NO_GRADIENT and any(_requires_grad(a) for a in node.all_input_nodes)
        node.meta["requires_grad"] = flag and _may_carry_gradient(node.meta.get("val"))
        if node.meta["requires_grad"]:
            written_with_gradient.update(storages.root(w) for w in written_nodes(node))
    if written_with_gradient:
        # What is written with a gradient passes it on to all that shares the memory, and from there to what reads it.
        enabled = torch.is_grad_enabled()
        for node in graph.nodes:
            if node.target is _compat.SET_GRAD_ENABLED:
                enabled = bool(node.args[0])
            reads = enabled and node.target not in _NO_GRADIENT and any(_requires_grad(a) for a in node.all_input_nodes)
            if (reads or storages.root(node) in written_with_gradient) and _may_carry_gradient(node.meta.get("val")):
                node.meta["requires_grad"] = True


def _requires_grad(node: fx.Node) -> bool:
    return bool(node.meta.get("requires_grad", False))


def _may_carry_gradient(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_may_carry_gradient(v) for v in value)
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    return value is None


def _attribute_or_none(module: torch.nn.Module | None, name: str) -> Any:
    try:
        return operator.attrgetter(name)(module)
    except AttributeError:
        return None
