"""Activation checkpointing inside of the model: packed through, and still computed again in the backward."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from packed_models import (
    LENGTHS,
    VOCABULARY,
    Blocks,
    assert_gradients_close,
    assert_rows_close,
    compare_with_eager,
    compile_,
    feature_batch,
    graphs_compiled,
    packing,
    steps,
    token_batch,
    with_labels,
)
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import varlen_inductor
from varlen_inductor import _compat


class Recomputed(Blocks):
    """Blocks that are computed again in the backward, each on its own, or not."""

    def __init__(self, dropout: float = 0.0, recompute: bool = True, autocast: bool = False, **options: Any) -> None:
        super().__init__(dropout=dropout)
        self.recompute, self.autocast = recompute, autocast
        self.options = {"use_reentrant": False, **options}

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        for block in self.blocks:
            call = partial(self.under_autocast, block) if self.autocast else block
            x = checkpoint(call, x, attention_mask, **self.options) if self.recompute else call(x, attention_mask)
        return x

    def under_autocast(self, block: nn.Module, x: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return block(x, attention_mask).float()


def batches() -> list[dict[str, Tensor]]:
    return [feature_batch(lengths) for lengths in LENGTHS]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "static"])
def test_blocks(reentrant: bool, dynamic: bool | None) -> None:
    outcome = compare_with_eager(Recomputed(use_reentrant=reentrant), batches(), dynamic=dynamic)
    assert (outcome.body.packed, outcome.body.padded, outcome.body.checkpoints) == (8, 0, 2)
    assert [site.source.split()[0] for site in outcome.report.rewritten] == ["blocks.0", "blocks.1"]


def test_inference() -> None:
    outcome = compare_with_eager(Recomputed(), batches(), train=False)
    assert (outcome.body.packed, outcome.body.padded) == (8, 0)


def test_one_checkpoint_in_another() -> None:
    class Nested(Recomputed):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return checkpoint(super().forward, x, attention_mask, use_reentrant=False)

    outcome = compare_with_eager(Nested(), batches())
    assert (outcome.body.packed, outcome.body.padded, outcome.body.checkpoints) == (8, 0, 1)


@pytest.mark.parametrize(
    ("inner", "dropout"), [("aot_eager", 0.0), ("aot_eager", 0.3), pytest.param("inductor", 0.3, marks=pytest.mark.thorough)]
)
def test_gradients_are_those_without(inner: str, dropout: float) -> None:
    """What is computed again must be the same, dropout too: gradients to the bit."""
    model = Recomputed(dropout)
    batch = batches()[0]
    results = []
    with packing(inner):
        for recompute in (True, False):
            ours = copy.deepcopy(model)
            ours.recompute = recompute
            compiled = compile_(ours)
            torch.manual_seed(3)
            y = compiled(**batch)
            (y * batch["attention_mask"].unsqueeze(-1)).square().sum().backward()
            results.append([y.detach(), *(parameter.grad for parameter in ours.parameters())])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)
    assert steps() == (2, 0) and graphs_compiled() == 2


def test_little_is_kept_for_the_backward() -> None:
    """Linears and attention are in the backward once more, and what the forward hands over is the input of each block."""
    kept: dict[bool, int] = {}
    linears: dict[bool, int] = {}
    recompute = True

    def forward(gm: fx.GraphModule, example_inputs: Any) -> Any:
        outputs = gm.graph.find_nodes(op="output")[0].args[0]
        kept[recompute] = sum(getattr(node, "op", "") == "call_function" for node in outputs)
        return gm

    def backward(gm: fx.GraphModule, example_inputs: Any) -> Any:
        linears[recompute] = sum(str(node.target) in ("aten.mm.default", "aten.addmm.default") for node in gm.graph.nodes)
        return gm

    compiler = aot_autograd(fw_compiler=forward, bw_compiler=backward, partition_fn=min_cut_rematerialization_partition)
    torch._dynamo.register_backend(lambda gm, inputs: compiler(gm, inputs), name="varlen_partitions")  # type: ignore[arg-type]
    with packing("varlen_partitions"):
        for recompute in (True, False):
            model = Recomputed(recompute=recompute)
            compile_(model)(**batches()[0]).sum().backward()
    assert linears[True] >= linears[False] + 6
    assert kept[True] < kept[False] / 2


# --- what is left alone -----------------------------------------------------------------------------------------------------


def save_matmuls(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op == torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE


def test_selective_checkpoint_is_left_alone() -> None:
    chosen = partial(create_selective_checkpoint_contexts, save_matmuls)
    outcome = compare_with_eager(Recomputed(context_fn=chosen), batches(), packed_steps=0)
    assert [site.decision for site in outcome.report.sites] == ["kept", "kept"]
    assert all("it chooses by itself what to save (context_fn)" in site.reason for site in outcome.report.sites)


def test_autocast_inside_is_left_alone() -> None:
    outcome = compare_with_eager(Recomputed(autocast=True), batches(), packed_steps=0, tolerance=3e-2)
    assert all("it enters autocast" in site.reason for site in outcome.report.kept)


@pytest.mark.skipif(not _compat.DYNAMO_TRACES_AUTOCAST_CALLS, reason="Dynamo of this PyTorch cannot trace such a graph")
def test_autocast_outside() -> None:
    class Outside(Recomputed):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x, attention_mask).float()

    outcome = compare_with_eager(Outside(), batches(), tolerance=3e-2)
    assert (outcome.body.packed, outcome.body.padded, outcome.body.checkpoints) == (8, 0, 2)


def test_attention_only() -> None:
    """The form that stays in one graph, where the operator is called without Dynamo in between."""
    outcome = compare_with_eager(Recomputed(), batches(), knobs={"packing": "attention"}, packed_steps=0)
    assert [site.form for site in outcome.report.rewritten] == ["zero rows", "zero rows"]


@pytest.mark.thorough
def test_pass_form() -> None:
    model = Recomputed()
    batch = batches()[0]
    ours = copy.deepcopy(model)
    compiled = torch.compile(ours, options={"pre_grad_custom_pass": varlen_inductor.VarlenPass()})
    for call in (compiled, model):
        (call(**batch) * batch["attention_mask"].unsqueeze(-1)).square().sum().backward()
    assert_gradients_close(ours, model)
    assert torch._dynamo.utils.counters["varlen_inductor"]["attention_rewritten"] == 2
    assert graphs_compiled() == 1


class Counting(Recomputed):
    """Writes to a buffer while it is computed, for the first time or again."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = checkpoint(self.normalised, x, use_reentrant=False)
        return super().forward(x, attention_mask)

    def normalised(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, 1)).view_as(x)


def test_buffers_written_inside() -> None:
    """As plain Dynamo: what it does not capture runs uncompiled, and what we rewrite is right."""
    ours, model = Counting(), Counting()
    ours.load_state_dict(model.state_dict())
    with packing():
        compiled = compile_(ours)
        for batch in batches():
            assert_rows_close(compiled(**batch), model(**batch), batch["attention_mask"], 2e-5)
    torch.testing.assert_close(ours.norm.running_mean, model.norm.running_mean)
    assert graphs_compiled() > 0


# --- transformers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_gradient_checkpointing_of_transformers(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
    }
    if kind == "bert":
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, **dropout, use_cache=False))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, use_cache=False))
    model.gradient_checkpointing_enable()
    outcome = compare_with_eager(model, [with_labels(token_batch(lengths)) for lengths in LENGTHS])
    assert (outcome.body.packed, outcome.body.padded) == (14 if kind == "bert" else 15, 0)
    assert outcome.body.checkpoints == 2
