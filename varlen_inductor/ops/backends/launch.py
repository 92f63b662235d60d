"""Triton kernels that are launched many times: without looking at every argument each time.

A Triton kernel is compiled for the kinds of its arguments: dtypes, which pointers and numbers are multiples of 16, which numbers
are 1. To find the one that fits, Triton looks at each argument of each launch, which takes it longer than the launch itself. A
caller who knows what the kinds depend on gives that as a key.

What Triton puts around the launch of a kernel that is found (a closure, a dictionary for its hooks, two calls of hooks that do
nothing) takes as long again. Unless somebody has set a hook, its launcher is called without. The names of Triton were read in 3.6
and 3.7; where one is missing, everything goes Triton's way.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from varlen_inductor import _compat_operators

try:
    from triton import knobs
except ImportError:  # no Triton, or one that keeps its hooks elsewhere
    knobs = None
try:
    from triton.language.extra.cuda import gdc_wait
except ImportError:
    gdc_wait = None

_MOST_KERNELS = 1024


class Compiled(NamedTuple):
    """A kernel that was launched before, and what its next launch needs."""

    kernel: Any
    run: Any
    """Triton's launcher, or ``None`` if it is not the one that is known here."""
    function: Any
    metadata: Any


class Prepared(NamedTuple):
    """A launch that can be made again with other addresses.

    Whoever makes it has seen to it that no key would tell it from the first one, and that no launch is `hooked`.
    """

    run: Any
    grid: tuple[int, int, int]
    kernel: tuple[Any, ...]
    last: tuple[Any, ...]

    def launch(self, stream: int, *addresses: int | None) -> None:
        """Launch on ``stream``, of the current device. Of what is no tensor's there is ``None``."""
        run, grid, kernel, last = self
        run(*grid, stream, *kernel, *addresses, *last)


class Launcher:
    """Launches ``kernel``, a ``triton.jit`` function."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[Hashable, Compiled] = {}

    def __call__(self, grid: tuple[int, int, int], key: Hashable, *args: Any, **options: Any) -> None:
        """Launch.

        Args:
            grid: the numbers of programs.
            key: all that decides which compiled kernel fits: the device, dtypes, alignments, and numbers or their kinds.
            args: every argument of the kernel in its order, constants among them; a tensor comes first, and tells the device.
            options: Triton's own, as ``num_warps``.
        """
        device = args[0].get_device()
        if device >= 0 and device != _compat_operators.current_device_index():  # to look costs less than to switch
            with torch.cuda.device(device):
                self._launch(device, grid, key, args, options)
        else:
            self._launch(device, grid, key, args, options)

    def again(self, grid: tuple[int, int, int], key: Hashable, stream: int, *args: Any) -> bool:
        """Launch on ``stream``, of the current device, if that was done with this key before; says whether.

        Args:
            args: as of a call; in place of tensors there may be their addresses.
        """
        compiled = self.compiled.get(key)
        if compiled is None or compiled.run is None or hooked():
            return False
        _, run, function, metadata = compiled
        run(*grid, stream, function, metadata, None, None, None, *args)  # no metadata for hooks, and no hooks
        return True

    def prepared(self, grid: tuple[int, int, int], key: Hashable, last: tuple[Any, ...]) -> Prepared | None:
        """The launch of what was launched with this key, if it can be made past `again`.

        Args:
            last: the arguments of a call from some place on.
        """
        compiled = self.compiled.get(key)
        if compiled is None or compiled.run is None:
            return None
        return Prepared(compiled.run, grid, (compiled.function, compiled.metadata, None, None, None), last)

    def with_addresses(
        self,
        grid: tuple[int, int, int],
        key: Hashable,
        stream: int | None,
        tensors: Sequence[torch.Tensor | None],
        addresses: Sequence[int | None],
        *args: Any,
        **options: Any,
    ) -> None:
        """Launch, if it can be with the addresses of the tensors: of a tensor, the launch would ask for it, and CUDA what it is.

        Args:
            stream: the current one, of the current device, on which the tensors are; ``None`` where that is no CUDA device.
            tensors: the kernel's first arguments.
            addresses: theirs.
            args: the others, as of a call.
        """
        if stream is None or not self.again(grid, key, stream, *addresses, *args):
            self(grid, key, *tensors, *args, **options)

    def _launch(
        self, device: int, grid: tuple[int, int, int], key: Hashable, args: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        compiled = self.compiled.get(key)
        if compiled is None:
            kernel = self.kernel[grid](*args, **options)
            if kernel is not None:  # it is None where Triton interprets
                if len(self.compiled) >= _MOST_KERNELS:
                    self.compiled.clear()
                self.compiled[key] = _compiled(kernel)
        elif compiled.run is None or device < 0 or hooked():
            compiled.kernel[grid](*args)
        else:
            _, run, function, metadata = compiled
            run(*grid, _compat_operators.current_stream_pointer(device), function, metadata, None, None, None, *args)


def _compiled(kernel: Any) -> Compiled:
    """Of a ``CompiledKernel`` that was launched, so that it is loaded."""
    run, function, metadata = (getattr(kernel, name, None) for name in ("run", "function", "packed_metadata"))
    known = callable(run) and function is not None and metadata is not None
    return Compiled(kernel, run if known else None, function, metadata)


def hooked() -> bool:
    """Whether somebody wants to hear of launches; also where that cannot be told."""
    runtime = getattr(knobs, "runtime", None)
    try:
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook  # type: ignore[union-attr]
    except AttributeError:
        return True
    # Triton 3.6 keeps a list of hooks there, which is empty at first; a hook by itself has no list.
    return bool((enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True)))


def stream_of(index: int) -> int | None:
    """The current stream of device ``index``, as a number, if that is the current device: `Launcher.again` asks for both."""
    if index < 0 or index != _compat_operators.current_device_index():
        return None
    return _compat_operators.current_stream_pointer(index)


@cache
def starts_early(index: int) -> bool:
    """Whether a kernel on device ``index`` may be started while the one before it ends (programmatic dependent launch).

    Such a kernel is launched with the option ``launch_pdl`` and calls ``gdc_wait`` before it looks at what the one before has
    written. Blackwell has this, too; it was run on Hopper only.
    """
    interpreted = getattr(getattr(knobs, "runtime", None), "interpret", False)
    if index < 0 or torch.version.hip is not None or gdc_wait is None or interpreted:
        return False
    return torch.cuda.get_device_capability(index)[0] == 9


def kind(number: int) -> int:
    """What Triton makes a difference by in a number: whether it is 1, a multiple of 16, and fits 32 bits."""
    if number == 1:
        return 1
    return (16 if number % 16 == 0 else 2) if -(2**31) <= number < 2**31 else (64 if number % 16 == 0 else 63)
