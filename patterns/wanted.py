"""Which kernels are wanted for the graph at hand: ``config.kernels``, and what ``"auto"`` means there.

A graph that is recorded once and replayed takes the host no time, so its kernels are chosen by their own time alone. That is
written into the graph, for a forward and its backward must agree about it, whenever each is compiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from varlen_inductor import config
from varlen_inductor.ops.backends import FASTEST

_replayed: ContextVar[bool] = ContextVar("varlen_inductor_replayed", default=False)


@contextmanager
def for_graph(*, replayed: bool) -> Iterator[None]:
    """While the passes look at a graph: whether it is to be recorded and replayed. Other threads do not see this."""
    token = _replayed.set(replayed)
    try:
        yield
    finally:
        _replayed.reset(token)


def kernels() -> str:
    """As ``config.kernels``."""
    return FASTEST if config.kernels == "auto" and _replayed.get() else config.kernels
