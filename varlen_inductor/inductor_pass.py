"""The rewrite as an Inductor pass, and what keeps Inductor's caches right.

For those who stay on ``backend="inductor"``::

    torch.compile(model, options={"pre_grad_custom_pass": varlen_inductor.VarlenPass()})

Inductor's cache keys know the graph, its own settings and its own sources. They know nothing of ours: an operator of ours is
a name to them, whatever its lowering does. Both forms of the rewrite therefore put :func:`cache_key` where the keys are
made: :class:`VarlenPass` through its ``uuid()``, the backend through those of :class:`AfterGrad` and :class:`InJointGraph`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import fx

from varlen_inductor import _compat, _compat_inductor, config, report

# Knobs that decide nothing about the compiled code.
_NOT_IN_KEY = ("strict", "inner_backend")

# Packages that bring kernels: with another version, or none, another kernel may have been chosen.
_KERNEL_PACKAGES = (
    *("triton", "nvidia-cudnn-frontend", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
    *("flash-attn", "flash-attn-3", "flash-attn-4"),
)

_MARK_SLOT = "post_grad_custom_post_pass"
_JOINT_SLOT = "joint_custom_post_pass"


@functools.cache
def source_hash() -> str:
    """A hash over the package's own files of code and data, and the versions of the packages whose kernels it may call."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    # `patterns` and `lowering` are links in a checkout, folders in a wheel.
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        for name in sorted(files):
            if name.endswith((".py", ".json")):
                path = Path(folder) / name
                digest.update(path.relative_to(root).as_posix().encode())
                digest.update(path.read_bytes())
    for package in _KERNEL_PACKAGES:
        digest.update(f"{package}={_version(package)}".encode())
    return digest.hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def cache_key() -> str:
    """What a compiled artifact depends on besides the graph: our sources and our knobs as they are set now."""
    knobs = {name: value for name, value in config.get_config_copy().items() if name not in _NOT_IN_KEY}
    return f"varlen_inductor-{source_hash()}-{json.dumps(knobs, sort_keys=True)}"


class VarlenPass(_compat_inductor.graph_pass_class()):  # type: ignore[misc]
    """The rewrite for ``options={"pre_grad_custom_pass": VarlenPass()}``: attention only, in place, no packing of the rest.

    A pass runs inside one graph and cannot look at data first, so it does what needs no fact about the data. Use
    ``backend="varlen_inductor"`` to pack the whole model. To keep another pass of your own in that setting, give a list of
    both (torch 2.12 and later).

    Inductor does not call the pass when it finds the compiled graph in its cache; nothing is logged or counted then.

    Args:
        **knobs: values for ``varlen_inductor.config`` that hold for this pass, e.g. ``padded_rows="keep"``.

    Raises:
        ValueError: a knob is unknown or has a value it cannot have.
    """

    def __init__(self, **knobs: Any) -> None:
        for name, value in knobs.items():
            problem = config.problem_with(name, value)
            if problem is not None:
                raise ValueError(f"VarlenPass: {problem}")
        self.knobs = knobs
        # After a cache hit nothing but this object is left to register the operators that the artifact calls.
        _compat.import_operators()

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite the graph in place. A failure is logged and leaves the graph as it was, unless ``config.strict``."""
        gm = graph.owning_module
        with config.patch(self.knobs):
            if not config.enabled or gm is None:
                return
            config.check()
            try:
                from varlen_inductor import driver

                report.publish(driver.rewrite_in_place(gm))
            except Exception:
                if config.strict:
                    raise
                report.publish(report.Report(error=traceback.format_exc()))

    def uuid(self) -> str:
        """Inductor's way to ask what this pass is; a new answer makes every earlier cache entry miss."""
        with config.patch(self.knobs):
            return cache_key()

    def __reduce__(self) -> tuple[Any, ...]:
        # torch 2.11 pickles the setting itself into its cache key and does not ask for `uuid()`.
        return _restore, (self.knobs, self.uuid())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VarlenPass) and self.knobs == other.knobs

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.knobs.items())))


def _restore(knobs: Mapping[str, Any], key: str) -> VarlenPass:
    """Unpickle a pass; the key has done its work when it was pickled."""
    return VarlenPass(**knobs)


class _WithKey(_compat_inductor.graph_pass_class()):  # type: ignore[misc]
    """Some of our passes (`lowering.after_grad`), which carry a key into Inductor's cache keys.

    The pass that they have displaced comes first, if there is one.
    """

    passes: str
    """Their name in that module."""

    def __init__(self, key: str, displaced: Any = None) -> None:
        self.key = key
        self.displaced = displaced

    def __call__(self, graph: fx.Graph) -> None:
        from varlen_inductor.lowering import after_grad

        if self.displaced is not None:
            self.displaced(graph)
        after_grad.rewrite(graph, getattr(after_grad, self.passes))

    def uuid(self) -> Any:
        if self.displaced is None:
            return self.key
        ask = getattr(self.displaced, "uuid", None)
        theirs = None if ask is None else ask()
        # A pass that cannot be identified turns Inductor's caches off, as it did before we displaced it.
        return None if theirs is None else (self.key, theirs)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and (self.key, self.displaced) == (other.key, other.displaced)

    def __hash__(self) -> int:
        return hash(self.key)


class AfterGrad(_WithKey):
    """The passes over graphs that autograd has made, forward and backward apart."""

    passes = "PASSES"


class InJointGraph(_WithKey):
    """The passes over a graph that has forward and backward in it, or a forward that has no backward."""

    passes = "JOINT_PASSES"


def marked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Inductor's options with our key among them, so that what we compile is cached under it.

    The key goes where a pass would: options reach the compiler of the backward as well, which runs later and elsewhere.
    """
    key = cache_key()
    return {**options, **dict(_with(kind, slot, key, options) for slot, kind in _SLOTS.items())}


_SLOTS: dict[str, type[_WithKey]] = {_MARK_SLOT: AfterGrad, _JOINT_SLOT: InJointGraph}


def _with(kind: type[_WithKey], slot: str, key: str, options: Mapping[str, Any]) -> tuple[str, Any]:
    """A slot for passes, and ours in it with those that are there."""
    present = options.get(slot, _compat_inductor.inductor_setting(slot))
    if _compat_inductor.passes_may_be_lists():
        passes = list(present) if isinstance(present, (list, tuple)) else [] if present is None else [present]
        return slot, [*passes, kind(key)]
    return slot, kind(key, present)


def has_passes() -> bool:
    """Whether what Inductor compiles now goes through our passes."""
    return all(_has(kind, _compat_inductor.inductor_setting(slot)) for slot, kind in _SLOTS.items())


def is_marked(options: Mapping[str, Any]) -> bool:
    """Whether these options belong to a compile that comes from us: its graph has been through our passes already."""
    return _has(AfterGrad, options.get(_MARK_SLOT))


def _has(kind: type[_WithKey], passes: Any) -> bool:
    return any(isinstance(each, kind) for each in (passes if isinstance(passes, (list, tuple)) else [passes]))
