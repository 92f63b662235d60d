"""What a rule is given and what it answers, and the table of rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..dims import DimConflict, Dims, leaves, unify
from ..registry import entering

Mixed = tuple[tuple[fx.Node, int], ...]


@dataclass(frozen=True)
class Typing:
    """What a rule says of one node.

    ``dims``: dimensions of the result (of each result, for an operator with several).
    ``mixed``: input dimensions (never negative) whose elements influence each other.
    ``shape_only``: inputs of which only the shape matters.
    ``opaque``: no rule applied.
    """

    dims: tuple[Any, ...]
    mixed: Mixed = ()
    shape_only: tuple[fx.Node, ...] = ()
    opaque: bool = False
    position_dependent: bool = field(default=False)


class Args:
    """The arguments of a node by schema name, with defaults filled in."""

    def __init__(self, node: fx.Node, table: Mapping[fx.Node, Typing]) -> None:
        self.node = node
        self._table = table
        schema = node.target._schema  # type: ignore[union-attr]
        self.values: dict[str, Any] = {}
        for i, argument in enumerate(schema.arguments):
            if i < len(node.args):
                self.values[argument.name] = node.args[i]
            elif argument.name in node.kwargs:
                self.values[argument.name] = node.kwargs[argument.name]
            else:
                self.values[argument.name] = argument.default_value if argument.has_default_value() else None
        self.names = [argument.name for argument in schema.arguments]

    def __getitem__(self, name: str | int) -> Any:
        return self.values[self.names[name] if isinstance(name, int) else name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def dims(self, name: str | int | fx.Node) -> Dims:
        node = name if isinstance(name, fx.Node) else self[name]
        if not is_tensor(node):
            raise DimConflict(f"{name} is not a tensor")
        return self._table[node].dims

    @property
    def shape(self) -> Sequence[int | torch.SymInt]:
        return self.node.meta["val"].shape

    @property
    def origin(self) -> str:
        return self.node.name


Rule = Callable[[Args], Typing]
RULES: dict[str, Rule] = {}
rule = entering(RULES)


def is_tensor(value: object) -> bool:
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def op_name(node: fx.Node) -> str:
    """``linear`` for ``aten.linear.default``; the function's own name for anything else."""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[1]
    return getattr(node.target, "__name__", str(node.target))


def tie(one: Sequence[Any], other: Sequence[Any]) -> None:
    """Unify two dimensions unless one of them broadcasts."""
    if leaves(one) and leaves(other):
        unify(one, other)


def norm_dim(dim: int, rank: int) -> int:
    return dim % rank if rank else 0
