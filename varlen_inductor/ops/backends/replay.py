"""Calls of compiled kernels, noted once and made again without the Python around them.

A function of flash-attn-4 checks its arguments, puts a key together, looks the kernel up that was compiled for it, and calls that:
tens of microseconds of Python around a call that takes a few. The first call for a problem goes through that function, and what
it calls is noted: the kernels, and for each argument which of our tensors it is, or which number. Later calls for the same
problem call the kernels with their own tensors in those places.

Where anything is not understood (an argument that is no number and none of our tensors, memory whose size does not follow from
the numbers of rows), no note is kept and the function itself is called each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varlen_inductor.ops.backends.memory import empty

_MOST_TRIES = 3
_MOST_NOTES = 4096
_ALIGNMENT = 128
"""So many numbers are 512 bytes, as PyTorch aligns memory."""
_TILES = (64, 80, 96, 128, 256)
_TILES_WIDE = (48, 64, 128, 256)
"""The block sizes that the backward kernels of flash-attn-4 have, the latter with head dims over 192."""


class Sizes(NamedTuple):
    """What the size of a kernel's scratch memory may follow from."""

    rows_q: int
    rows_k: int
    sequences: int
    dims: tuple[int, ...]
    """The head dims. Not to change between calls with one key."""


class Scratch(NamedTuple):
    """Memory (heads, rows · width), float32, in which each sequence has rows up to a multiple of ``tile``."""

    heads: int
    tile: int
    width: int
    of_keys: bool


class Step(NamedTuple):
    """One call: the kernel, and what picks its arguments out of the values."""

    kernel: Any
    arguments: Callable[[tuple[Any, ...]], tuple[Any, ...]]


class Note(NamedTuple):
    """Calls to be made again. Values are the caller's tensors, then scratch memory, then constants."""

    steps: tuple[Step, ...]
    scratch: tuple[Scratch, ...]
    zeroed: tuple[Scratch, ...]
    """Scratch memory that is zeros at first."""
    like: int
    """The index of a tensor in float32, if there is scratch memory."""
    constants: tuple[Any, ...]


def padded_rows(rows: int, sequences: int, tile: int) -> int:
    """Rows enough for every sequence to begin at a multiple of ``tile``, however ``rows`` are shared between them."""
    return (rows + (sequences + 1) * tile - 1) // tile * tile


class Replay:
    """Runs functions whose compiled kernels lie in caches, past the functions where it can.

    A key is all that decides which kernels are called with which numbers, but for the numbers of rows and of sequences; also which
    tensors are None.

    Args:
        owners: objects with an attribute ``compile_cache``, which maps keys to compiled kernels.
    """

    def __init__(self, owners: Sequence[Any]) -> None:
        self.owners = tuple(owners)
        self.notes: dict[Hashable, Note | int] = {}
        self.lock = threading.Lock()

    def again(self, key: Hashable, tensors: tuple[Tensor | None, ...], rows_q: int, rows_k: int, sequences: int) -> bool:
        """Make the calls noted for ``key`` with ``tensors``, or say that there is no note. Called very often."""
        note = self.notes.get(key)
        if not isinstance(note, Note):
            return False
        steps, scratch, zeroed, like, constants = note
        try:
            if scratch:
                tensors += tuple([_empty(x, tensors[like], rows_k if x.of_keys else rows_q, sequences) for x in scratch])
            if zeroed:
                tensors += _zeros(zeroed, tensors[like], rows_q, rows_k, sequences)
            values = tensors + constants
            for kernel, arguments in steps:
                kernel(*arguments(values))
        except Exception:  # whatever it is: if it is the kernel's fault, the function says so
            self.notes[key] = _MOST_TRIES
            return False
        return True

    def first(self, key: Hashable, tensors: tuple[Tensor | None, ...], sizes: Sizes, function: Callable[[], Any]) -> None:
        """Call ``function``, which runs kernels on ``tensors``, and note what it does.

        Args:
            tensors: all that kernels are given, but for scratch memory. ``None`` stands for what is not given, or was already.
        """
        tries = self.notes.get(key, 0)
        if isinstance(tries, Note) or tries >= _MOST_TRIES or not _distinct(tensors):
            function()
            return
        with self.lock, self._noting() as calls:
            function()
        if len(self.notes) >= _MOST_NOTES:
            self.notes.clear()
        self.notes[key] = understand(calls, tensors, sizes) or tries + 1

    @contextmanager
    def _noting(self) -> Iterator[list[Any]]:
        calls: list[Any] = []
        caches = [owner.compile_cache for owner in self.owners]
        for owner, cache in zip(self.owners, caches, strict=True):
            owner.compile_cache = _NotingCache(cache, calls)
        try:
            yield calls
        finally:
            for owner, cache in zip(self.owners, caches, strict=True):
                owner.compile_cache = cache


