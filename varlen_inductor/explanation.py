"""``varlen_inductor.explain``: what would become of each attention of a model, and why."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from varlen_inductor import _compat, config
from varlen_inductor.report import Region, Report, Site, collect


@dataclass(repr=False)
class Explanation:
    """The answer of :func:`explain`: prints as a table, and has the same as data."""

    reports: list[Report] = field(default_factory=list)
    """One for each graph that Dynamo captured, in the order in which they were compiled."""

    @property
    def sites(self) -> list[Site]:
        """Every attention that was found, with its mask, the decision and the reason."""
        return [site for report in self.reports for site in report.sites]

    @property
    def regions(self) -> list[Region]:
        """Every part of the model that runs on valid tokens only."""
        return [region for report in self.reports for region in report.regions]

    @property
    def notes(self) -> list[str]:
        return [note for report in self.reports for note in report.notes]

    @property
    def graph_before(self) -> str:
        """The graphs as Dynamo captured them, as readable FX text."""
        return "\n\n".join(report.graph_before for report in self.reports if report.graph_before)

    @property
    def graph_after(self) -> str:
        """The graphs as they go to Inductor."""
        return "\n\n".join(report.graph_after for report in self.reports if report.graph_after)

    def __str__(self) -> str:
        if not self.reports:
            return "no graph was captured: the model ran without torch.compile (see TORCH_LOGS=graph_breaks)"
        width = max(shutil.get_terminal_size((120, 24)).columns, 80)
        return "\n\n".join(report.table(width) for report in self.reports)

    __repr__ = __str__


def explain(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Explanation:
    """Run ``model(*args, **kwargs)`` once under our passes, without generating kernels, and tell what they did.

    The model is run as it is (training or evaluation mode, autocast, grad mode), on the inputs given. What it has been
    compiled to so far stays valid; the state of the random generators, its parameters and buffers and our counters are as
    before afterwards. Anything else that a forward changes (an input that it writes to, a counter in Python) is changed.

    Args:
        model: a module or function, compiled or not, wrapped in DistributedDataParallel or not.
        *args, **kwargs: what a call of it takes. Knobs are those of ``varlen_inductor.config``.

    Returns:
        An object that prints as a table. ``.sites``, ``.regions``, ``.graph_before``, ``.graph_after`` and ``.reports`` are
        the same as data.

    Example::

        print(varlen_inductor.explain(model, input_ids, attention_mask=mask))
    """
    from varlen_inductor import backend, nested

    inner = _compat.uncompiled(model)
    args, kwargs = _by_name(inner, args, kwargs)

    def explained(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    # Without a code object of its own the second explanation would count as a recompilation of the first.
    compiled = torch.compile(nested.with_own_code(explained), backend=backend.varlen_inductor)
    with (
        config.patch(inner_backend="eager"),
        _random_state_kept(inner, args, kwargs),
        _buffers_kept(inner),
        _counters_kept(),
        collect() as reports,
    ):
        compiled(*args, **kwargs)
    if len(reports) > 1:
        reports[0].notes.append(
            f"Dynamo broke the model into {len(reports)} graphs; each is analysed on its own (see TORCH_LOGS=graph_breaks)"
        )
    return Explanation(reports)


def _by_name(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments by keyword where they have a name, so that a mask is called ``valid[b, k]`` in the answer."""
    try:
        bound = inspect.signature(model.forward if isinstance(model, nn.Module) else model).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return args, kwargs  # the call itself will say what is wrong, or the signature is not known
    kinds = [bound.signature.parameters[name].kind for name in bound.arguments]
    if any(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL) for kind in kinds):
        return args, kwargs
    named: dict[str, Any] = {}
    for (name, value), kind in zip(bound.arguments.items(), kinds, strict=True):
        named |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return (), named


@contextmanager
def _random_state_kept(model: Any, args: Any, kwargs: Any) -> Iterator[None]:
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    tensors = [leaf for leaf in [*parameters, *tree_leaves((args, kwargs))] if isinstance(leaf, torch.Tensor)]
    accelerators = {tensor.device for tensor in tensors if tensor.device.type == "cuda"}
    devices = sorted({torch.cuda.current_device() if device.index is None else device.index for device in accelerators})
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _buffers_kept(model: Any) -> Iterator[None]:
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    copies = [buffer.detach().clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, copy in zip(buffers, copies, strict=True):
                buffer.copy_(copy)


@contextmanager
def _counters_kept() -> Iterator[None]:
    counters = _compat.counters()
    before = counters.copy()
    try:
        yield
    finally:
        counters.clear()
        counters.update(before)
