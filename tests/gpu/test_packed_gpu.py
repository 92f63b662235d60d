"""Packed models on CUDA: graphs recorded once for each token count, numerics of a real model, memory, dropout, waits."""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from varlen_inductor import config
from varlen_inductor.backend import varlen_inductor as backend
from varlen_inductor.ops.backends import BACKENDS
from varlen_inductor.ops.problem import Problem

DEVICE = "cuda"
KERNELS = {backend.name: backend for backend in BACKENDS}
LENGTH, WIDTH, HEADS = 256, 128, 2
LENGTHS = ([256, 30, 80, 1], [100, 256, 9, 60], [256, 200, 17, 3])
"""Batches of 367, 425 and 476 tokens: 384, 512 and 512 rows."""
ROWS = {384, 512}


class Block(nn.Module):
    def __init__(self, width: int = WIDTH, heads: int = HEADS, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :], dropout_p=self.dropout)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + F.dropout(self.down(F.gelu(self.up(self.second(x)))), self.dropout)


class Encoder(nn.Module):
    def __init__(self, layers: int = 2, width: int = WIDTH, heads: int = HEADS, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, valid)
        return x


def batch(lengths: list[int], length: int = LENGTH, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    valid = torch.arange(length, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    return torch.randn(len(lengths), length, width, device=DEVICE, dtype=torch.bfloat16), valid


def error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


def steps() -> tuple[int, int]:
    return counters["varlen_inductor"]["packed_steps"], counters["varlen_inductor"]["padded_steps"]


def skip_without(kernels: str) -> None:
    """Skips the test where these kernels cannot run."""
    problem = Problem(torch.device(DEVICE, 0), torch.bfloat16, HEADS, HEADS, WIDTH // HEADS, WIDTH // HEADS)
    reason = None if kernels == "auto" else KERNELS[kernels].supports(problem)
    if reason is not None:
        pytest.skip(reason)


@contextmanager
def recordings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The CUDA graphs that are recorded inside the block."""
    from torch._inductor import cudagraph_trees

    made: list[object] = []
    construct = cudagraph_trees.CUDAGraphNode.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(None)
        construct(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cudagraph_trees.CUDAGraphNode, "__init__", __init__)
        yield made


# --- CUDA graphs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["model", "attention"])
@pytest.mark.parametrize("train", [True, False], ids=["train", "inference"])
def test_graphs_are_recorded_once(packing: str, train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each rounded count (in training for forward and backward each), in the attention-only form one for all."""
    torch.manual_seed(0)
    model = Encoder().to(DEVICE, torch.bfloat16)
    exact = copy.deepcopy(model).double()
    with config.patch(packing=packing, strict=True), torch.set_grad_enabled(train), recordings(monkeypatch) as made:
        compiled = torch.compile(model, backend=backend, mode="reduce-overhead")
        recorded = []
        for _ in range(4):
            for lengths in LENGTHS:
                x, valid = batch(lengths)
                torch.compiler.cudagraph_mark_step_begin()
                ours, truth = compiled(x, valid), exact(x.double(), valid)
                assert error(ours[valid], truth[valid]) < 2e-2
                if train:
                    cotangent = torch.randn_like(x) * valid.unsqueeze(-1)
                    ours.backward(cotangent)
                    truth.backward(cotangent.double())
                    for mine, theirs in zip(model.parameters(), exact.parameters(), strict=True):
                        assert error(mine.grad, theirs.grad) < 6e-2
                    model.zero_grad()
                    exact.zero_grad()
            recorded.append(len(made))
    sizes = len(ROWS) if packing == "model" else 1
    assert recorded[-1] == recorded[-2]
    # A graph that once ran after another, and once did not, is recorded for both.
    assert sizes * (1 + train) <= recorded[-1] <= 2 * sizes * (1 + train)
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert packing == "attention" or steps() == (12, 0)


@pytest.mark.parametrize("before", ["packed", "padded", "attention"])
def test_a_graph_of_the_users_own(before: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What it records is right for all data, whatever ran before; only where nothing padded ran are that operators, with a word."""
    monkeypatch.setattr(logging.getLogger("varlen_inductor"), "propagate", True)
    torch.manual_seed(0)
    model = Encoder().to(DEVICE, torch.bfloat16)
    compiled = torch.compile(model, backend=backend)
    with config.patch(packing="attention" if before == "attention" else "model"), torch.no_grad():
        x, valid = batch([LENGTH] * 4 if before == "padded" else LENGTHS[0])
        other = torch.cuda.Stream()
        other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            for _ in range(3):
                compiled(x, valid)
                model(x, valid)
        torch.cuda.current_stream().wait_stream(other)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = compiled(x, valid)
        assert ("a CUDA graph is being recorded" in caplog.text) == (before == "packed")
        for lengths in LENGTHS:
            fresh = batch(lengths)
            x.copy_(fresh[0])
            valid.copy_(fresh[1])
            graph.replay()
            assert error(found[valid], model(x, valid)[valid]) < 2e-2


@pytest.mark.parametrize("packing", ["model", "attention"])
def test_replays_draw_new_dropout(packing: str) -> None:
    torch.manual_seed(0)
    model = Encoder(layers=1, dropout=0.2).to(DEVICE, torch.bfloat16)
    with config.patch(packing=packing, strict=True):
        compiled = torch.compile(model, backend=backend, mode="reduce-overhead")
        x, valid = batch(LENGTHS[0])
        results = []
        for _ in range(6):
            torch.compiler.cudagraph_mark_step_begin()
            y = compiled(x, valid)
            results.append(y.detach().clone())
            y.sum().backward()
            model.zero_grad()  # gradients live in the graph's memory
    assert all(error(one[valid], other[valid]) > 1e-2 for one, other in zip(results, results[1:]))  # noqa: RUF007


# --- waits ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("packing", "allowed"), [("model", 1), ("attention", 0)])
def test_waits_for_the_device(packing: str, allowed: int) -> None:
    """One in the forward of a packed model, for the number of tokens; none in the attention-only form, none in a backward."""
    model = Encoder().to(DEVICE, torch.bfloat16)
    with config.patch(packing=packing, strict=True):
        compiled = torch.compile(model, backend=backend)
        batches = [batch(lengths) for lengths in LENGTHS]
        for x, valid in batches:
            compiled(x, valid).sum().backward()
        for x, valid in batches:
            with waits() as forward:
                y = compiled(x, valid)
            with waits() as backward:
                y.backward(torch.ones_like(y))
            assert len(forward) <= allowed, [str(one.message) for one in forward]
            assert not backward, [str(one.message) for one in backward]


@contextmanager
def waits() -> Iterator[list[warnings.WarningMessage]]:
    found: list[warnings.WarningMessage] = []
    torch.cuda.synchronize()
    mode = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            yield found
            torch.cuda.set_sync_debug_mode(mode)
            found += [one for one in caught if str(one.message).startswith("called a synchronizing")]
    finally:
        torch.cuda.set_sync_debug_mode(mode)


# --- numerics ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bert_is_as_exact_as_eager(attention: str) -> None:
    """In bfloat16, against float32: no farther off than eager is in bfloat16, but for a little."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = transformers.BertConfig(
        vocab_size=1000, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    shape._attn_implementation = attention
    exact = transformers.BertForMaskedLM(shape).to(DEVICE)
    eager, ours = (copy.deepcopy(exact).bfloat16() for _ in range(2))
    with config.patch(strict=True), full_precision():
        compiled = torch.compile(ours, backend=backend)
        for lengths in ([256, 12, 90, 200, 1, 33, 61, 128], [40, 256, 7, 7, 150, 80, 20, 99]):
            _, valid = batch(lengths)
            ids = torch.randint(5, 1000, valid.shape, device=DEVICE)
            given = {"input_ids": ids, "attention_mask": valid.long(), "labels": torch.where(valid, ids, -100)}
            results = []
            for call, model in ((compiled, ours), (eager, eager), (exact, exact)):
                model.zero_grad()
                made = call(**given)
                made.loss.backward()
                results.append([made.logits[valid].float(), *(p.grad.float() for p in model.parameters() if p.grad is not None)])
            for mine, usual, truth in zip(*results, strict=True):
                if truth.norm() > 1e-6:
                    assert error(mine, truth) <= 1.5 * error(usual, truth) + 2e-3
    assert steps() == (2, 0)


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 in the float32 reference."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# --- memory -----------------------------------------------------------------------------------------------------------------


class Scored(nn.Module):
    """An encoder whose loss is inside, so that nothing of the size of the padded batch leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.score = Encoder(layers=8, width=512, heads=8), nn.Linear(512, 1)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        score = self.score(self.encoder(x, valid)).squeeze(-1)
        return (score * valid).sum() / valid.sum()


def peak(compiled: Any, x: Tensor, valid: Tensor) -> int:
    """Bytes that a training step takes at most, beyond what was there before (weights, gradients, the batch)."""
    for _ in range(3):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        compiled(x, valid).backward()
        torch.cuda.synchronize()
        used = torch.cuda.max_memory_allocated() - before
    return used


def test_memory_of_a_step_falls_with_density() -> None:
    """Within 10% of proportional to the rows that are computed, and against plain Inductor at most that much more."""
    model = Scored().to(DEVICE, torch.bfloat16)
    length, rows = 1024, 16
    plain = torch.compile(model)
    x, valid = batch([length] * rows, length, 512)
    padded = peak(plain, x, valid)
    torch._dynamo.reset()
    with config.patch(strict=True):
        compiled = torch.compile(model, backend=backend)
        taken = {}
        for share in (0.25, 0.5, 0.75):
            lengths = [int(length * share) + (64 if i % 2 else -64) for i in range(rows)]
            x, valid = batch(lengths, length, 512)
            computed = (sum(lengths) // config.round_tokens + 1) * config.round_tokens
            taken[computed / (rows * length)] = peak(compiled, x, valid)
    assert steps()[1] == 0
    for share, used in taken.items():
        assert used <= 1.1 * share * padded, (share, used, padded)
    (low, little), *_, (high, much) = sorted(taken.items())
    assert little / much == pytest.approx(low / high, rel=0.1)


def test_memory_of_inference_falls_with_density() -> None:
    model = Scored().to(DEVICE, torch.bfloat16).eval().requires_grad_(False)
    with config.patch(strict=True), torch.no_grad():
        compiled = torch.compile(model, backend=backend)
        taken = []
        for share in (0.25, 0.75):
            x, valid = batch([int(1024 * share)] * 16, 1024, 512)
            for _ in range(2):
                torch.cuda.synchronize()
                before = torch.cuda.memory_allocated()
                torch.cuda.reset_peak_memory_stats()
                compiled(x, valid)
                torch.cuda.synchronize()
                used = torch.cuda.max_memory_allocated() - before
            taken.append(used)
    assert steps()[1] == 0
    assert taken[0] <= 0.4 * taken[1]


# --- what cuDNN launches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_training_step_with_cudnn(mode: str) -> None:
    """Its kernels alone in every layer, and, without CUDA graphs, where sequences lie once for each direction."""
    skip_without("cudnn")
    torch.manual_seed(0)
    model = Encoder(layers=3).to(DEVICE, torch.bfloat16)
    exact = copy.deepcopy(model).double()
    with config.patch(strict=True, kernels="cudnn"):
        compiled = torch.compile(model, backend=backend, mode=mode)
        for _ in range(4):
            for lengths in LENGTHS:
                x, valid = batch(lengths)
                cotangent = torch.randn_like(x) * valid.unsqueeze(-1)
                torch.compiler.cudagraph_mark_step_begin()
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    ours = compiled(x, valid)
                    ours.backward(cotangent)
                    torch.cuda.synchronize()
                truth = exact(x.double(), valid)
                truth.backward(cotangent.double())
                assert error(ours[valid], truth[valid]) < 2e-2
                for mine, theirs in zip(model.parameters(), exact.parameters(), strict=True):
                    assert error(mine.grad, theirs.grad) < 6e-2
                model.zero_grad()
                exact.zero_grad()
        launched = Counter({event.key: event.count for event in profile.key_averages()})
        places = sum(count for name, count in launched.items() if "_place" in name)
        finishes = sum(count for name, count in launched.items() if "_finish" in name)
    assert sum(count for name, count in launched.items() if "cudnn" in name) >= 6, launched
    assert (places, finishes) == (2 if mode == "default" else 6, 0), launched


# --- dropout that is computed again -----------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """Attention and a linear with dropout, linear in ``x``: queries and keys come from elsewhere, there are no biases."""

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.query_key, self.value, self.out = (nn.Linear(WIDTH, n * WIDTH, bias=False) for n in (2, 1, 1))

    def mix(self, x: Tensor, anchor: Tensor, valid: Tensor) -> Tensor:
        q, k = self.query_key(anchor).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        v = self.value(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :], dropout_p=0.4)
        return x + F.dropout(self.out(y.transpose(1, 2).flatten(-2)), 0.4)

    def forward(self, x: Tensor, anchor: Tensor, valid: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(self.mix, x, anchor, valid, use_reentrant=False) if self.recompute else self.mix(x, anchor, valid)
        return x


@pytest.mark.parametrize("recompute", [True, False], ids=["checkpoint", "plain"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("kernels", ["auto", "cudnn", "triton"])
def test_backward_drops_what_the_forward_dropped(kernels: str, recompute: bool, mode: str) -> None:
    """What is linear in x is its gradient times x; with other elements dropped in the backward it would not be."""
    skip_without(kernels)
    torch.manual_seed(0)
    model = Mixing(recompute).to(DEVICE, torch.bfloat16)
    with config.patch(strict=True, **({} if kernels == "auto" else {"kernels": kernels})):
        compiled = torch.compile(model, backend=backend, mode=mode)
        for _ in range(2):
            for lengths in LENGTHS:
                torch.compiler.cudagraph_mark_step_begin()
                (x, valid), (anchor, _) = batch(lengths), batch(lengths)
                x.requires_grad_()
                cotangent = torch.randn_like(x) * valid.unsqueeze(-1)
                y = compiled(x, anchor, valid)
                products = y.detach().double() * cotangent.double()
                y.backward(cotangent)
                assert x.grad is not None
                difference = products.sum() - (x.grad.double() * x.detach().double()).sum()
                model.zero_grad()  # gradients live in the graph's memory
                assert difference.abs() < 0.03 * products.norm()
    assert steps() == (6, 0)
