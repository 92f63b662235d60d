"""GELU as it is written where our passes run, in a kernel that Triton has compiled for the device."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import gelu

from half_precision import Shorter, all_numbers, gelu_and_gradient, wrongly_rounded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number(dtype: torch.dtype) -> None:
    x = all_numbers(dtype, "cuda").requires_grad_()
    results = []
    shorter = Shorter("cuda")
    for options in ({"post_grad_custom_post_pass": shorter}, {}):
        torch._dynamo.reset()
        out = torch.compile(gelu, options=options)(x)
        results.append((out, *torch.autograd.grad(out, x, torch.ones_like(out))))
    assert shorter.changed == [1, 1]
    for after, before, truth in zip(*results, gelu_and_gradient(x), strict=True):
        assert wrongly_rounded(after, truth) <= wrongly_rounded(before, truth)
        assert torch.equal(after.isnan(), before.isnan())
        assert torch.equal(after.isinf(), before.isinf())
