"""The masks of real models, as their own code computes them: what is proven, statically and with dynamic shapes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from mask_cases import summary
from torch import fx, nn

from varlen_inductor.patterns.attention import find_candidates
from varlen_inductor.patterns.functionalise import functionalise, written_storages
from varlen_inductor.patterns.masks import NotProven, prove
from varlen_inductor.patterns.normalise import normalise

B, S, E, H = 3, 8, 16, 4
INF = float("inf")


def attention_mask(left: bool = False) -> torch.Tensor:
    lengths, position = torch.tensor([S, 5, 3])[:, None], torch.arange(S)
    return (position >= S - lengths if left else position < lengths).long()


def masks_of(model: nn.Module, inputs: dict[str, Any], *, dynamic: bool = False, train: bool = False) -> list[str]:
    """The distinct proofs (or refusals) of all attentions of the model, in order."""
    found: list[str] = []

    def backend(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        graph = normalise(gm)
        functionalise(graph)
        opaque = written_storages(graph.graph)
        candidates, rejected = find_candidates(graph)
        found.extend(f"not attention: {r.reason}" for r in rejected)
        for c in candidates:
            try:
                proof = prove(c.mask_ops, c.layout, c.score_dtype, is_causal=c.is_causal, spelling=c.spelling, opaque=opaque)
                found.append(summary(proof).replace("\nno valid key: ", " / ").replace("\n", "; "))
            except NotProven as refusal:
                found.append(f"refused: {refusal.reason}")
        return gm.forward

    model.train(train)
    with warnings.catch_warnings(), torch.set_grad_enabled(train):
        warnings.simplefilter("ignore")
        torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic or None)(**inputs)
    assert found
    return list(dict.fromkeys(found))


SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": E,
    "num_hidden_layers": 2,
    "num_attention_heads": H,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
CACHELESS = dict(SIZES, num_key_value_heads=2, use_cache=False)
MODELS: dict[str, tuple[type, Callable[[], Any]]] = {
    "bert": (hf.BertModel, lambda: hf.BertConfig(**SIZES)),
    "roberta": (hf.RobertaModel, lambda: hf.RobertaConfig(**SIZES)),
    "distilbert": (
        hf.DistilBertModel,
        lambda: hf.DistilBertConfig(vocab_size=50, dim=E, n_layers=2, n_heads=H, hidden_dim=32, max_position_embeddings=32),
    ),
    "llama": (hf.LlamaModel, lambda: hf.LlamaConfig(**CACHELESS)),
    "mistral": (hf.MistralModel, lambda: hf.MistralConfig(sliding_window=4, **CACHELESS)),
    "modernbert": (
        hf.ModernBertModel,
        lambda: hf.ModernBertConfig(
            **SIZES, local_attention=6, global_attn_every_n_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2
        ),
    ),
    "t5": (hf.T5EncoderModel, lambda: hf.T5Config(vocab_size=50, d_model=E, d_kv=4, d_ff=32, num_layers=2, num_heads=H)),
    "deberta": (hf.DebertaV2Model, lambda: hf.DebertaV2Config(**SIZES)),
}

PADDING, CAUSAL, WINDOW = (f"key: attention_mask[b, k] != 0{rule}" for rule in ("", "; causal", "; window: q - 3 <= k <= q + 3"))
EXPECTED: dict[tuple[str, str], list[str]] = {
    ("bert", "sdpa"): [f"{PADDING} / zero"],
    ("bert", "eager"): [f"{PADDING} / uniform"],
    ("roberta", "sdpa"): [f"{PADDING} / zero"],
    ("roberta", "eager"): [f"{PADDING} / uniform"],
    ("distilbert", "sdpa"): [f"{PADDING} / zero"],
    ("distilbert", "eager"): [f"{PADDING} / uniform"],
    ("llama", "sdpa"): [f"{CAUSAL} / zero"],
    ("llama", "eager"): [f"{CAUSAL} / uniform"],
    ("mistral", "sdpa"): ["key: attention_mask[b, k] != 0; window: q - 3 <= k <= q / zero"],
    ("modernbert", "sdpa"): [f"{PADDING} / zero", f"{WINDOW} / zero"],
    ("modernbert", "eager"): [f"{PADDING} / uniform", f"{WINDOW} / uniform"],
}


@pytest.mark.parametrize(("name", "implementation", "dynamic"), [
    *((*pair, False) for pair in EXPECTED),
    *((name, "sdpa", True) for name in ("bert", "llama", "modernbert")),
])  # fmt: skip
def test_hugging_face(name: str, implementation: str, dynamic: bool) -> None:
    cls, make = MODELS[name]
    config = make()
    config._attn_implementation = implementation
    inputs = {"input_ids": torch.randint(3, 50, (B, S)), "attention_mask": attention_mask(left=name == "llama")}
    assert masks_of(cls(config), inputs, dynamic=dynamic) == EXPECTED[name, implementation]


def test_position_bias_is_refused() -> None:
    """T5: the mask is added to a learned bias that differs between heads."""
    cls, make = MODELS["t5"]
    for implementation in ("sdpa", "eager"):
        config = make()
        config._attn_implementation = implementation
        inputs = {"input_ids": torch.randint(3, 50, (B, S)), "attention_mask": attention_mask()}
        (reason,) = masks_of(cls(config), inputs, train=implementation == "sdpa")
        assert reason.startswith("refused: the mask adds a learned bias" if implementation == "sdpa" else "refused: the mask adds")
        assert "modeling_t5.py:" in reason


def test_mask_of_queries_and_keys() -> None:
    """DeBERTa multiplies the integer mask of queries and keys, so it must hold 0 and 1 only."""
    cls, make = MODELS["deberta"]
    inputs = {"input_ids": torch.randint(3, 50, (B, S)), "attention_mask": attention_mask()}
    assert masks_of(cls(make()), inputs) == [
        "key: attention_mask[b, k] != 0; query: attention_mask[b, q] != 0 / uniform; "
        "obligation: every value of `attention_mask` is 0 or 1"
    ]


def test_encoder_and_decoder() -> None:
    """BART: the decoder's own attention is causal, its attention to the encoder's states sees the encoder's padding."""
    config = hf.BartConfig(
        vocab_size=50,
        d_model=E,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=H,
        decoder_attention_heads=H,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=32,
        use_cache=False,
    )
    inputs = {
        "input_ids": torch.randint(3, 50, (B, S)),
        "attention_mask": attention_mask(),
        "decoder_input_ids": torch.randint(3, 50, (B, 5)),
        "decoder_attention_mask": torch.ones(B, 5, dtype=torch.long),
    }
    assert masks_of(hf.BartModel(config), inputs) == [
        f"{PADDING} / zero",
        "key: decoder_attention_mask[b, k] != 0; causal / zero",
    ]


