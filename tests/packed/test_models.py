"""Whole models: every linear of the stack runs on valid tokens only, outputs and gradients are those of eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from packed_models import LENGTHS, VOCABULARY, B, Blocks, S, compare_with_eager, feature_batch, token_batch, with_labels
from torch import Tensor, nn

from varlen_inductor import runtime

transformers = pytest.importorskip("transformers")

LAYERS = 2
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def make(name: str, config: Any, attention: str = "sdpa") -> nn.Module:
    """A model of the transformers library, with random weights large enough that attention is not uniform."""
    config._attn_implementation = attention
    model: nn.Module = getattr(transformers, name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def bert(name: str = "BertModel", attention: str = "sdpa", **options: Any) -> nn.Module:
    return make(name, transformers.BertConfig(**SIZES, **NO_DROPOUT, **options), attention)


def llama(name: str = "LlamaModel", attention: str = "sdpa") -> nn.Module:
    return make(name, transformers.LlamaConfig(num_key_value_heads=2, use_cache=False, **SIZES), attention)


def gemma2() -> nn.Module:
    """Its scores are capped, and every other layer sees a window."""
    options = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0, "use_cache": False}
    return make("Gemma2ForCausalLM", transformers.Gemma2Config(**SIZES, **options), "eager")


def modernbert(attention: str = "sdpa") -> nn.Module:
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = transformers.ModernBertConfig(local_attention=6, global_attn_every_n_layers=2, **SIZES, **special)
    return make("ModernBertForMaskedLM", config, attention)


def bart(name: str = "BartModel", attention: str = "sdpa") -> nn.Module:
    layers = {f"{part}_layers": LAYERS for part in ("encoder", "decoder")}
    heads = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    inner = {f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")}
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=32, max_position_embeddings=64, use_cache=False, dropout=0.0, attention_dropout=0.0,
        **layers, **heads, **inner,
    )  # fmt: skip
    return make(name, config, attention)


BOTH = pytest.mark.parametrize("attention", ["sdpa", "eager"])
TRAIN = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
EACH = pytest.mark.parametrize(
    ("attention", "train"),
    [
        pytest.param("sdpa", True, id="sdpa-train"),
        pytest.param("eager", False, id="eager-eval"),
        pytest.param("eager", True, id="eager-train", marks=pytest.mark.thorough),
        pytest.param("sdpa", False, id="sdpa-eval", marks=pytest.mark.thorough),
    ],
)


def token_batches() -> list[dict[str, Tensor]]:
    return [token_batch(lengths) for lengths in LENGTHS]


def labelled_batches(classes: int = VOCABULARY) -> list[dict[str, Tensor]]:
    return [with_labels(batch, classes) for batch in token_batches()]


# --- encoders ----------------------------------------------------------------------------------------------------------------


@EACH
def test_bert(attention: str, train: bool) -> None:
    outcome = compare_with_eager(bert(attention=attention), token_batches(), train=train)
    assert (outcome.body.packed, outcome.body.padded, outcome.body.other) == (6 * LAYERS, 0, 1)  # the pooler is the other
    assert "position 0 of every sequence is valid" in outcome.reasons


@TRAIN
def test_bert_masked_language_model(train: bool) -> None:
    outcome = compare_with_eager(bert("BertForMaskedLM"), labelled_batches(), train=train)
    assert (outcome.body.packed, outcome.body.padded, outcome.body.other) == (6 * LAYERS + 2, 0, 0)
    assert outcome.body.unpacks == 1  # the logits, which the user is given


@BOTH
def test_bert_sequence_classification(attention: str) -> None:
    batches = [{**batch, "labels": torch.tensor([0, 1, 1])} for batch in token_batches()]
    model = bert("BertForSequenceClassification", attention, problem_type="single_label_classification")
    outcome = compare_with_eager(model, batches)
    assert (outcome.body.packed, outcome.body.padded, outcome.body.other) == (6 * LAYERS, 0, 2)


@TRAIN
def test_bert_token_classification(train: bool) -> None:
    outcome = compare_with_eager(bert("BertForTokenClassification", num_labels=3), labelled_batches(3), train=train)
    assert (outcome.body.packed, outcome.body.padded) == (6 * LAYERS + 1, 0)


@TRAIN
def test_bert_question_answering_is_left_exact(train: bool) -> None:
    """A span's logits (B, S) are compared across positions, padded ones too: their rows must be those of eager."""
    spans = {"start_positions": torch.tensor([1, 0, 2]), "end_positions": torch.tensor([3, 1, 2])}
    batches = [{**batch, **(spans if train else {})} for batch in token_batches()]
    outcome = compare_with_eager(bert("BertForQuestionAnswering"), batches, train=train)
    assert [site.form for site in outcome.report.rewritten] == ["exact"] * LAYERS
    assert all("padded rows are needed" in site.reason for site in outcome.report.rewritten)
    for found, batch in zip(outcome.outputs, batches):
        assert found["start_logits"][batch["attention_mask"] == 0].all()


