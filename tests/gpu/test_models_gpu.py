"""Small models through Inductor on CUDA: each form of the rewrite, several token counts, against eager."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from varlen_inductor import _compat, config
from varlen_inductor.backend import varlen_inductor as backend

LENGTH, WIDTH, HEADS = 256, 128, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(-2)
        x = x + self.out(y)
        return x + self.down(F.gelu(self.up(x)))


class Encoder(nn.Module):
    def __init__(self, *, causal: bool = False) -> None:
        super().__init__()
        self.blocks, self.causal = nn.ModuleList(Block() for _ in range(2)), causal

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        position = torch.arange(x.shape[1], device=x.device)
        visible = (position[None] < lengths[:, None])[:, None, None, :]
        if self.causal:
            visible = visible & (position[None] <= position[:, None])
        for block in self.blocks:
            x = block(x, visible)
        return x


class MaskedEncoder(Encoder):
    """The same under a mask that is an input, of which nothing is known."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        visible = lengths[:, None, None, :]
        for block in self.blocks:
            x = block(x, visible)
        return x


def batch(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    own = torch.tensor(lengths, device="cuda")
    mask = torch.arange(LENGTH, device="cuda")[None] < own[:, None]
    return torch.randn(len(lengths), LENGTH, WIDTH, device="cuda"), own, mask


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


BATCHES = ([256, 30, 80, 1], [100, 256, 9, 60], [256, 200, 17, 3])


@pytest.mark.parametrize("packing", ["model", "attention"])
@pytest.mark.parametrize("kind", ["prefix", "causal", "mask"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forms_against_eager(packing: str, kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = (MaskedEncoder() if kind == "mask" else Encoder(causal=kind == "causal")).cuda()
    exact = model.double()
    options = {"varlen.packing": packing, "varlen.strict": True}
    low = (MaskedEncoder() if kind == "mask" else Encoder(causal=kind == "causal")).cuda().to(dtype)
    low.load_state_dict(model.state_dict())
    compiled = torch.compile(low, backend=backend, options=options)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3  # float32 products may run in TF32
    for lengths in BATCHES:
        x, own, mask = batch(lengths)
        given = mask if kind == "mask" else own
        weight = torch.randn_like(x) * mask[..., None]
        ours = compiled(x.to(dtype), given)
        truth = exact(x.double(), given)
        assert (ours[~mask] == 0).all()
        assert error(ours[mask], truth[mask]) < tolerance
        low.zero_grad(), exact.zero_grad()
        (ours * weight.to(dtype)).sum().backward()
        (truth * weight.double()).sum().backward()
        for a, b in zip(low.parameters(), exact.parameters()):
            assert error(a.grad, b.grad) < 3 * tolerance  # type: ignore[arg-type]
    assert _compat.counters()["attention_rewritten"] >= 2
    assert packing == "attention" or _compat.counters()["packed_steps"] == len(BATCHES)


@pytest.mark.parametrize("packing", ["model", "attention"])
def test_cuda_graphs(packing: str) -> None:
    """Each rounded count is recorded once, and replays are right."""
    torch.manual_seed(0)
    model = MaskedEncoder().cuda().bfloat16()
    with config.patch(packing=packing, strict=True):
        compiled = torch.compile(model, backend=backend, mode="reduce-overhead")
        for _ in range(3):
            for lengths in BATCHES:
                x, _, mask = batch(lengths)
                torch.compiler.cudagraph_mark_step_begin()
                with torch.no_grad():
                    ours = compiled(x.bfloat16(), mask)
                    assert error(ours[mask], model(x.bfloat16(), mask)[mask]) < 2e-2
    for _ in range(3):
        for lengths in BATCHES:
            x, _, mask = batch(lengths)
            torch.compiler.cudagraph_mark_step_begin()
            weight = (torch.randn_like(x) * mask[..., None]).bfloat16()
            (compiled(x.bfloat16(), mask) * weight).sum().backward()
            found = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
            model.zero_grad()
            (model(x.bfloat16(), mask) * weight).sum().backward()
            for a, p in zip(found, model.parameters()):
                assert error(a, p.grad) < 5e-2  # type: ignore[arg-type]
            model.zero_grad()
