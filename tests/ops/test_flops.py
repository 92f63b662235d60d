"""FLOP formulas against those of PyTorch's own attention on each sequence."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode

from attention_cases import make_case, run
from varlen_inductor.ops import flops  # noqa: F401  (registers the formulas)


def test_counts_what_the_sequences_cost_alone() -> None:
    case = make_case((5, 0, 9), heads=(2, 2), dims=(8, 8))
    with FlopCounterMode(display=False) as ours:
        run(case)[0].sum().backward()
    with FlopCounterMode(display=False) as theirs:
        for start, stop in ((0, 5), (5, 14)):
            parts = [x.detach()[start:stop].transpose(0, 1)[None].to("meta").requires_grad_() for x in case.operands[:3]]
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                scaled_dot_product_attention(*parts).sum().backward()
    forward, all_of_ours = 4 * 2 * 8 * (25 + 81), ours.get_total_flops()
    assert all_of_ours == forward + forward * 5 // 2
    # Written out, attention saves the scores: four products backward instead of five.
    assert theirs.get_total_flops() == forward * 3


def test_other_head_dims_and_used_keys() -> None:
    used = torch.tensor([2, 3], dtype=torch.int32)
    case = make_case((5, 3), dims=(8, 4), heads=(4, 2), seqused_k=used)
    with FlopCounterMode(display=False) as counter:
        run(case)
    assert counter.get_total_flops() == 2 * 4 * (5 * 2 + 3 * 3) * (8 + 4)


def test_unknown_lengths_count_as_the_longest() -> None:
    case = make_case((5, 3))
    operands = [x.detach().to("meta") if isinstance(x, torch.Tensor) else x for x in case.operands]
    with FlopCounterMode(display=False) as counter:
        torch.ops.varlen_inductor.varlen_attn(*operands)
    assert counter.get_total_flops() == 4 * 2 * 8 * (2 * 5 * 5)