def test_token_types() -> None:
    batches = [{**batch, "token_type_ids": torch.randint(0, 2, (B, S))} for batch in token_batches()]
    outcome = compare_with_eager(bert(), batches)
    assert (outcome.body.packed, outcome.body.padded) == (6 * LAYERS, 0)


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.thorough)])
def test_roberta(attention: str) -> None:
    """Its positions are a running sum over the tokens that are not padding: that stays outside, the stack does not."""
    model = make("RobertaForMaskedLM", transformers.RobertaConfig(**SIZES, **NO_DROPOUT, pad_token_id=1), attention)
    outcome = compare_with_eager(model, labelled_batches())
    assert (outcome.body.packed, outcome.body.padded) == (6 * LAYERS + 2, 0)


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.thorough)])
def test_distilbert(attention: str) -> None:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, dim=32, n_layers=LAYERS, n_heads=4, hidden_dim=48, max_position_embeddings=64,
        dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    outcome = compare_with_eager(make("DistilBertModel", config, attention), token_batches())
    assert (outcome.body.packed, outcome.body.padded) == (6 * LAYERS, 0)


@BOTH
def test_modernbert(attention: str) -> None:
    """Layers with a window and layers without share one plan."""
    outcome = compare_with_eager(modernbert(attention), labelled_batches())
    assert (outcome.body.packed, outcome.body.padded) == (4 * LAYERS + 2, 0)
    assert len(outcome.report.regions) == 1


def test_modernbert_with_holes_runs_padded() -> None:
    """A window measured in ranks is not one measured in positions where padding lies between tokens."""
    batches = labelled_batches()
    batches[1]["attention_mask"][0, 3:6] = 0
    batches[1]["labels"][0, 3:6] = -100
    compare_with_eager(modernbert(), batches, packed_steps=1)


def test_a_label_at_padding_runs_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is in the loss. Nothing is computed of the labels to find that out but what counts the tokens."""
    plans: list[torch.fx.GraphModule] = []
    drop = runtime._drop_unused_inputs
    monkeypatch.setattr(runtime, "_drop_unused_inputs", lambda plan: (plans.append(plan), drop(plan))[1])
    batches = labelled_batches(3) * 2
    batches[-1] = {**batches[-1], "labels": batches[-1]["labels"].clone()}
    batches[-1]["labels"][batches[-1]["attention_mask"] == 0] = 2
    compare_with_eager(bert("BertForTokenClassification", num_labels=3), batches, packed_steps=len(batches) - 1)
    assert [node.op for node in plans[0].graph.nodes] == ["placeholder", "placeholder", "output"]


# --- decoders ----------------------------------------------------------------------------------------------------------------


@EACH
def test_llama_fine_tuning(attention: str, train: bool) -> None:
    outcome = compare_with_eager(llama("LlamaForCausalLM", attention), labelled_batches(), train=train)
    assert (outcome.body.packed, outcome.body.padded) == (7 * LAYERS + 1, 0)


@TRAIN
def test_gemma2_fine_tuning(train: bool) -> None:
    outcome = compare_with_eager(gemma2(), labelled_batches(), train=train)
    assert outcome.body.packed
    assert len(outcome.report.rewritten) == LAYERS


def test_llama_hidden_states_with_any_padding() -> None:
    batches = [token_batch(LENGTHS[0], "left"), token_batch(LENGTHS[1])]
    outcome = compare_with_eager(llama(), batches)
    assert (outcome.body.packed, outcome.body.padded) == (7 * LAYERS, 0)


def test_llama_loss_with_left_padding_runs_padded() -> None:
    """The last padded position predicts the first token: its row is in the loss."""
    batches = [with_labels(token_batch(LENGTHS[0], "left")), *labelled_batches()]
    outcome = compare_with_eager(llama("LlamaForCausalLM"), batches, packed_steps=2)
    assert "labels of cross_entropy_loss are -100 at padded positions" in outcome.reasons


# --- encoder and decoder -----------------------------------------------------------------------------------------------------


def translation_batches() -> list[dict[str, Tensor]]:
    made = []
    for lengths in LENGTHS:
        decoder = token_batch([max(1, n // 2) for n in lengths[::-1]], size=16)
        made.append({**token_batch(lengths), **{f"decoder_{name}": value for name, value in decoder.items()}})
    return made


@EACH
def test_bart(attention: str, train: bool) -> None:
    outcome = compare_with_eager(
        bart(attention=attention), translation_batches(), train=train, masks={"last_hidden_state": "decoder_attention_mask"}
    )
    assert (outcome.body.packed, outcome.body.padded) == (6 * LAYERS + 10 * LAYERS, 0)
    assert len(outcome.report.regions) == 2
    assert len(outcome.report.rewritten) == 3 * LAYERS


def test_bart_with_a_loss() -> None:
    batches = []
    for batch in translation_batches():
        labels = torch.randint(0, VOCABULARY, batch["decoder_input_ids"].shape)
        batches.append({**batch, "labels": torch.where(batch["decoder_attention_mask"] == 1, labels, -100)})
    model = bart("BartForConditionalGeneration")
    outcome = compare_with_eager(model, batches, masks={"logits": "decoder_attention_mask"})
    assert (outcome.body.packed, outcome.body.padded) == (16 * LAYERS + 1, 0)


# --- PyTorch's own, and hand-written -------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` under a padding mask, True or minus infinity at padding."""

    def __init__(self, *, norm_first: bool, floating: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=norm_first, dropout=0.0)
        self.stack = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.floating = floating

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        padding = ~attention_mask
        if self.floating:
            padding = torch.zeros(padding.shape).masked_fill(padding, float("-inf"))
        return self.stack(x, src_key_padding_mask=padding)


