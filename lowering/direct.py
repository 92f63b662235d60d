"""What compiled code calls in place of the operators: the same arguments, real tensors, no dispatcher.

The graph was checked when it was traced, and autograd and autocast were applied then. Of a call whose head counts and head dims
are numbers, nothing that decides between kernels changes from run to run but the bounds of the lengths: such a call gets a
`site` of its own, made when the generated code is loaded, which looks for its kernel once. It also looks at the first results of
each kernel, where Inductor would assert at every call that they lie as the graph was told.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any, Literal

from torch import Tensor

from varlen_inductor.ops.attention import debug, default_kernels, drawn_from, run_backward, run_forward, split_arguments
from varlen_inductor.ops.backends import choose, fallback
from varlen_inductor.ops.backends.base import Backend, backward_by, forward_by
from varlen_inductor.ops.joined import backward_joined_by, run_backward_joined
from varlen_inductor.ops.problem import Layout, Problem, Rule
from varlen_inductor.ops.validate import check_lengths

_Lengths = tuple[Tensor, Tensor, int, int]
"""cu_seq_q, cu_seq_k, max_q, max_k: what every call is given by position behind query, key and value."""

_MOST_BOUNDS = 256
_ALIGNMENT = 16


def forward(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``varlen_inductor::varlen_attn``."""
    layout, rule, kernels = split_arguments(query, *args, **options)
    if debug():
        check_lengths(layout, query, key)
    return run_forward(query, key, value, layout, rule, kernels or default_kernels())


