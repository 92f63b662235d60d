"""What is done when a kernel raises that said it could run a problem: the next one runs it, now and from then on.

That is a bug, of ours or of a library: the warning names the kernel and says what to do about it.
"""

from __future__ import annotations

import warnings
from collections import defaultdict

import torch

from varlen_inductor import config
from varlen_inductor.ops.backends import choose
from varlen_inductor.ops.backends.base import Backend
from varlen_inductor.ops.problem import Problem

_NONE: frozenset[str] = frozenset()
_failed: defaultdict[tuple[Problem, bool], frozenset[str]] = defaultdict(frozenset)


def failed(problem: Problem, backward: bool) -> frozenset[str]:
    """The names of the backends that have raised for this problem, in its forward or its backward."""
    return _failed.get((problem, backward), _NONE) if _failed else _NONE


def note(error: Exception, backend: Backend, problem: Problem, kernels: str, backward: bool) -> None:
    """Take note that ``backend`` raised, and warn; to be called in the handler of the error.

    Raises:
        Exception: the error itself, where another kernel could not help or must not: memory or the device itself is the trouble,
            no other kernel may run the problem, a CUDA graph is being recorded, ``config.strict`` is set, or weights are dropped
            (each kernel draws its own way, and a forward and a backward that drop different weights are wrong without a word).
    """
    if config.strict or problem.dropout_p > 0.0 or isinstance(error, torch.OutOfMemoryError) or "CUDA error" in str(error):
        raise error
    if problem.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise error
    names = failed(problem, backward) | {backend.name}
    try:
        instead = choose(problem, kernels, backward, names).backend
    except RuntimeError:
        raise error from None
    _failed[problem, backward] = names
    warnings.warn(
        f"varlen_inductor: the kernel {backend.name} raised {type(error).__name__}: {error}. {instead.name} runs this attention "
        f"from now on. To do without {backend.name} altogether set varlen_inductor.config.kernels = '-{backend.name}'; to have the "
        "error raised set varlen_inductor.config.strict.",
        RuntimeWarning,
        stacklevel=3,
    )


def forget() -> None:
    """Try all kernels again."""
    _failed.clear()
