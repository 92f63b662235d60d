"""``enable()`` and ``disable()``: the rewrite for every ``backend="inductor"`` compile of the process.

This is the flag for launchers that accept only backend names they know. ``VARLEN_INDUCTOR=1`` in the environment does the
same without a change of code, through :mod:`varlen_inductor._autoload`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from varlen_inductor import _compat

_enabled = False
_plain: ContextVar[bool] = ContextVar("varlen_inductor_plain_inductor", default=False)


def enable() -> None:
    """Rewrite every graph that ``torch.compile`` gives to Inductor in this process. Further calls do nothing.

    Models compiled before keep what they have; ``torch._dynamo.reset()`` makes them compile anew. Knobs are those of
    ``varlen_inductor.config``: Inductor refuses options it does not know, so ``options={"varlen.…": …}`` is for
    ``backend="varlen_inductor"`` only. AOTInductor is left alone.
    """
    global _enabled
    _install()
    _enabled = True


def disable() -> None:
    """Undo :func:`enable`. Models compiled meanwhile keep what they have."""
    global _enabled
    _enabled = False


def is_enabled() -> bool:
    """Whether :func:`enable` is in force."""
    return _enabled


def takes(backend: Any) -> bool:
    """Whether a compile by this backend is one that :func:`enable` has asked us to rewrite.

    Not those of AOTInductor, whose wrapper is a subclass; not those that we have started ourselves: their graphs have been
    through our passes. The ones that happen later, out of our sight, carry our mark in their options.
    """
    if not _enabled or _plain.get() or type(backend) is not _compat.inductor_wrapper_class():
        return False
    from varlen_inductor import config, inductor_pass

    return bool(config.enabled) and not inductor_pass.is_marked(backend.config)  # type: ignore[attr-defined]


@contextmanager
def plain_inductor() -> Iterator[None]:
    """Inside the block Inductor is what it was before :func:`enable`."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


@functools.cache
def _install() -> None:
    """Put our functions in the place of Inductor's wrapper's, for good: somebody else may have wrapped them since."""
    wrapper = _compat.inductor_wrapper_class()
    construct, call = wrapper.__init__, wrapper.__call__  # type: ignore[misc]

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        construct(self, *args, **kwargs)
        if _enabled:
            # The first sign that this process compiles anything. Earlier would make every process pay for what only some
            # need; later, DDP's optimizer would have cut the first graph. Importing it is all that is needed.
            from varlen_inductor import backend  # noqa: F401

    @functools.wraps(call)
    def __call__(self: Any, gm: Any, example_inputs: Any, **kwargs: Any) -> Any:
        if not takes(self):
            return call(self, gm, example_inputs, **kwargs)
        from varlen_inductor import backend

        # From 2.13 on PyTorch hands some options over late, in `config_patches`; 2.11 has no such keyword.
        options = {**self.config, **(kwargs.get("config_patches") or {})}
        return backend.compile_with_options(gm, example_inputs, options, "enable", self.dynamic)

    wrapper.__init__, wrapper.__call__ = __init__, __call__  # type: ignore[misc,method-assign]
