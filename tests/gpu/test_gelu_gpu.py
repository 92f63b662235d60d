"""GELU as it is written where our passes run, in a kernel that Triton has compiled for the device."""

from __future__ import annotations

import pytest
import torch
from torch import fx
from torch.nn.functional import gelu

from half_precision import all_numbers, gelu_and_gradient, wrongly_rounded
from varlen_inductor._compat_inductor import graph_pass_class
from varlen_inductor.lowering.short_erf import shorten_erf

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


class Shorter(graph_pass_class()):  # type: ignore[misc]
    def __init__(self) -> None:
        self.changed = 0

    def __call__(self, graph: fx.Graph) -> None:
        self.changed += shorten_erf(graph)

    def uuid(self) -> None:
        return None  # not to be cached


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_number(dtype: torch.dtype) -> None:
    x = all_numbers(dtype, "cuda").requires_grad_()
    results = []
    shorter = Shorter()
    for options in ({"post_grad_custom_post_pass": shorter}, {}):
        torch._dynamo.reset()
        out = torch.compile(gelu, options=options)(x)
        results.append((out, *torch.autograd.grad(out, x, torch.ones_like(out))))
    assert shorter.changed == 2
    for after, before, truth in zip(*results, gelu_and_gradient(x), strict=True):
        assert wrongly_rounded(after, truth) <= wrongly_rounded(before, truth)
        assert torch.equal(after.isnan(), before.isnan())
        assert torch.equal(after.isinf(), before.isinf())
