"""Attention problems that every kernel must solve, and the comparison with the reference."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varlen_inductor.ops.attention import split_arguments  # (defines the operator, too)
from varlen_inductor.ops.backends.base import Backend
from varlen_inductor.ops.reference import varlen_attn_reference

LENGTHS = {
    "ragged": ((7, 1, 12, 33), None),
    "equal": ((9, 9, 9), None),
    "one token": ((1,), None),
    "empty sequences": ((0, 5, 0, 0, 3, 0), None),
    "more keys": ((3, 1, 4), (9, 5, 4)),
    "more queries": ((9, 5, 4), (3, 1, 4)),
    "no keys": ((4, 2, 3), (0, 6, 0)),
    "no queries": ((4, 0, 3), (2, 6, 5)),
}
"""Lengths of the query and the key sequences (None: the same) by name."""

WINDOWS = {"full": (-1, -1), "causal": (-1, 0), "sliding": (2, 1), "left": (3, -1), "sliding causal": (4, 0), "right": (-1, 2)}

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""By which largest difference, relative to the largest value of the reference, a result may differ."""


class Case(NamedTuple):
    """One attention: operands and options of ``torch.ops.varlen_inductor.varlen_attn``."""

    query: Tensor
    key: Tensor
    value: Tensor
    cu_seq_q: Tensor
    cu_seq_k: Tensor
    max_q: int
    max_k: int
    options: dict[str, Any]

    @property
    def operands(self) -> tuple[Any, ...]:
        return self[:7]

    def tokens(self) -> tuple[int, int]:
        """How many rows belong to sequences."""
        return int(self.cu_seq_q[-1]), int(self.cu_seq_k[-1])


def make_case(
    lengths_q: tuple[int, ...],
    lengths_k: tuple[int, ...] | None = None,
    *,
    heads: tuple[int, int] = (2, 2),
    dims: tuple[int, int] = (8, 8),
    window: tuple[int, int] = (-1, -1),
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    tail: int = 0,
    fill: float = math.nan,
    **options: Any,
) -> Case:
    """Random operands. ``tail`` rows that hold ``fill`` follow the last sequence."""
    lengths_k = lengths_q if lengths_k is None else lengths_k

    def rows(lengths: tuple[int, ...], heads: int, dim: int) -> Tensor:
        x = torch.randn(sum(lengths) + tail, heads, dim, dtype=dtype, device=device)
        x[sum(lengths) :] = fill
        return x.requires_grad_()

    return Case(
        rows(lengths_q, heads[0], dims[0]),
        rows(lengths_k, heads[1], dims[0]),
        rows(lengths_k, heads[1], dims[1]),
        offsets(lengths_q, device),
        offsets(lengths_k, device),
        max((*lengths_q, 1)),
        max((*lengths_k, 1)),
        {"window_left": window[0], "window_right": window[1], **options},
    )


def offsets(lengths: tuple[int, ...], device: str = "cpu") -> Tensor:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return ends.to(device, torch.int32)


def run(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """The operator on the case, in eager mode."""
    return torch.ops.varlen_inductor.varlen_attn(*case.operands, **case.options)


def reference(case: Case) -> tuple[Tensor, Tensor]:
    options = dict(case.options)
    window = options.pop("window_left"), options.pop("window_right")
    options.pop("kernels", None)
    return varlen_attn_reference(*case.operands[:5], window_size=window, **options)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, what: str, factor: float = 1.0) -> None:
    """Compares in float64, relative to the largest expected value."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, what
    assert torch.equal(actual.isinf(), expected.isinf()), f"{what}: infinite in other places"
    finite = expected.isfinite()
    error = (actual - expected)[finite].abs().max() if finite.any() else torch.zeros(())
    size = expected[finite].abs().max().clamp(min=1.0) if finite.any() else torch.ones(())
    assert error <= factor * TOLERANCE[dtype] * size, f"{what}: differs by {error:.3g} where values reach {size:.3g}"


def check_against_reference(case: Case, *, lse_gradient: bool = True) -> None:
    """Forward and backward of the operator against the reference, rows that belong to no sequence included."""
    dtype = case.query.dtype
    out, lse, _ = run(case)
    expected_out, expected_lse = reference(case)
    assert out.is_contiguous()
    assert out.dtype == dtype
    assert_close(out, expected_out, dtype, "out")
    assert_close(lse, expected_lse, dtype, "lse")

    seen = expected_lse.isfinite()
    grad_out = torch.randn_like(out)
    grad_lse = torch.randn(lse.shape, dtype=lse.dtype, device=lse.device) if lse_gradient else torch.zeros_like(lse)
    grad_lse = grad_lse.masked_fill(~seen, 0.0)
    operands = case.operands[:3]
    wanted = (out, lse) if lse_gradient else (out,)
    grads = torch.autograd.grad(wanted, operands, (grad_out, grad_lse)[: len(wanted)])
    # Behind the sequences the reference would multiply NaN by zero.
    expected = torch.autograd.grad(
        (expected_out * grad_out.double()).sum() + (expected_lse.masked_fill(~seen, 0.0) * grad_lse.double()).sum(), operands
    )
    tokens_q, tokens_k = case.tokens()
    for name, grad, wanted_grad, tokens in zip(
        ("query", "key", "value"), grads, expected, (tokens_q, tokens_k, tokens_k), strict=True
    ):
        assert_close(grad[:tokens], wanted_grad[:tokens], dtype, f"gradient of {name}", factor=2.0)
        assert torch.equal(grad[tokens:], torch.zeros_like(grad[tokens:])), f"gradient of {name} behind the last sequence"


def check_backward_into(case: Case, backend: Backend) -> None:
    """``backward_into`` of the backend against its ``backward``, in columns of one tensor; those between them do not change."""
    assert backend.backward_into is not None
    layout, rule, _ = split_arguments(case.query, *case.operands[3:], **case.options)
    query, key, value = (x.detach() for x in case.operands[:3])
    results = backend.forward(query, key, value, layout, rule)
    grad_out = torch.randn_like(results[0])
    expected = backend.backward(grad_out, None, *results, query, key, value, layout, rule)
    widths = [x[0].numel() for x in expected]
    gap = 16 // query.element_size()
    memory = query.new_full((max(query.shape[0], key.shape[0]), sum(widths) + 4 * gap), math.nan)
    untouched = torch.ones_like(memory, dtype=torch.bool)
    places, start = [], gap
    for width, x in zip(widths, expected, strict=True):
        rows, columns = slice(x.shape[0]), slice(start, start + width)
        untouched[rows, columns] = False
        places.append(memory[rows, columns].unflatten(1, x.shape[1:]))
        start = columns.stop + gap
    backend.backward_into((places[0], places[1], places[2]), grad_out, *results, query, key, value, layout, rule)
    assert memory[untouched].isnan().all(), "something between the gradients was written"
    tokens_q, tokens_k = case.tokens()
    for name, actual, wanted, tokens in zip(
        ("query", "key", "value"), places, expected, (tokens_q, tokens_k, tokens_k), strict=True
    ):
        assert_close(actual[:tokens], wanted[:tokens], query.dtype, f"gradient of {name}", factor=2.0)
        if not layout.tails_unread:
            assert torch.equal(actual[tokens:], torch.zeros_like(actual[tokens:])), f"gradient of {name} behind the last sequence"