def drawn(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """``varlen_inductor::varlen_attn_drawn``."""
    out, lse, _ = forward(query, key, value, *args, **options)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """``varlen_inductor::varlen_attn_backward``."""
    layout, rule, kernels = split_arguments(query, *args, **options)
    kernels, layout = kernels or default_kernels(), drawn_from(rng_state, layout)
    return run_backward(grad_out, grad_lse, out, lse, rng_state, query, key, value, layout, rule, kernels)


def backward_joined(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **options: Any,
) -> Tensor:
    """``varlen_inductor::varlen_attn_backward_joined``."""
    layout, rule, kernels = split_arguments(query, *args, **options)
    kernels, layout = kernels or default_kernels(), drawn_from(rng_state, layout)
    return run_backward_joined(grad_out, grad_lse, out, lse, rng_state, query, key, value, layout, rule, kernels)


def site(
    function: Literal["forward", "drawn", "backward", "backward_joined"], alone: bool = False, **options: Any
) -> Callable[..., Any]:
    """`forward`, `drawn`, `backward` or `backward_joined` for one place in generated code, with all options but tensors given.

    Every call must have the same device, dtypes, head counts, head dims and tensors among its options, and at least one query
    row, key row and sequence. ``kernels`` must be among the options.

    Args:
        alone: of the results of `drawn` only the first is looked at.
    """
    by_row = options.get("lse_by_row", False)
    if function == "forward":
        return _forward_site(options, _by_row if by_row else attrgetter("forward"), forward)
    if function == "drawn":
        return _forward_site(options, partial(_drawn_by, wants_lse=not alone, by_row=by_row), drawn)
    if function == "backward":
        return _backward_site(options, _from_rows if by_row else attrgetter("backward"), backward)
    return _backward_site(options, lambda backend: partial(backward_joined_by, backend), backward_joined)


def results_of_forward(query: Tensor, value: Tensor, layout: Layout, rule: Rule) -> dict[str, tuple[int, ...]]:
    """The sizes of what a forward gives; of ``rng_state``, which is last, there may be none."""
    tokens, heads, _ = query.shape
    drawn = 2 if rule.dropout_p > 0.0 and layout.seeds is None else 0
    lse = (tokens, heads) if layout.lse_by_row else (heads, tokens)
    return {"out": (tokens, heads, value.shape[-1]), "lse": lse, "rng_state": (drawn,)}


def results_of_backward(query: Tensor, key: Tensor, value: Tensor, joined: bool) -> dict[str, tuple[int, ...]]:
    """The sizes of what a backward gives."""
    if joined:
        return {"the gradients": (query.shape[0], sum(x.shape[1] * x.shape[2] for x in (query, key, value)))}
    return {f"the gradient of {name}": tuple(x.shape) for name, x in (("query", query), ("key", key), ("value", value))}


def look_at(results: Any, sizes: dict[str, tuple[int, ...]]) -> None:
    """Raises ``RuntimeError`` unless these are contiguous tensors of these sizes, or ``None``, and aligned."""
    for x, (name, size) in zip((results,) if isinstance(results, Tensor) else results, sizes.items()):
        if x is not None and not (x.shape == size and x.is_contiguous() and x.data_ptr() % _ALIGNMENT == 0):
            raise RuntimeError(
                f"{name} is {tuple(x.shape)} with strides {x.stride()} at {x.data_ptr():#x}; it must be {size}, contiguous, and at "
                f"a multiple of {_ALIGNMENT}"
            )


class _Known:
    """What a site has found out for calls with the same ``max_q`` and ``max_k``."""

    def __init__(
        self,
        call: _Call,
        operands: tuple[Tensor, Tensor, Tensor],
        args: _Lengths,
        tensors: dict[str, Any],
        rng_state: Tensor | None,
    ) -> None:
        layout, self.rule, kernels = split_arguments(operands[0], *args, **{**call.options, **tensors})
        self.kernels = kernels or default_kernels()
        posed = layout if rng_state is None else drawn_from(rng_state, layout)
        self.problem = Problem.of(*operands, posed, self.rule)
        choice = choose(self.problem, self.kernels, call.backward, fallback.failed(self.problem, call.backward))
        self.backend, self.gathers = choice.backend, choice.gathers
        self.run = call.of(choice.backend)
        self.looked = False
        named = dict(zip(Layout._fields[4:], layout[4:], strict=True))
        self.rest = tuple(None if name in tensors else value for name, value in named.items())[:-1]
        self.constants: dict[str, Any] = {name: value for name, value in named.items() if name not in tensors}

    def layout(self, args: _Lengths, seeds: Tensor | None, tensors: dict[str, Any]) -> Layout:
        if not tensors:  # past the named tuple's own constructor, which takes longer; seeds are its last field
            return tuple.__new__(Layout, (*args, *self.rest, seeds))
        return Layout(*args, **{**self.constants, **tensors, "seeds": seeds})


class _Call:
    """What all sites have: the options, and what is known so far by (max_q, max_k)."""

    def __init__(self, options: dict[str, Any], backward: bool, of: Callable[[Backend], Callable[..., Any]]) -> None:
        self.options = options
        self.of = of
        self.backward = backward
        self.found: dict[tuple[int, int], _Known] = {}

    def look(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        args: _Lengths,
        tensors: dict[str, Any],
        rng_state: Tensor | None = None,
    ) -> _Known:
        if len(self.found) >= _MOST_BOUNDS:
            self.found.clear()
        known = self.found[args[2:]] = _Known(self, (query, key, value), args, tensors, rng_state)
        return known


def _drawn_by(backend: Backend, wants_lse: bool, by_row: bool) -> Callable[..., tuple[Any, ...]]:
    """What runs the forward where nothing is left to be drawn."""
    run: Callable[..., tuple[Any, ...]] | None = backend.forward_drawn
    if run is None or (wants_lse and by_row and not backend.lse_by_row):
        return lambda *operands: forward_by(backend, *operands)[:2]
    return partial(run, wants_lse=wants_lse)


def _by_row(backend: Backend) -> Callable[..., tuple[Tensor, ...]]:
    """What runs the forward where lse is by row."""
    return backend.forward if backend.lse_by_row else partial(forward_by, backend)


def _from_rows(backend: Backend) -> Callable[..., Any]:
    """What runs the backward where lse is by row."""
    return backend.backward if backend.lse_by_row else partial(backward_by, backend)


def _forward_site(
    options: dict[str, Any], of: Callable[[Backend], Callable[..., tuple[Any, ...]]], otherwise: Callable[..., tuple[Tensor, ...]]
) -> Callable[..., tuple[Any, ...]]:
    """``of`` gives what runs the forward with a backend; ``otherwise`` is called where more has to be done."""
    call = _Call(options, backward=False, of=of)
    found, look, failed = call.found, call.look, fallback.failed

    def attend(
        query: Tensor, key: Tensor, value: Tensor, *args: Any, seeds: Tensor | None = None, **tensors: Tensor
    ) -> tuple[Any, ...]:
        known = found.get(args[2:]) or look(query, key, value, args, {**tensors, "seeds": seeds})
        if not (known.gathers or failed(known.problem, False) or debug()):
            layout = known.layout(args, seeds, tensors)
            try:
                results = known.run(query, key, value, layout, known.rule)
                if not known.looked:
                    look_at(results, results_of_forward(query, value, layout, known.rule))
                    known.looked = True
                return results
            except Exception as error:
                fallback.note(error, known.backend, known.problem, known.kernels, False)
        results = otherwise(query, key, value, *args, **options, **tensors, seeds=seeds)
        look_at(results, results_of_forward(query, value, known.layout(args, seeds, tensors), known.rule))
        return results

    return attend


def _backward_site(
    options: dict[str, Any], of: Callable[[Backend], Callable[..., Any]], otherwise: Callable[..., Any]
) -> Callable[..., Any]:
    """``of`` gives what runs the backward with a backend; ``otherwise`` is called where more has to be done."""
    call = _Call(options, backward=True, of=of)
    found, look, failed = call.found, call.look, fallback.failed

    def differentiate(
        grad_out: Tensor,
        grad_lse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        rng_state: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **tensors: Tensor,
    ) -> Any:
        known = found.get(args[2:]) or look(query, key, value, args, tensors, rng_state)
        # The gradient of lse is prepared before a kernel sees it.
        if grad_lse is None and not failed(known.problem, True):
            layout = known.layout(args, None, tensors)
            try:
                results = known.run(grad_out, None, out, lse, rng_state, query, key, value, layout, known.rule)
                if not known.looked:
                    look_at(results, results_of_backward(query, key, value, isinstance(results, Tensor)))
                    known.looked = True
                return results
            except Exception as error:
                fallback.note(error, known.backend, known.problem, known.kernels, True)
        results = otherwise(grad_out, grad_lse, out, lse, rng_state, query, key, value, *args, **options, **tensors)
        look_at(results, results_of_backward(query, key, value, isinstance(results, Tensor)))
        return results

    return differentiate
