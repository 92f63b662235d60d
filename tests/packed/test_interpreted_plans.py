"""Packed models whose plans come from the Triton kernels, interpreted, as on CUDA they come from the kernels themselves."""

from __future__ import annotations

from typing import Any
from unittest import mock

from packed_models import Blocks, compare_with_eager, feature_batch
from test_models import bart, translation_batches
from torch import Tensor

from triton_interpreter import interpret, needs_interpreter
from varlen_inductor.backend import register_by_name
from varlen_inductor.ops import plan_kernels


@needs_interpreter
def test_models() -> None:
    interpret("packed/test_interpreted_plans", "compare")


def compare() -> None:
    """Run by the test where Triton interprets: one plan, whose longest sequences come first, and two, which keep their order."""
    register_by_name()
    orders: list[bool] = []
    plan = plan_kernels.plan

    def spy(mask: Tensor, round_to: int, on_host: Any, flag: Any, longest_first: bool, labels: Any) -> tuple[Any, ...]:
        orders.append(longest_first)
        return plan(mask, round_to, on_host, flag, longest_first, labels)

    with mock.patch.multiple(plan_kernels, available=lambda mask: mask.numel() > 0, plan=spy):
        for train in (True, False):
            compare_with_eager(Blocks(), [feature_batch(lengths) for lengths in ([3, 9, 24], [5, 0, 7])], train=train)
        assert orders == [True] * 4
        orders.clear()
        compare_with_eager(bart(), translation_batches(), masks={"last_hidden_state": "decoder_attention_mask"})
        assert orders == [False] * 4