# ------------------------------------------------------------------------------------------------------------- torch.nn


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, H, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor, pad: torch.Tensor, causal: torch.Tensor | None = None) -> torch.Tensor:
        return self.encoder(x, mask=causal, src_key_padding_mask=pad, is_causal=False)


class MultiHead(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(E, H, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: torch.Tensor, pad: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, key_padding_mask=pad, need_weights=self.need_weights)[0]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("boolean", [False, True])
@pytest.mark.parametrize("make", [Encoder, lambda: MultiHead(False), lambda: MultiHead(True)], ids=["encoder", "mha", "weights"])
def test_key_padding_mask_of_torch_modules(make: Callable[[], nn.Module], boolean: bool, train: bool) -> None:
    pad = attention_mask() == 0
    mask = pad if boolean else torch.zeros(B, S).masked_fill(pad, -INF)
    (proof,) = masks_of(make(), {"x": torch.randn(B, S, E), "pad": mask}, train=train)
    assert proof.startswith("key: not pad[b, k]" if boolean else "key: pad[b, k] == 0")
    assert boolean or train or "obligation: every value of `pad` is 0 or -inf" in proof or "nan" in proof


def test_encoder_with_a_causal_mask_of_its_own() -> None:
    """A causal mask that is an input is data: nobody knows what it holds."""
    causal = torch.ones(S, S, dtype=torch.bool).triu(1)
    inputs = {"x": torch.randn(B, S, E), "pad": attention_mask() == 0, "causal": causal}
    (reason,) = masks_of(Encoder(), inputs, train=True)
    assert reason == "refused: the mask is data for every pair of positions: `causal[q, k]`"


class CausalEncoder(Encoder):
    def forward(self, x: torch.Tensor, pad: torch.Tensor, causal: torch.Tensor | None = None) -> torch.Tensor:
        rule = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        if pad.dtype is torch.bool:
            rule = rule != 0
        return self.encoder(x, mask=rule, src_key_padding_mask=pad, is_causal=True)


@pytest.mark.parametrize("boolean", [False, True])
def test_causal_encoder(boolean: bool) -> None:
    pad = attention_mask() == 0
    mask = pad if boolean else torch.zeros(B, S).masked_fill(pad, -INF)
    (proof,) = masks_of(CausalEncoder(), {"x": torch.randn(B, S, E), "pad": mask}, train=True)
    assert proof == (
        "key: not pad[b, k]; causal / zero"
        if boolean
        else "key: pad[b, k] == 0; causal / zero; obligation: every value of `pad` is 0 or -inf"
    )


# ------------------------------------------------------------------------------------------------------ written by hand


class ByHand(nn.Module):
    """One attention with a mask made by ``make(mask, dtype)``."""

    def __init__(self, make: Callable[..., torch.Tensor], inline: bool = False) -> None:
        super().__init__()
        self.project, self.make, self.inline = nn.Linear(E, 3 * E), make, inline

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (H, -1)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        if not self.inline:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.make(mask, q.dtype))
        scores = q @ k.transpose(-1, -2) / 2
        scores = scores.masked_fill(self.make(mask, q.dtype), torch.finfo(scores.dtype).min)
        return scores.softmax(-1) @ v


