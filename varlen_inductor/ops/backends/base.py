"""The parts of a kernel backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from varlen_inductor.ops.problem import Layout, Problem, Rule

Forward = Callable[[Tensor, Tensor, Tensor, Layout, Rule], tuple[Tensor, Tensor, Tensor]]
"""``(query, key, value, layout, rule) -> (out, lse, rng_state)``; what each must hold is said at the operator."""

ForwardAlone = Callable[[Tensor, Tensor, Tensor, Layout, Rule], Tensor]
"""``(query, key, value, layout, rule) -> out``: as ``Forward``, where nobody reads lse and nothing is dropped."""

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
    Results are contiguous.
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
    forward_alone: ForwardAlone | None = None
    """As ``forward`` without what else it gives; ``None`` if that saves the backend nothing."""
    reads_lengths: bool = False
    """Whether a call copies the sequence lengths to the host: on a GPU it then waits, and cannot be captured."""


def unknown_option(problem: Problem) -> str | None:
    """The reason of a backend that has, or was tested with, none of the newer options; ``None`` if the problem has none."""
    if problem.softcap > 0.0:
        return "it has no softcap here"
    if problem.paged:
        return "it does not read keys in pages here"
    if problem.batch_invariant:
        return "it was not tested for results that do not depend on the batch"
    return None
