"""Three projections of the same packed rows on CUDA: one product, forward and backward, with gradients that are eager's."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code

from varlen_inductor import config
from varlen_inductor.backend import varlen_inductor as backend
from varlen_inductor.lowering import after_grad
from varlen_inductor.lowering.joined_products import join_products

DEVICE, WIDTH, HEADS, LENGTH, LAYERS = "cuda", 128, 2, 256, 3
LENGTHS = ([256, 30, 80, 1], [100, 256, 9, 60], [256, 200, 17, 3])


class Layer(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(3))
        self.out, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        q, k, v = (each(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for each in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None])
        return self.norm(x + self.out(y.transpose(1, 2).flatten(-2)))


class Model(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(bias) for _ in range(LAYERS))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, valid)
        return x


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_training(mode: str | None, autocast: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[int] = []

    def counted(graph: fx.Graph) -> int:
        joined.append(join_products(graph))
        return joined[-1]

    monkeypatch.setattr(after_grad, "PASSES", tuple(counted if each is join_products else each for each in after_grad.PASSES))
    torch.manual_seed(0)
    model = Model(bias).to(DEVICE, None if autocast else torch.bfloat16)
    exact = copy.deepcopy(model).double()
    compiled = torch.compile(model, backend=backend, mode=mode)
    with config.patch(strict=True, min_positions=0, kernels="triton"), inductor.patch(force_disable_caches=True):
        for lengths in LENGTHS * 2:
            torch.compiler.cudagraph_mark_step_begin()
            valid = torch.arange(LENGTH, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
            x = torch.randn(len(lengths), LENGTH, WIDTH, device=DEVICE, dtype=torch.float32 if autocast else torch.bfloat16)
            mine, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
            with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
                ours = compiled(mine, valid)
            truth = exact(theirs, valid)
            assert error(ours[valid], truth[valid]) < 2e-2
            cotangent = torch.randn_like(ours) * valid.unsqueeze(-1)
            ours.backward(cotangent)
            truth.backward(cotangent.double())
            assert error(mine.grad[valid], theirs.grad[valid]) < 4e-2
            for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
                # A key's bias changes all scores of a query alike: its gradient is zero but for rounding.
                if name.endswith("k.bias"):
                    assert p.grad.double().norm() < 2e-2 * (1 + dict(model.named_parameters())[name[:-6] + "v.bias"].grad.norm())
                else:
                    assert error(p.grad, q.grad) < 6e-2, name
            model.zero_grad()
            exact.zero_grad()
    assert joined == [LAYERS, LAYERS]


def test_weights_are_copied_at_once() -> None:
    """Of all layers in one kernel, their biases in another."""
    model = Model(True).to(DEVICE, torch.bfloat16).eval()
    valid = torch.arange(LENGTH, device=DEVICE) < torch.tensor(LENGTHS[0], device=DEVICE)[:, None]
    x = torch.randn(4, LENGTH, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad(), config.patch(strict=True, min_positions=0), inductor.patch(force_disable_caches=True):
        out, code = run_and_get_code(compiled, x, valid)
        assert error(out[valid], model(x, valid)[valid]) < 2e-2
    (body,) = (each for each in code if "extern_kernels.addmm(" in each)
    assert body.count("extern_kernels.addmm(") == 2 * LAYERS
    copies = [line for line in body.splitlines() if ".run(" in line and "triton_for_fused" in line]
    assert len(copies) == 2
