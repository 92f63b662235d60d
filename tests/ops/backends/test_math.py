"""Attention in PyTorch operations, with blocks so small that a sequence has many."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from attention_cases import LENGTHS, WINDOWS, check_against_reference, make_case
from varlen_inductor.ops.backends import math


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math, "BLOCK_SCORES", 64)
    monkeypatch.setattr(math, "WINDOW_ROWS", 4)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_lengths_and_windows(lengths: str, window: str) -> None:
    case = make_case(*LENGTHS[lengths], window=WINDOWS[window], heads=(4, 2), dtype=torch.float64, kernels="math", tail=2)
    check_against_reference(case)


@pytest.mark.parametrize("window", ["full", "causal", "sliding"])
def test_each_block_drops_the_same_backward(window: str) -> None:
    case = make_case((7, 5), window=WINDOWS[window], heads=(2, 1), dtype=torch.float64, kernels="math", dropout_p=0.3)

    def function(*operands: Tensor) -> Tensor:
        torch.manual_seed(5)
        return torch.ops.varlen_inductor.varlen_attn(*operands, *case.operands[3:], **case.options)[0]

    assert torch.autograd.gradcheck(function, case.operands[:3], fast_mode=True)


def test_a_window_hides_keys_before_they_are_computed_with() -> None:
    """NaN in keys that no query of a block sees must not matter: such keys are left out."""
    case = make_case((16,), (64,), window=(3, 0), dtype=torch.float64, kernels="math")
    with torch.no_grad():
        case.key[:40] = case.value[:40] = float("nan")
    out = torch.ops.varlen_inductor.varlen_attn(*case.operands, **case.options)[0]
    assert out.isfinite().all()


def test_dropout_probability_is_rounded_to_bits_and_made_up_for() -> None:
    for p in (0.1, 0.5, 1.0):
        rule = math.Rule(1.0, dropout_p=p)
        dropout = math._dropout(torch.ones(400, 999), rule, torch.Generator().manual_seed(0))
        assert dropout is not None
        share = dropout.kept.float().mean()
        assert abs(share - (1.0 - p)) < 0.005
        if p < 1.0:
            assert abs(share * dropout.factor - 1.0) < 0.01


def test_memory_is_that_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the sequence, scores exist for one block only."""
    sizes = []
    bmm = torch.bmm

    def watch(a: Tensor, b: Tensor) -> Tensor:
        result = bmm(a, b)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(torch, "bmm", watch)
    case = make_case((200,), heads=(1, 1), kernels="math")
    out = torch.ops.varlen_inductor.varlen_attn(*case.operands, **case.options)[0]
    assert out.shape == (200, 1, 8)
    assert max(sizes) < 200 * 8 * 2


def test_runs_of_equal_lengths_are_one_batch() -> None:
    from varlen_inductor.ops.backends.sequences import runs
    from varlen_inductor.ops.problem import Layout

    def merged(lengths_q: list[int], lengths_k: list[int], used: list[int] | None = None) -> list[tuple[int, int, int]]:
        ends = [torch.tensor([0, *itertools.accumulate(x)], dtype=torch.int32) for x in (lengths_q, lengths_k)]
        layout = Layout(*ends, 9, 9, None if used is None else torch.tensor(used, dtype=torch.int32))
        return [(run.count, run.q_len, run.k_len) for run in runs(layout)]

    assert merged([4, 4, 4], [4, 4, 4]) == [(3, 4, 4)]
    assert merged([4, 4, 3], [4, 5, 5]) == [(1, 4, 4), (1, 4, 5), (1, 3, 5)]
    assert merged([4, 0, 4], [4, 0, 4]) == [(2, 4, 4)]
    assert merged([4, 0, 4], [4, 2, 4]) == [(1, 4, 4), (1, 4, 4)]
    assert merged([4, 4, 4], [6, 6, 6], [5, 5, 2]) == [(2, 4, 5), (1, 4, 2)]
