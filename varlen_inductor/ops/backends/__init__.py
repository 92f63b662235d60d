"""The kernel backends, and the choice between them.

To add one, write its file and put it in ``BACKENDS``.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from varlen_inductor.ops.backends import aten_flash, cpu, cudnn, flash, flash4, math, measured, triton_kernel
from varlen_inductor.ops.backends.base import Backend
from varlen_inductor.ops.problem import Problem

BACKENDS: tuple[Backend, ...] = (
    aten_flash.BACKEND,
    triton_kernel.BACKEND,
    cudnn.BACKEND,
    flash4.BACKEND,
    flash.FLASH3_BACKEND,
    flash.FLASH2_BACKEND,
    cpu.BACKEND,
    math.BACKEND,  # runs everything everywhere, slowly: it comes last
)
"""Every backend, the preferred first."""


FASTEST = "fastest"
"""The value of ``config.kernels`` for graphs that are replayed: as ``"auto"``, but what a call takes the host does not count."""


class Choice(NamedTuple):
    """The backend that runs a problem, and why each of the others does not."""

    backend: Backend
    refused: dict[str, str]
    gathers: bool = False
    """Whether no backend reads keys in pages, so that this one runs once the pages are gathered."""


def backend_names() -> list[str]:
    return [backend.name for backend in BACKENDS]


def _order(problem: Problem, backward: bool, host_counts: bool) -> tuple[Backend, ...]:
    """The backends in the order in which they are asked: by measured time, or else by what is usual.

    All kernels write the same lse, in one of two orders that all can be given, so that one may follow another; but for dropout,
    which each draws its own way.
    """
    fastest = measured.by_time(problem, backward, BACKENDS, host_counts)
    if fastest is not None:
        return fastest
    if problem.seqused_k:
        # It reads the keys in use where they lie; FlashAttention's backward would make sequences of the others.
        return (triton_kernel.BACKEND, *(b for b in BACKENDS if b is not triton_kernel.BACKEND))
    return BACKENDS


@lru_cache(maxsize=1024)
def choose(problem: Problem, kernels: str = "auto", backward: bool = False, failed: frozenset[str] = frozenset()) -> Choice:
    """The first backend that supports ``problem``, for its forward or its backward.

    Args:
        kernels: the knob ``varlen_inductor.config.kernels``.
        failed: the names of backends that raised when they were to run this problem.

    Raises:
        ValueError: ``kernels`` is not understood, or names a backend that there is not.
        RuntimeError: no backend that it leaves can run the problem.
    """
    forced, forbidden = named(kernels)
    chosen: Backend | None = None
    refused: dict[str, str] = {}
    order = _order(problem, backward, host_counts=kernels != FASTEST)
    if forced:
        order = tuple(sorted(order, key=lambda backend: forced.index(backend.name) if backend.name in forced else len(forced)))
    for backend in order:
        if (forced and backend.name not in forced) or backend.name in forbidden:
            refused[backend.name] = f"config.kernels is {kernels!r}"
        elif backend.name in failed:
            refused[backend.name] = "it raised an error before"
        elif (reason := backend.supports(problem)) is not None:
            refused[backend.name] = reason
        elif problem.seeded and not backend.takes_seeds:
            refused[backend.name] = "it draws its own seeds"
        elif chosen is None:
            chosen = backend
        else:
            refused[backend.name] = f"{chosen.name} comes first"
    if chosen is None and problem.paged:
        return choose(problem._replace(paged=False, page_size=0), kernels, backward, failed)._replace(gathers=True)
    if chosen is None:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise RuntimeError(f"varlen_attn: no kernel can run this attention ({reasons})")
    return Choice(chosen, refused)


def named(kernels: str) -> tuple[tuple[str, ...], frozenset[str]]:
    """The backends that ``config.kernels`` leaves, in its order (none: all), and those that it forbids.

    Raises:
        ValueError: it is not understood, or names a backend that there is not.
    """
    if kernels in ("auto", FASTEST):
        return (), frozenset()
    names = [name.strip() for name in kernels.split(",")]
    known = backend_names()
    if all(name.startswith("-") and name[1:] in known for name in names):
        return (), frozenset(name[1:] for name in names)
    if all(name in known for name in names):
        return tuple(names), frozenset()
    raise ValueError(
        f"config.kernels is {kernels!r}; it must be 'auto', 'fastest', names to choose from, as 'triton,cpu', or names to "
        f"do without, as '-triton'; there are {', '.join(known)}"
    )
