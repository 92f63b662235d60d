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
