"""With dropout the backward runs the kernel that the forward was lowered to, also where it cannot be lowered itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attention_cases import make_case
from varlen_inductor.lowering import attention
from varlen_inductor.ops.backends import aten_flash


@pytest.mark.parametrize(("dropout_p", "expected"), [(0.1, "aten_flash"), (0.0, None)])
def test_gradient_of_lse(dropout_p: float, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ATen operator knows none, so ours is called: which then must not choose by what only the run knows."""
    called: list[Any] = []

    class Operators:
        class varlen_attn_backward:
            @staticmethod
            def default(*args: Any, **options: Any) -> str:
                called.append(options["kernels"])
                return "called"

    monkeypatch.setattr(attention, "_ops", Operators)
    monkeypatch.setattr(attention, "_direct", lambda *args, **options: True)
    monkeypatch.setattr(attention, "_chosen", lambda *args: (aten_flash.BACKEND,) * 2)
    case = make_case((5, 3))
    operands = [x.detach() if isinstance(x, torch.Tensor) else x for x in case.operands]
    out, lse = torch.zeros(8, 2, 8), torch.zeros(2, 8)
    given = (out, lse, out, lse, torch.zeros(2, dtype=torch.uint64), *operands)
    result = attention._backward(*given, dropout_p=dropout_p, kernels="auto")
    assert called == ([] if expected is None else [expected])
    assert result == ("called" if expected else NotImplemented)
    # Named already, it is left to the operator.
    assert attention._backward(*given, dropout_p=dropout_p, kernels="aten_flash") is NotImplemented
