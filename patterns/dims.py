"""Dimension atoms: what each tensor dimension is made of.

Every dimension of every tensor in a graph is an ordered product of *atoms*, as in einops notation: ``(B, S, E)`` is
``[b] [s] [e]``, its view ``(B*S, E)`` is ``[b s] [e]`` and its heads ``(B, H, S, D)`` are ``[b] [h] [s] [d]`` with ``e = h d``.
Pointwise ops unify the atoms of the dimensions that they align (union-find); views regroup atoms and split one where a
boundary falls inside it. A dimension of size 1 holds no atoms.

Because atoms follow structure and not size, ``S == H`` or ``B == S`` is no source of confusion.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import sympy
import torch

# A sympy expression; sympy has no type annotations.
Size: TypeAlias = Any


class DimConflict(Exception):
    """Two dimensions cannot be made of the same atoms, or a view cannot be expressed by regrouping them."""


class Atom:
    """One indivisible piece of a dimension; ``split`` replaces it by two smaller ones everywhere at once."""

    __slots__ = ("origin", "parent", "parts", "size")

    def __init__(self, size: int | torch.SymInt | Size, origin: str = "") -> None:
        self.size: Size = as_size(size)
        self.parent: Atom | None = None
        self.parts: tuple[Atom, Atom] | None = None
        self.origin = origin

    def __repr__(self) -> str:
        return f"{self.origin}:{self.size}"


Dim = tuple[Atom, ...]
Dims = tuple[Dim, ...]


def as_size(size: int | torch.SymInt | Size) -> Size:
    """The size as a sympy expression; equal expressions are equal sizes."""
    if isinstance(size, sympy.Basic):
        return size
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return sympy.Integer(int(size))


def _find(atom: Atom) -> Atom:
    while atom.parent is not None:
        atom = atom.parent
    return atom


def leaves(dim: Iterable[Atom]) -> list[Atom]:
    """The current leaf atoms of ``dim`` in order, after all unifications and splits so far."""
    found: list[Atom] = []
    for atom in dim:
        root = _find(atom)
        found += leaves(root.parts) if root.parts else [root]
    return found


def size_of(atoms: Iterable[Atom]) -> Size:
    """The number of elements that a run of atoms counts."""
    product: Size = sympy.Integer(1)
    for atom in leaves(atoms):
        product = product * atom.size
    return product


def fresh(size: int | torch.SymInt | Size, origin: str = "") -> Dim:
    """A dimension about which nothing is known yet."""
    return () if as_size(size) == 1 else (Atom(size, origin),)


def fresh_dims(shape: Sequence[int | torch.SymInt], origin: str = "") -> Dims:
    return tuple(fresh(size, origin) for size in shape)


def quotient(a: Size, b: Size) -> Size | None:
    """``a / b`` when it is a whole number for every value of the symbols, else None."""
    if a.is_Integer and b.is_Integer:
        return a / b if int(a) % int(b) == 0 else None
    ratio = sympy.cancel(a / b)
    return ratio if ratio.as_numer_denom()[1] == 1 else None


def _split(atom: Atom, first: Size) -> tuple[Atom, Atom]:
    rest = quotient(atom.size, first)
    if rest is None:
        raise DimConflict(f"{atom.size} does not split into {first}")
    atom.parts = (Atom(first, atom.origin), Atom(rest, atom.origin))
    return atom.parts


def unify(one: Iterable[Atom], other: Iterable[Atom]) -> None:
    """Declare that two dimensions index the same thing.

    Raises:
        DimConflict: their sizes cannot be lined up.
    """
    left, right = leaves(one), leaves(other)
    while left and right:
        a, b = left[0], right[0]
        if a is b or a.size == b.size:
            if a is not b:
                b.parent = a
            # Unifying can turn later leaves into the same atom, so both lists are read afresh.
            left, right = leaves(left[1:]), leaves(right[1:])
        elif quotient(a.size, b.size) is not None:
            left[0:1] = _split(a, b.size)
        elif quotient(b.size, a.size) is not None:
            right[0:1] = _split(b, a.size)
        else:
            raise DimConflict(f"{a.size} against {b.size}")
    if left or right:
        raise DimConflict("different number of elements")


def regroup(dims: Iterable[Dim], shape: Sequence[int | torch.SymInt]) -> Dims:
    """The dimensions of a view of ``dims`` with ``shape``.

    Raises:
        DimConflict: ``shape`` cuts an atom in a way that its size does not allow.
    """
    queue = [atom for dim in dims for atom in leaves(dim)]
    grouped: list[Dim] = []
    for size in shape:
        group: list[Atom] = []
        remaining = as_size(size)
        while remaining != 1:
            if not queue:
                raise DimConflict("the view has more elements than its source")
            atom = queue.pop(0)
            rest = quotient(remaining, atom.size)
            if rest is not None:
                group.append(atom)
                remaining = rest
            elif quotient(atom.size, remaining) is not None:
                first, second = _split(atom, remaining)
                group.append(first)
                queue.insert(0, second)
                remaining = sympy.Integer(1)
            else:
                raise DimConflict(f"{atom.size} against {remaining}")
        grouped.append(tuple(group))
    if queue:
        raise DimConflict("the view has fewer elements than its source")
    return tuple(grouped)


def broadcast(operands: Sequence[Dims], shape: Sequence[int | torch.SymInt], origin: str) -> Dims:
    """The dimensions of a pointwise result: aligned from the right, size-1 dimensions give way."""
    result: list[Dim] = [()] * len(shape)
    for dims in operands:
        offset = len(shape) - len(dims)
        for i, dim in enumerate(dims, start=offset):
            if not leaves(dim):
                continue
            if leaves(result[i]):
                unify(result[i], dim)
            else:
                result[i] = dim
    return tuple(dim if leaves(dim) or as_size(size) == 1 else fresh(size, origin) for dim, size in zip(result, shape))
