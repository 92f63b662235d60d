"""Nested compiles: what Dynamo is passed by for, and what it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from varlen_inductor import _compat, nested


class Counting:
    """A backend that counts graphs compiled and run."""

    def __init__(self) -> None:
        self.compiled = self.runs = 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return gm(*args)

        return run


@pytest.fixture
def backend() -> Counting:
    return Counting()


def without_dynamo(monkeypatch: pytest.MonkeyPatch, program: nested.Nested) -> None:
    """From here on a call that reaches Dynamo fails."""

    def fail(*args: Any) -> None:
        raise AssertionError("Dynamo was asked")

    monkeypatch.setattr(program, "_compiled", fail)


def test_known_keys_pass_dynamo_by(backend: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    program = nested.Nested(lambda x, y: (y - x, x * 2), backend, None)
    x, y = torch.randn(4), torch.randn(4)
    assert not program.knows("four")
    program(x, y, key="four")
    assert program.knows("four")
    without_dynamo(monkeypatch, program)
    x, y = torch.randn(4), torch.randn(4)
    found = program(x, y, key="four")
    assert type(found) is tuple
    assert torch.equal(found[0], y - x)
    assert torch.equal(found[1], x * 2)
    assert (backend.compiled, backend.runs) == (1, 2)
    with pytest.raises(AssertionError, match="Dynamo was asked"):
        program(x, y, key="five")
    with pytest.raises(AssertionError, match="Dynamo was asked"):
        program(x, y)


def test_each_key_has_the_graph_that_it_was_compiled_to(backend: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    program = nested.Nested(lambda x: (x * x.shape[0],), backend, False)
    for n in (3, 5):
        program(torch.ones(n), key=n)
    assert backend.compiled == 2
    without_dynamo(monkeypatch, program)
    for n in (5, 3):
        assert torch.equal(program(torch.ones(n), key=n)[0], torch.full((n,), float(n)))


def test_sizes_that_the_graph_takes_as_numbers(backend: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    program = nested.Nested(lambda x: (x.sum() * x.shape[0], x + 1), backend, True)
    for n in (3, 5, 7):
        program(torch.ones(n), key=n)
    assert backend.compiled == 1
    without_dynamo(monkeypatch, program)
    for n in (7, 3, 5):
        total, more = program(torch.ones(n), key=n)
        assert total == n * n
        assert torch.equal(more, torch.full((n,), 2.0))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: (x, y * 2, None, x),  # an input is handed through
        lambda x, y: (y.mul_(2), 3),
        lambda x, y: (),
        lambda x, y: (y + x,),
    ],
)
def test_results_are_the_same_by_either_way(backend: Counting, function: Callable[..., Any]) -> None:
    program = nested.Nested(function, backend, None)
    for _ in range(3):
        x, y = torch.randn(4), torch.randn(4)
        expected, other = function(x, y.clone()), y.clone()
        found = program(x, other, key="one")
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) if isinstance(b, Tensor) else a == b


def test_numbers_among_the_results_are_those_of_each_call(backend: Counting) -> None:
    program = nested.Nested(lambda x: (x * 2, int(x.sum().item()), bool((x.sum() > 3).item())), backend, None)
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        for n in (2, 2, 7, 3):
            x = torch.full((1,), n)
            _, number, more = program(x, key="one")
            assert (number, more) == (n, n > 3)


@pytest.mark.parametrize("stance", ["fail_on_recompile", "eager_on_recompile", "eager_then_compile", "force_eager"])
def test_a_stance_is_not_about_nested_compiles(stance: str, backend: Counting) -> None:
    """Where the compile around it runs what it compiled, this one may compile; and it never runs eagerly unnoticed."""
    program = nested.Nested(lambda x: (x + 1,), backend, None)
    with torch.compiler.set_stance(stance):
        assert torch.equal(program(torch.ones(2), key="two")[0], torch.full((2,), 2.0))
    assert (backend.compiled, backend.runs) == (1, 1)
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        torch.compile(lambda x: x - 1, backend=backend)(torch.ones(2))  # the user's stance is back


def test_calls_that_are_not_plain_are_always_dynamos(backend: Counting) -> None:
    same = nested.Nested(lambda x, y: (x + y,), backend, None)
    x = torch.randn(3)
    same(x, x, key="twice the same object")
    assert not same.knows("twice the same object")
    listed = nested.Nested(lambda x: [x + 1], backend, None)
    listed(x, key="a list")
    assert not listed.knows("a list")
    attribute = torch.randn(3)
    closed = nested.Nested(lambda x: (x + attribute,), backend, None)
    closed(x, key="a tensor that is no argument")
    assert not closed.knows("a tensor that is no argument")


def test_gradients_flow_by_either_way() -> None:
    program = nested.Nested(lambda x, w: (x * w.exp(),), _compat.lookup_backend("aot_eager"), None)
    for _ in range(3):
        x, w = torch.randn(4), torch.randn(4, requires_grad=True)
        (y,) = program(x, w, key="grad")
        y.sum().backward()
        torch.testing.assert_close(w.grad, x * w.detach().exp())
    assert program.knows("grad")


def test_a_failure_leaves_nothing_behind(backend: Counting) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no")

    program = nested.Nested(lambda x: (x + 1,), lambda gm, inputs: broken, None)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no"):
            program(torch.ones(2), key="broken")
        assert not program.knows("broken")


def test_too_many_keys_are_forgotten(backend: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nested, "MOST_KEYS", 2)
    program = nested.Nested(lambda x: (x + 1,), backend, None)
    for key in "abc":
        program(torch.ones(2), key=key)
    assert [program.knows(key) for key in "abc"] == [False, False, True]
