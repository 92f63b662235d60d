"""The plan kernels, interpreted, against the plan that plain operators make."""

from __future__ import annotations

import random
from unittest import mock

import torch

from triton_interpreter import interpret, needs_interpreter
from varlen_inductor.ops import host_number, packing, plan_kernels


@needs_interpreter
def test_kernels_agree_with_operators() -> None:
    interpret("ops/test_plan_kernels", "compare")


def compare() -> None:
    """Run by the test where Triton interprets: masks of several shapes, all padding and all tokens among them, by either way."""
    for plan_kernels._MOST_READ in (2**22, 0):
        compare_all()


def compare_all() -> None:
    for shape in [(1, 1), (3, 5), (4, 40), (2, 1030)]:
        for share in (0.0, 0.1, 0.5, 1.0):
            mask = torch.rand(shape) < share
            for kernel, expected in zip(plan_kernels.plan(mask, 0)[:3], packing.plan_static(mask), strict=True):
                assert torch.equal(kernel.to(expected.dtype), expected), (shape, share)
            for longest_first in (False, True):
                compare_one(mask, longest_first)


def compare_labels(mask: torch.Tensor, count: int, expected: tuple[torch.Tensor, ...], longest_first: bool) -> None:
    """Labels that are ignored at padded positions change nothing, and one that is not makes the number of valid ones 0."""
    kinds = ((torch.int64, -100), (torch.int32, 0), (torch.int64, 1), (torch.int16, -100))
    for dtype, ignored in random.sample(kinds, 1):
        labels = torch.where(mask, torch.randint(2, 9, mask.shape, dtype=dtype), ignored)
        at = torch.where(mask.view(-1), -1, torch.arange(mask.numel()))
        wrong = labels.clone()
        if count < mask.numel():
            wrong.view(-1)[at[at >= 0][torch.randint(int((at >= 0).sum()), ())]] += 1
        apart = torch.stack([labels, labels], -1)[..., 0]  # not contiguous
        for given, counted in ((labels, count), (wrong, 0 if count < mask.numel() else count), (apart, count)):
            flag, holds = random.choice(((None, True), (torch.tensor(1), True), (torch.tensor(False), False)))
            each = random.choice((mask, mask.long() * 2))
            with mock.patch.object(plan_kernels, "available", return_value=True):
                pending = packing.PendingPlan(each, 4, True, flag, longest_first, (given, ignored))
            assert pending.count.wait(mask.device) == (counted if holds else 0)  # type: ignore[union-attr]
            assert all(map(torch.equal, pending._early, expected))  # type: ignore[arg-type]
            pending = packing.PendingPlan(mask, 4, False, flag, longest_first, (given, ignored))
            assert int(pending.count) == (counted if holds else 0)  # type: ignore[arg-type]
        can = plan_kernels.reads_labels(mask, labels)
        assert can == (dtype != torch.int16 and plan_kernels._MOST_READ > 0)
        assert not plan_kernels.reads_labels(mask, apart) or mask.numel() == 1
        assert not plan_kernels.reads_labels(mask, labels.view(-1)[1:])


def compare_one(mask: torch.Tensor, longest_first: bool) -> None:
    count = int(mask.sum())
    index, inverse, cu_seqlens, found = plan_kernels.plan(mask, 4, longest_first=longest_first)
    of_numbers = plan_kernels.plan(mask.long() * 3, 4, longest_first=longest_first)
    assert all(map(torch.equal, of_numbers, (index, inverse, cu_seqlens, found)))
    rows = (count // 4 + 1) * 4
    assert int(found) == count
    number = host_number.take()
    on_host = plan_kernels.plan(mask, 4, number, None, longest_first)
    for same, other in zip(on_host, (index, inverse, cu_seqlens, None), strict=True):
        assert same is other is None or torch.equal(same, other)
    assert number.wait(mask.device) == count
    for flag, flagged in ((torch.tensor([True]), count), (torch.tensor(0), 0), (torch.tensor(2.0), count)):
        number = host_number.take()
        *same, _ = plan_kernels.plan(mask, 4, number, flag, longest_first)
        assert all(map(torch.equal, same, (index, inverse, cu_seqlens)))
        assert number.wait(mask.device) == flagged
        assert int(plan_kernels.plan(mask, 4, None, flag, longest_first)[3]) == flagged
    compare_labels(mask, count, (index, inverse, cu_seqlens), longest_first)
    if count > 0 and rows <= mask.numel():
        index_wanted, *others = packing.plan_packed(mask, rows, longest_first)
        assert torch.equal(index[:count], index_wanted[:count]), (mask.shape, longest_first)
        assert mask.view(-1)[index].all(), "dead rows repeat a valid one"
        for kernel, expected in zip((inverse, cu_seqlens), others, strict=True):
            assert torch.equal(kernel.to(expected.dtype), expected), (mask.shape, longest_first)