BY_HAND: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "boolean": (lambda m, dtype: m[:, None, None, :].bool(), "key: mask[b, k] != 0 / zero"),
    "lengths": (
        lambda m, dtype: (torch.arange(m.shape[1]) < m.sum(1, keepdim=True))[:, None, None, :],
        "key: k < mask.sum(1, True)[b, 0] / zero; prefix",
    ),
    "additive": (
        lambda m, dtype: (1.0 - m[:, None, None, :].to(dtype)) * torch.finfo(dtype).min,
        "key: mask[b, k] != 0 / uniform; obligation: every value of `mask` is 0 or 1",
    ),
    "filled": (
        lambda m, dtype: torch.zeros(m.shape, dtype=dtype).masked_fill_(m == 0, -INF)[:, None, None],
        "key: mask[b, k] != 0 / zero",
    ),
    "queries too": (
        lambda m, dtype: (m[:, None, :, None] != 0) & (m[:, None, None, :] != 0),
        "key: mask[b, k] != 0; query: mask[b, q] != 0 / zero",
    ),
}


def _assigned(m: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Padding written into a causal mask, as older decoders do."""
    length, low = m.shape[1], torch.finfo(dtype).min
    causal = torch.full((length, length), low, dtype=dtype).triu(1)
    causal = causal[None, None].expand(m.shape[0], 1, -1, -1).clone()
    padding = (causal[..., :length] + m[:, None, None, :]) == 0
    causal[..., :length] = causal[..., :length].masked_fill(padding, low)
    return causal


def _prefix(m: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A causal mask whose first keys everybody sees."""
    causal = torch.ones(m.shape[1], m.shape[1], dtype=torch.bool).tril()
    causal[..., :2] = True
    return causal & m.bool()[:, None, None, :]


BY_HAND["assigned"] = (
    _assigned,
    "key: mask[b, k] != 0; causal / uniform; obligation: every value of `mask` is 0 or 1",
)
BY_HAND["prefix"] = (
    _prefix,
    "refused: the mask combines conditions on key, query and position otherwise than by `and`: `k`, `mask[b, k]`, `k - q`",
)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", list(BY_HAND))
def test_by_hand(name: str, dynamic: bool) -> None:
    make, expected = BY_HAND[name]
    inputs = {"x": torch.randn(B, S, E), "mask": attention_mask()}
    (proof,) = masks_of(ByHand(make), inputs, dynamic=dynamic)
    assert proof == expected


def test_scores_filled_inline() -> None:
    inputs = {"x": torch.randn(B, S, E), "mask": attention_mask()}
    assert masks_of(ByHand(lambda m, _: (m == 0)[:, None, None, :], inline=True), inputs) == ["key: mask[b, k] != 0 / uniform"]