def feature_batches(width: int = 32) -> list[dict[str, Tensor]]:
    return [feature_batch(lengths, width=width) for lengths in LENGTHS]


@TRAIN
@pytest.mark.parametrize(
    ("norm_first", "floating"),
    [
        pytest.param(False, False, id="post-bool"),
        pytest.param(True, True, id="pre-float"),
        pytest.param(False, True, id="post-float", marks=pytest.mark.thorough),
        pytest.param(True, False, id="pre-bool", marks=pytest.mark.thorough),
    ],
)
def test_transformer_encoder(train: bool, norm_first: bool, floating: bool) -> None:
    outcome = compare_with_eager(Encoder(norm_first=norm_first, floating=floating), feature_batches(), train=train)
    assert (outcome.body.packed, outcome.body.padded) == (4 * LAYERS, 0)


class Speech(nn.Module):
    """A convolution over time in front, then pre-norm blocks, then a mean over valid frames and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.front = nn.Conv1d(8, 32, 3, padding=1)
        self.position = nn.Parameter(torch.randn(S, 32))
        self.blocks = Blocks(layers=LAYERS)
        self.norm = nn.LayerNorm(32)
        self.classify = nn.Linear(32, 5)

    def forward(self, x: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        x = nn.functional.gelu(self.front(x.transpose(1, 2)).transpose(1, 2)) + self.position
        x = self.norm(self.blocks(x, attention_mask))
        weight = attention_mask.to(x.dtype).unsqueeze(-1)
        return x, self.classify((x * weight).sum(1) / weight.sum(1))


@TRAIN
def test_convolution_in_front(train: bool) -> None:
    outcome = compare_with_eager(Speech(), feature_batches(8), train=train)
    assert (outcome.body.packed, outcome.body.padded, outcome.body.other) == (4 * LAYERS, 0, 1)


class Unprojected(nn.Module):
    """Queries that are the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        query, value = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (x, self.value(x)))
        y = nn.functional.scaled_dot_product_attention(query, query, value, attn_mask=attention_mask[:, None, None, :])
        return self.out(y.transpose(1, 2).flatten(2))


@TRAIN
def test_queries_that_are_the_keys(train: bool) -> None:
    outcome = compare_with_eager(Unprojected(), feature_batches(), train=train)
    assert (outcome.body.packed, outcome.body.padded) == (2, 0)


# --- the sizes need not be known ----------------------------------------------------------------------------------------------

_ANY_SIZE: dict[str, Callable[[], nn.Module]] = {"bert": bert, "llama": llama, "encoder": lambda: Encoder(norm_first=True)}


@pytest.mark.parametrize("name", list(_ANY_SIZE))
def test_with_symbolic_sizes(name: str) -> None:
    batches: list[dict[str, Tensor]] = []
    for lengths, size in (([9, 4, 7], 12), ([3, 16], 20), ([31, 5, 8, 2], 40)):
        batches.append(feature_batch(lengths, size) if name == "encoder" else token_batch(lengths, size=size))
    outcome = compare_with_eager(_ANY_SIZE[name](), batches, dynamic=True)
    assert outcome.body.padded == 0
