"""The plan kernels against the plan that plain operators make."""

from __future__ import annotations

import pytest
import torch

from varlen_inductor.ops import packing, plan_kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")

SHAPES = [(1, 1), (1, 7), (3, 5), (8, 1024), (33, 1500), (64, 512), (257, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("most_read", [2**22, 0], ids=["one kernel", "two kernels"])
@pytest.mark.parametrize("longest_first", [False, True], ids=["as they are", "longest first"])
def test_kernels_agree_with_operators(
    shape: tuple[int, int], share: float, most_read: int, longest_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_kernels, "_MOST_READ", most_read)
    mask = torch.rand(shape) < share
    of_numbers, of_mask = (plan_kernels.plan(x, 16, longest_first=longest_first) for x in (mask.cuda().long() * 3, mask.cuda()))
    assert all(map(torch.equal, of_numbers, of_mask))
    assert plan_kernels.available(mask.cuda())
    for kernel, expected in zip(torch.ops.varlen_inductor.plan_static(mask.cuda()), packing.plan_static(mask)):
        same = kernel.cpu() == expected
        if mask.any():
            assert same.all()
    pending = packing.PendingPlan(mask.cuda(), 16)
    count = int(pending.count)
    assert count == int(mask.sum())
    rows = pending.rows_for(count)
    if count > 0 and rows <= mask.numel():
        for extra in (0, 16):
            if rows + extra <= mask.numel():
                index, *found = packing.PendingPlan(mask.cuda(), 16, longest_first=longest_first).finish(count, rows + extra)
                index_wanted, *expected_plan = packing.plan_packed(mask, rows + extra, longest_first)
                assert torch.equal(index[:count].cpu(), index_wanted[:count]) and mask.view(-1)[index.cpu()].all()
                assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected_plan))


@pytest.mark.parametrize("shape", [(32, 512), (8, 2048), (1, 7), (600, 1030), (2000, 3)], ids=str)
def test_labels_are_looked_at_on_the_way(shape: tuple[int, int]) -> None:
    """One label at a padded position, wherever it is, makes the count 0, also where an operator has to look."""
    mask = torch.rand(shape, device="cuda") < 0.7
    mask[0, 0], mask[-1, -1] = True, False
    padded = (~mask).flatten().nonzero().flatten()
    count = int(mask.sum())
    for dtype, ignored in ((torch.int64, -100), (torch.int32, -100), (torch.int64, 0), (torch.int64, 1), (torch.int16, -100)):
        right = torch.where(mask, torch.randint(2, 2**14, shape, device="cuda", dtype=dtype), ignored)
        for given, wanted in ((right, count), (right.repeat_interleave(2, 1)[:, ::2], count), *[(right, 0)] * 3):
            if wanted == 0:
                given = right.clone()
                given.view(-1)[padded[torch.randint(padded.numel(), ())]] = 3
            for flag in (None, torch.ones(1, device="cuda"), torch.tensor(False, device="cuda")):
                for each in (mask, mask.long() * 2):
                    pending = packing.PendingPlan(each, 16, True, flag, True, (given, ignored))
                    assert pending.count.wait(mask.device) == (0 if flag is not None and not flag else wanted)  # type: ignore[union-attr]
