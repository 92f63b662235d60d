"""Functions that are compiled on their own, by a ``torch.compile`` of their own, when they are first called.

Between two steps of a model nothing changes but the data. Dynamo does not know that of a nested function and asks again, of each of
some hundred parameters, before each call. The caller often does know, because the compile around it has just asked; so it may
name, by a *key*, the calls that are alike, and from the second on Dynamo is passed by.
"""

from __future__ import annotations

import itertools
import operator
import threading
import types
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch

from varlen_inductor import _compat, _compat_inductor

MOST_KEYS = 1024
"""So many calls are told apart; then all are forgotten."""


class Nested:
    """A function behind ``torch.compile(fullgraph=True)``.

    It can never run eagerly unnoticed: ``fullgraph=True`` raises if something was not captured, and each function gets a code
    object of its own (Dynamo gives up on a code object after a few compiles, and all closures of one ``def`` share theirs).

    Args:
        fn: a plain function, not a GraphModule and not a bound ``forward``: Dynamo skips those.
        backend: compiles the graph.
        dynamic: as for ``torch.compile``.

    Raises:
        TypeError: ``fn`` is not a plain Python function.
    """

    def __init__(self, fn: Callable[..., Any], backend: _compat.CompilerFn, dynamic: bool | None) -> None:
        self._backend = backend
        self._compiled = torch.compile(with_own_code(fn), fullgraph=True, dynamic=dynamic, backend=self._compile)
        self._running = threading.local()
        self._routes: dict[Hashable, _Route] = {}
        self.modules: set[types.ModuleType] = set()
        """The generated code that was loaded when the function was compiled. (A backward may be compiled later.)"""

    def __call__(self, *args: Any, key: Hashable = None) -> Any:
        """Call the function.

        Args:
            key: promises, if not None, that Dynamo's guards hold for this call if they held for an earlier one with this key:
                all that they ask about (dtypes, devices, sizes, strides, grad mode, which arguments are the same object) is
                either in the key or guarded by the compile around this one.
        """
        if key is not None:
            route = self._routes.get(key)
            if route is not None:
                return route(args)
        calls: list[tuple[Any, tuple[Any, ...], Any]] = []
        self._running.calls = calls
        try:
            # A stance of the user's is about the compile around this one, which knows nothing of there being another.
            with _compat.default_stance():
                result = self._compiled(*args)
        finally:
            self._running.calls = None
        if key is not None and (found := _route(calls, args, result)) is not None:
            if len(self._routes) >= MOST_KEYS:
                self._routes.clear()
            self._routes[key] = found
        return result

    def knows(self, key: Hashable) -> bool:
        """Whether calls with this key pass Dynamo by."""
        return key in self._routes

    def _compile(self, gm: torch.fx.GraphModule, example_inputs: _compat.ExampleInputs) -> _compat.CompiledFn:
        before = set(_compat_inductor.generated_modules())
        compiled = self._backend(gm, example_inputs)
        self.modules.update(module for module in _compat_inductor.generated_modules() if module not in before)

        def noted(*args: Any) -> Any:
            result = compiled(*args)
            calls = getattr(self._running, "calls", None)
            if calls is not None:
                calls.append((compiled, args, result))
            return result

        return noted


class _Route(NamedTuple):
    """What Dynamo did with a call: which compiled graph it called, with which arguments, and what it made of the results."""

    compiled: Callable[..., Any]
    arguments: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    results: Callable[[tuple[Any, ...]], tuple[Any, ...]]

    def __call__(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.results(tuple(self.compiled(*self.arguments(args))))


def _selection(places: Sequence[int], constants: Sequence[Any], available: int) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """What takes, from a tuple of so many values with the constants behind them, those at the places. Quick: there are hundreds."""
    behind = tuple(constants)
    if len(places) == 0:
        return lambda values: ()
    if len(places) == 1:
        (place,) = places
        return (lambda values: (values[place],)) if place < available else (lambda values: behind)
    pick = operator.itemgetter(*places)
    return (lambda values: pick(values + behind)) if behind else pick


def _route(calls: list[tuple[Any, tuple[Any, ...], Any]], args: tuple[Any, ...], result: Any) -> _Route | None:
    """The route of one call, or None if it is not plain: one graph, its tensors among the arguments, its results the results."""
    if len(calls) != 1 or type(result) is not tuple:
        return None
    compiled, given, made = calls[0]
    places = {id(x): i for i, x in enumerate(args) if isinstance(x, torch.Tensor)}
    if len(places) != sum(isinstance(x, torch.Tensor) for x in args) or not isinstance(made, (tuple, list)):
        return None
    made_at = {id(x): i for i, x in enumerate(made) if isinstance(x, torch.Tensor)}
    arguments = _traced_back(given, places, len(args), (int, bool, float))  # numbers among them are sizes, which the key fixes
    results = _traced_back(result, made_at, len(made), ())  # numbers among them may come from the data
    return None if arguments is None or results is None else _Route(compiled, arguments, results)


def _traced_back(
    values: Sequence[Any], places: dict[int, int], available: int, fixed: tuple[type, ...]
) -> Callable[..., tuple[Any, ...]] | None:
    """The selection that makes ``values``, its tensors known by their places, or None if one is not known.

    Args:
        fixed: types of which a value is the same in all calls that are alike.
    """
    chosen: list[int] = []
    constants: list[Any] = []
    for x in values:
        if isinstance(x, torch.Tensor) and id(x) in places:
            chosen.append(places[id(x)])
        elif x is None or type(x) in fixed:
            chosen.append(available + len(constants))
            constants.append(x)
        else:
            return None
    return _selection(chosen, constants, available)


_numbers = itertools.count()


def with_own_code(fn: Callable[..., Any]) -> types.FunctionType:
    """The same function with a code object of its own: Dynamo keeps what it compiled, and counts it, by code object.

    Raises:
        TypeError: ``fn`` is not a plain Python function.
    """
    if not isinstance(fn, types.FunctionType):
        raise TypeError(f"expected a plain Python function, not {type(fn).__name__}: wrap it in one")
    name = f"{fn.__name__}_{next(_numbers)}"
    own = types.FunctionType(fn.__code__.replace(co_name=name), fn.__globals__, name, fn.__defaults__, fn.__closure__)
    own.__kwdefaults__ = fn.__kwdefaults__
    return own
