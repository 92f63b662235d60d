"""The parts of a kernel backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from varlen_inductor.ops.problem import Layout, Problem, Rule

Forward = Callable[[Tensor, Tensor, Tensor, Layout, Rule], tuple[Tensor, Tensor, Tensor]]
"""``(query, key, value, layout, rule) -> (out, lse, rng_state)``; what each must hold is said at the operator."""

ForwardDrawn = Callable[[Tensor, Tensor, Tensor, Layout, Rule, bool], tuple[Tensor, Tensor | None]]
"""``(query, key, value, layout, rule, wants_lse) -> (out, lse)``: as ``Forward``, where nothing is left to be drawn: nothing is
dropped, or by the seeds of the layout. Unless lse is wanted it may be ``None``."""

ForwardInto = Callable[[Tensor, Tensor, Tensor, Tensor, Layout, Rule], Tensor]
"""``(out, query, key, value, layout, rule) -> lse``. ``out`` (T_q, H, D_v) has its last dim contiguous."""

Backward = Callable[
    [Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Layout, Rule], tuple[Tensor, Tensor, Tensor]
]
"""``(grad_out, grad_lse, out, lse, rng_state, query, key, value, layout, rule) -> (grad_query, grad_key, grad_value)``.

``out``, ``lse`` and ``rng_state`` are what the same backend's forward gave; ``grad_lse`` is ``None`` if lse was not used.
"""

BackwardInto = Callable[
    [tuple[Tensor, Tensor, Tensor], Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Layout, Rule], None
]
"""``(grads, grad_out, out, lse, rng_state, query, key, value, layout, rule)``: as ``Backward`` without a gradient of lse, written
to ``grads``: tensors (T_q, H, D), (T_k, H_k, D), (T_k, H_k, D_v) with contiguous heads and any step from row to row that is a
multiple of 16 bytes, as is the address of the first row. What lies between their rows is left alone."""


@dataclass(frozen=True, eq=False)
class Backend:
    """One way to run the attention.

    Operands reach ``forward`` and ``backward`` checked, with at least one query token and one key token, and in any strides.
    Results are contiguous. No lse is by row, but for ``lse_by_row``.
    """

    name: str
    supports: Callable[[Problem], str | None]
    """``None`` if the backend can run the problem, forward and backward, else the reason why not, for the user."""
    forward: Forward
    backward: Backward
    forward_into: ForwardInto | None = None
    """As ``forward``, into a tensor that is there; ``None`` if the backend cannot."""
    backward_into: BackwardInto | None = None
    """As ``backward``, into tensors that are there; ``None`` if the backend cannot."""
    forward_drawn: ForwardDrawn | None = None
    """As ``forward`` without what nobody needs; ``None`` if that saves the backend nothing."""
    lse_by_row: bool = False
    """Whether its forward gives lse by row where the layout says so, and its backward takes it, if lse has no gradient."""
    takes_seeds: bool = False
    """Whether its forward drops by the seeds of the layout, if there are any; all others draw their own."""
    reads_lengths: bool = False
    """Whether a call copies the sequence lengths to the host: on a GPU it then waits, and cannot be captured."""


def with_lse_as_asked(results: tuple[Tensor, Tensor, Tensor], layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """The results of a forward that gives lse as (H, T_q), lse by row where the layout says so."""
    out, lse, rng_state = results
    return (out, lse.t().contiguous(), rng_state) if layout.lse_by_row else results


def forward_by(
    backend: Backend, query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward of any backend, lse by row where the layout says so."""
    results = backend.forward(query, key, value, layout, rule)
    return results if backend.lse_by_row else with_lse_as_asked(results, layout)


def backward_by(
    backend: Backend,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    rule: Rule,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of any backend, lse by row where the layout says so."""
    grad_lse, lse, layout = lse_for(backend, grad_lse, lse, layout)
    return backend.backward(grad_out, grad_lse, out, lse, rng_state, query, key, value, layout, rule)


def lse_for(
    backend: Backend, grad_lse: Tensor | None, lse: Tensor, layout: Layout
) -> tuple[Tensor | None, Tensor, Layout]:
    """The gradient of lse, lse and the layout as the backward of ``backend`` takes them."""
    if not layout.lse_by_row or (backend.lse_by_row and grad_lse is None):
        return grad_lse, lse, layout
    return None if grad_lse is None else grad_lse.t(), lse.t().contiguous(), layout._replace(lse_by_row=False)


def unknown_option(problem: Problem) -> str | None:
    """The reason of a backend that has, or was tested with, none of the newer options; ``None`` if the problem has none."""
    if problem.softcap > 0.0:
        return "it has no softcap here"
    if problem.paged:
        return "it does not read keys in pages here"
    if problem.batch_invariant:
        return "it was not tested for results that do not depend on the batch"
    return None