class _NotingCache:
    """A cache of compiled kernels as this thread sees it: what is taken out of it says when it is called."""

    def __init__(self, cache: Any, calls: list[Any]) -> None:
        self._cache, self._calls, self._thread = cache, calls, threading.get_ident()

    def __contains__(self, key: Any) -> bool:
        return key in self._cache

    def __setitem__(self, key: Any, kernel: Any) -> None:
        self._cache[key] = kernel

    def __getitem__(self, key: Any) -> Any:
        kernel = self._cache[key]
        if threading.get_ident() != self._thread:
            return kernel

        def noted(*args: Any, **options: Any) -> Any:
            result = kernel(*args, **options)
            # Options, or a result, are more than is understood here.
            self._calls.append((kernel, args if not options and result is None else None))
            return result

        return noted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def understand(calls: Sequence[Any], tensors: tuple[Tensor | None, ...], sizes: Sizes) -> Note | None:
    """The calls in terms of ``tensors`` and numbers, or ``None`` if something is neither."""
    memory: list[Tensor | None] = list(tensors)
    scratch: list[Scratch] = []
    zeroed: list[Scratch] = []
    constants: list[Any] = []
    places: list[list[tuple[bool, int]]] = []
    for _, args in calls:
        if args is None or len(args) < 2:
            return None
        places.append([])
        for arg in args:
            if not isinstance(arg, Tensor):
                if not _is_constant(arg):
                    return None
                places[-1].append((True, len(constants)))
                constants.append(arg)
                continue
            index = _which(arg, memory)
            if index is None:
                kept = _as_scratch(arg, sizes)
                if kept is None:
                    return None
                index = len(memory)
                memory.append(arg)
                # What only a later call is given was not written by the first one: it may have to be zero.
                (scratch if len(places) == 1 else zeroed).append(kept)
            places[-1].append((False, index))
    like = next((i for i, x in enumerate(tensors) if x is not None and x.dtype == torch.float32), None)
    if not places or (like is None and (scratch or zeroed)):
        return None
    # Two places at least, for else it would give the one value itself.
    steps = [
        Step(kernel, itemgetter(*(len(memory) + i if constant else i for constant, i in at)))
        for (kernel, _), at in zip(calls, places, strict=True)
    ]
    return Note(tuple(steps), tuple(scratch), tuple(zeroed), like or 0, tuple(constants))


def _empty(kept: Scratch, like: Any, rows: int, sequences: int) -> Tensor:
    heads, tile, width, _ = kept
    return empty(like, heads, padded_rows(rows, sequences, tile) * width)


def _zeros(kept: Sequence[Scratch], like: Any, rows_q: int, rows_k: int, sequences: int) -> tuple[Tensor, ...]:
    """All of it in one piece, so that one kernel writes the zeros."""
    columns = [padded_rows(rows_k if x.of_keys else rows_q, sequences, x.tile) * x.width for x in kept]
    starts = [0]
    for x, n in zip(kept, columns, strict=True):
        starts.append(starts[-1] + -(-x.heads * n // _ALIGNMENT) * _ALIGNMENT)
    zeros = like.new_zeros(starts[-1])
    return tuple([zeros.as_strided((x.heads, n), (n, 1), at) for x, n, at in zip(kept, columns, starts, strict=False)])


def _distinct(tensors: Sequence[Tensor | None]) -> bool:
    """Whether an argument can be only one of them."""
    places = [(x.data_ptr(), x.dtype, x.shape) for x in tensors if x is not None]
    return len(set(places)) == len(places)


def _which(arg: Tensor, values: Sequence[Tensor | None]) -> int | None:
    """The index of the value that ``arg`` is: same memory, same layout."""
    for index, x in enumerate(values):
        if x is not None and x.data_ptr() == arg.data_ptr() and x.dtype == arg.dtype and x.shape == arg.shape:
            return index if x.stride() == arg.stride() else None
    return None


def _as_scratch(arg: Tensor, sizes: Sizes) -> Scratch | None:
    if arg.dtype != torch.float32 or arg.dim() != 2 or not arg.is_contiguous():
        return None
    heads, columns = arg.shape
    widths = {1, *(-(-dim // step) * step for dim in sizes.dims for step in (32, 64))}
    sides = {False: sizes.rows_q} if sizes.rows_q == sizes.rows_k else {False: sizes.rows_q, True: sizes.rows_k}
    found = [
        Scratch(heads, tile, width, of_keys)
        for of_keys, rows in sides.items()
        for tile in (_TILES_WIDE if max(sizes.dims) > 192 else _TILES)
        for width in widths
        if padded_rows(rows, sizes.sequences, tile) * width == columns
    ]
    return found[0] if len(found) == 1 else None


def _is_constant(arg: Any) -> bool:
    if arg is None or isinstance(arg, (bool, int, float, str)):
        return True
    return isinstance(arg, tuple) and all(map(_is_constant, arg))
