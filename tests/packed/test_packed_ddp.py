"""DistributedDataParallel with two processes over gloo: each packs its own batch, the gradients are those of both batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import Blocks, compile_, feature_batch, graphs_compiled, packing, steps
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from varlen_inductor.backend import register_by_name

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this build of PyTorch has no gloo"
)
WIDTH = 192  # two blocks are more than one bucket of a megabyte
LENGTHS = (([20, 9, 3], [2, 24, 5]), ([24, 1, 8], [24, 24, 24]))
"""Of two steps, for both processes. The second process runs the second step padded."""


def model_and_batches() -> tuple[Blocks, list[list[dict[str, Tensor]]]]:
    """The same in every process."""
    torch.manual_seed(5)
    return Blocks(WIDTH, layers=3), [[feature_batch(lengths, width=WIDTH) for lengths in both] for both in LENGTHS]


def loss_of(call: Any, batch: dict[str, Tensor]) -> Tensor:
    return (call(**batch) * batch["attention_mask"].unsqueeze(-1)).square().sum()


def process(rank: int, folder: str, order: str) -> None:
    torch.set_num_threads(1)
    register_by_name()
    store = distributed.FileStore(f"{folder}/store", 2)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model, batches = model_and_batches()
    options = {"bucket_cap_mb": 1}
    with packing("aot_eager"):
        if order == "compile(ddp)":
            call = compile_(DistributedDataParallel(model, **options))
        else:
            call = DistributedDataParallel(compile_(model), **options)
        gradients = []
        for both in batches:
            model.zero_grad()
            loss_of(call, both[rank]).backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    torch.save({"gradients": gradients, "steps": steps(), "compiled": graphs_compiled()}, f"{folder}/rank{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.parametrize("order", ["compile(ddp)", pytest.param("ddp(compile)", marks=pytest.mark.thorough)])
def test_two_processes(order: str, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(process, args=(str(tmp_path), order), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first["steps"] == (2, 0) and second["steps"] == (1, 1)
    # One piece for each bucket, of the packed graph and, in the second process, of the padded one.
    pieces = first["compiled"]
    assert pieces > 1
    assert second["compiled"] == 2 * pieces
    model, batches = model_and_batches()
    for step, both in enumerate(batches):
        model.zero_grad()
        for batch in both:
            loss_of(model, batch).backward()
        for mine, theirs, parameter in zip(first["gradients"][step], second["gradients"][step], model.parameters(), strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
            torch.testing.assert_close(2 * mine, parameter.grad, rtol=1e-4, atol=1e-4)  # DDP takes the mean over processes
