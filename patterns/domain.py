"""Padding domains, and where a tensor keeps their tokens.

A *domain* is the pair of atoms (batch, position) that some proven attention masks, with the predicate that says which positions
are valid. A tensor *carries* the domain's tokens when its dimensions hold each of those atoms exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import fx

from .dims import Atom, Dims, Size, leaves, size_of

if TYPE_CHECKING:
    from .masks import Predicate


@dataclass(eq=False)
class Domain:
    """Tokens ``(batch, position)`` of which ``predicate`` keeps the valid ones.

    ``batch`` and ``position`` are leaf atoms in order; ``batch`` is empty for a batch of one.
    ``shared``: other masks exist over the same atoms, so that a row padded here may be valid elsewhere.
    """

    index: int
    batch: list[Atom]
    position: list[Atom]
    predicate: Predicate
    sites: list[fx.Node] = field(default_factory=list)
    shared: bool = False

    @property
    def batch_size(self) -> Size:
        return size_of(self.batch)

    @property
    def length(self) -> Size:
        return size_of(self.position)

    def __str__(self) -> str:
        return f"domain {self.index} ({self.predicate.text})"


@dataclass(frozen=True)
class Layout:
    """Where a tensor keeps the tokens of a domain.

    ``order``: the tensor's atoms regrouped as runs, each run one of ``"b"``, ``"s"`` or ``"r"`` (rest) with its atoms, in the
    tensor's own order and never crossing a dimension. ``runs_per_dim`` says how many runs each dimension has.
    """

    order: tuple[tuple[str, tuple[Atom, ...]], ...]
    runs_per_dim: tuple[int, ...]

    @property
    def rest(self) -> tuple[tuple[Atom, ...], ...]:
        """The atoms of each non-token run, in order: the dimensions that follow the token dimension of a packed twin."""
        return tuple(atoms for kind, atoms in self.order if kind == "r")

    @property
    def token_last(self) -> bool:
        """Whether the innermost dimension holds tokens (rule 12 of the contract: such outputs stay exact)."""
        last = self.order[-self.runs_per_dim[-1] :] if self.runs_per_dim and self.runs_per_dim[-1] else ()
        return any(kind in "bs" for kind, _ in last)

    def packed_dim(self, dim: int) -> int | None:
        """The dimension of the packed twin that dimension ``dim`` of the padded tensor becomes, or None for a token dimension.

        A dimension that holds tokens beside something else (``B*H``) becomes its rest.
        """
        start = sum(self.runs_per_dim[:dim])
        own = [i for i in range(start, start + self.runs_per_dim[dim]) if self.order[i][0] == "r"]
        if not own:
            return None
        return 1 + sum(1 for kind, _ in self.order[: own[0]] if kind == "r")


def _runs(dim: Sequence[Atom], domain: Domain) -> list[tuple[str, tuple[Atom, ...]]] | None:
    """Cut one dimension into batch, position and rest runs; None when it holds only a part of the batch or the position."""
    found: list[tuple[str, tuple[Atom, ...]]] = []
    i = 0
    atoms = list(dim)
    while i < len(atoms):
        for kind, wanted in (("b", domain.batch), ("s", domain.position)):
            if wanted and atoms[i] is wanted[0]:
                if atoms[i : i + len(wanted)] != wanted:
                    return None
                found.append((kind, tuple(wanted)))
                i += len(wanted)
                break
        else:
            if atoms[i] in domain.batch or atoms[i] in domain.position:
                return None
            if found and found[-1][0] == "r":
                found[-1] = ("r", (*found[-1][1], atoms[i]))
            else:
                found.append(("r", (atoms[i],)))
            i += 1
    return found


def touches(dims: Dims, domain: Domain) -> bool:
    """Whether any dimension holds any atom of the domain's positions (or a piece of one)."""
    return any(atom in domain.position for dim in dims for atom in leaves(dim))


def layout_of(dims: Dims, domain: Domain) -> Layout | None:
    """The token layout of a tensor with ``dims``, or None when it does not carry the domain's tokens exactly once."""
    order: list[tuple[str, tuple[Atom, ...]]] = []
    counts: list[int] = []
    for dim in dims:
        runs = _runs(leaves(dim), domain)
        if runs is None:
            return None
        if not runs:
            runs = [("r", ())]  # a dimension of size one stays a dimension of the packed twin
        order += runs
        counts.append(len(runs))
    kinds = [kind for kind, _ in order]
    if kinds.count("s") != 1 or kinds.count("b") != (1 if domain.batch else 0):
        return None
    if any(sum(1 for kind, _ in order[sum(counts[:i]) : sum(counts[: i + 1])] if kind == "r") > 1 for i in range(len(counts))):
        return None  # a token atom in the middle of another dimension has no packed form
    return Layout(tuple(order), tuple(counts))


def token_dims(dims: Dims, domain: Domain) -> tuple[int | None, int] | None:
    """The dimensions of batch (None for a batch of one) and position, where each is a whole dimension of its own."""
    batch = [i for i, dim in enumerate(dims) if domain.batch and leaves(dim) == domain.batch]
    position = [i for i, dim in enumerate(dims) if leaves(dim) == domain.position]
    if layout_of(dims, domain) is None or not position or (domain.batch and not batch):
        return None
    return batch[0] if batch else None, position[0]


def partial_layout(dims: Dims, domain: Domain) -> tuple[str, int] | None:
    """``("s", i)`` or ``("b", i)`` when the tensor varies with only the position or only the batch, as all of dimension ``i``."""
    found: list[tuple[str, int]] = []
    for i, dim in enumerate(dims):
        atoms = leaves(dim)
        if not any(a in domain.batch or a in domain.position for a in atoms):
            continue
        if atoms == domain.position:
            found.append(("s", i))
        elif domain.batch and atoms == domain.batch:
            found.append(("b", i))
        else:
            return None
    return found[0] if len(found) == 1 else None
