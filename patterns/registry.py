"""Tables of what is done with each operator, filled by decorators."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

_Entry = TypeVar("_Entry")


def entering(table: dict[str, _Entry]) -> Callable[..., Callable[[_Entry], _Entry]]:
    """A decorator that enters a function into ``table`` under the names of ATen operators, without overload."""

    def decorator(*names: str) -> Callable[[_Entry], _Entry]:
        def enter(function: _Entry) -> _Entry:
            table.update(dict.fromkeys(names, function))
            return function

        return enter

    return decorator
