"""Packing operators against plain indexing, their gradients, and what they do with dead and padded rows."""

from __future__ import annotations

import pytest
import torch

from varlen_inductor.ops import packing

ops = torch.ops.varlen_inductor

MASKS = {
    "right": torch.arange(7)[None] < torch.tensor([7, 3, 1, 5])[:, None],
    "left": torch.arange(7)[None] >= torch.tensor([0, 4, 6, 2])[:, None],
    "holes": torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1, 1]], dtype=torch.bool),
    "empty row": torch.arange(7)[None] < torch.tensor([4, 0, 2])[:, None],
    "one token": torch.arange(7)[None] < torch.tensor([0, 1, 0])[:, None],
    "all valid": torch.ones(3, 7, dtype=torch.bool),
    "none valid": torch.zeros(3, 7, dtype=torch.bool),
}


def plans(mask: torch.Tensor) -> dict[str, tuple[torch.Tensor, ...]]:
    found = {"static": ops.plan_static(mask)}
    if mask.any():
        found["packed"] = packing.plan_packed(mask, int(mask.sum()) + 3)
        found["longest first"] = packing.plan_packed(mask, int(mask.sum()) + 3, longest_first=True)
    return found


def valid_positions(mask: torch.Tensor, kind: str) -> torch.Tensor:
    """In the order of packed rows."""
    rows = list(range(len(mask)))
    if kind == "longest first":
        rows.sort(key=lambda b: -int(mask[b].sum()))
    return torch.tensor([b * mask.shape[1] + s for b in rows for s in range(mask.shape[1]) if mask[b, s]], dtype=torch.int64)


@pytest.mark.parametrize("name", MASKS)
def test_plan_names_the_valid_positions_in_order(name: str) -> None:
    mask = MASKS[name]
    for kind, (index, inverse, cu_seqlens) in plans(mask).items():
        positions = valid_positions(mask, kind)
        count = len(positions)
        assert torch.equal(index[:count], positions)
        assert torch.equal(inverse[positions], torch.arange(count))
        assert (inverse[~mask.reshape(-1)] < 0).all()
        lengths = mask.sum(1).sort(descending=True).values if kind == "longest first" else mask.sum(1)
        expected = [0, *lengths.cumsum(0).tolist()] + ([] if kind == "static" else [index.numel()])
        assert cu_seqlens.tolist() == expected and cu_seqlens.dtype == torch.int32
        if count:
            assert set(index[count:].tolist()) <= set(positions.tolist()), "dead rows repeat a valid one"


@pytest.mark.parametrize("name", MASKS)
def test_unpack_undoes_pack_and_fills(name: str) -> None:
    mask = MASKS[name]
    padded = torch.randn(mask.numel(), 2, 3)
    padded[~mask.reshape(-1)] = torch.nan
    for index, inverse, _ in plans(mask).values():
        back = ops.unpack(ops.pack(padded, index, inverse), index, inverse, -2.5, False)
        assert torch.equal(back[mask.reshape(-1)], padded[mask.reshape(-1)])
        assert (back[~mask.reshape(-1)] == -2.5).all()
        repeated = ops.unpack(ops.pack(padded, index, inverse), index, inverse, 0.0, True)
        assert repeated.isfinite().all()
        if not mask.any():
            assert not repeated.any(), "no row is valid, and so none is copied"


@pytest.mark.parametrize("name", ["right", "holes", "empty row"])
def test_gradients_ignore_dead_and_padded_rows(name: str) -> None:
    mask = MASKS[name]
    flat = mask.reshape(-1)
    padded = torch.randn(mask.numel(), 3, requires_grad=True)
    for kind, (index, inverse, _) in plans(mask).items():
        packed = ops.pack(padded, index, inverse)
        weights = torch.randn_like(packed)
        (grad,) = torch.autograd.grad((packed * weights).sum(), padded)
        count = int(mask.sum())
        positions = valid_positions(mask, kind)
        assert torch.equal(grad[positions], weights[:count]) and (grad[~flat] == 0).all()

        source = torch.randn(index.numel(), 3, requires_grad=True)
        for repeat in (False, True):
            cotangent = torch.randn(mask.numel(), 3)
            cotangent[~flat] = torch.nan
            (grad,) = torch.autograd.grad(ops.unpack(source, index, inverse, 0.0, repeat), source, cotangent)
            assert torch.equal(grad[:count], cotangent[positions]) and (grad[count:] == 0).all()


def test_opcheck() -> None:
    mask = MASKS["holes"]
    index, inverse, _ = packing.plan_packed(mask, 16)
    padded = torch.randn(mask.numel(), 2, requires_grad=True)
    packed = torch.randn(16, 2, requires_grad=True)
    torch.library.opcheck(ops.pack.default, (padded, index, inverse))
    torch.library.opcheck(ops.unpack.default, (packed, index, inverse, 1.5, False))
    torch.library.opcheck(ops.unpack.default, (packed, index, inverse, 0.0, True))
    torch.library.opcheck(ops.unpack_adjoint.default, (padded, index, inverse))
    torch.library.opcheck(ops.plan_static.default, (mask,))
    torch.library.opcheck(ops.plan_in_place.default, (mask,))
    torch.library.opcheck(ops.row_offsets.default, (inverse, 3, 7, 1))


@pytest.mark.parametrize("name", ["right", "empty row", "all valid", "none valid"])
def test_in_place_plan_moves_nothing(name: str) -> None:
    mask = MASKS[name]
    index, inverse, cu_seqlens, used = ops.plan_in_place(mask)
    batch, length = mask.shape
    assert torch.equal(index, torch.arange(mask.numel()))
    assert torch.equal(inverse >= 0, mask.reshape(-1)) and torch.equal(inverse[inverse >= 0], index[mask.reshape(-1)])
    assert (-1 - inverse[inverse < 0]).tolist() == [b * length for b in range(batch) for v in mask[b] if not v]
    starts = [(b * length, b * length + int(mask[b].sum())) for b in range(batch)]
    assert cu_seqlens.tolist() == [x for pair in starts for x in pair] + [batch * length]
    assert used.tolist() == [x for b in range(batch) for x in (int(mask[b].sum()), 0)]


def test_row_offsets() -> None:
    assert ops.row_offsets(torch.zeros(1), 3, 5, 2).tolist() == [0, 5, 10, 15, 15, 15]
