"""Models of every kind that the passes meet, tiny, and a way to run a pass on their graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import fx, nn

from varlen_inductor.patterns.normalise import normalise

BATCH, LENGTH, WIDTH, HEADS = 3, 8, 16, 4


def padding(left: bool = False) -> torch.Tensor:
    """(B, S) int64, 1 where a token is; rows of different lengths."""
    lengths = torch.tensor([LENGTH, 5, 3])[:, None]
    position = torch.arange(LENGTH)
    keep = position >= LENGTH - lengths if left else position < lengths
    return keep.long()


# ------------------------------------------------------------------------------------------------------ Hugging Face

_SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}


def _llama() -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(num_key_value_heads=2, use_cache=False, **_SIZES)


def _distilbert() -> transformers.PretrainedConfig:
    return transformers.DistilBertConfig(
        vocab_size=50, dim=WIDTH, n_layers=1, n_heads=HEADS, hidden_dim=32, max_position_embeddings=32
    )


_HF: dict[str, tuple[Any, Callable[[], transformers.PretrainedConfig]]] = {
    "bert": (transformers.BertModel, lambda: transformers.BertConfig(**_SIZES)),
    "roberta": (transformers.RobertaModel, lambda: transformers.RobertaConfig(**_SIZES)),
    "distilbert": (transformers.DistilBertModel, _distilbert),
    "llama": (transformers.LlamaModel, _llama),
}
HF_MODELS = tuple(_HF)


def hf_model(name: str, attention: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A model from a configuration, random weights, and its inputs."""
    cls, config = _HF[name]
    settings = config()
    settings._attn_implementation = attention
    ids = torch.randint(3, 50, (BATCH, LENGTH))
    return cls(settings), {"input_ids": ids, "attention_mask": padding()}


# ----------------------------------------------------------------------------------------------------------- torch.nn


class Encoder(nn.Module):
    def __init__(self, norm_first: bool = False, **kwargs: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False, **kwargs)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.encoder(x, src_key_padding_mask=hidden)


class MultiHead(nn.Module):
    """`returned`: the averaged weights leave the graph."""

    def __init__(self, need_weights: bool, returned: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, dropout=0.1)
        self.need_weights = need_weights
        self.returned = returned

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> Any:
        y, weights = self.attention(x, x, x, key_padding_mask=hidden, need_weights=self.need_weights)
        return (y, weights) if self.returned else y


def nn_inputs() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(BATCH, LENGTH, WIDTH), "hidden": padding() == 0}


# ---------------------------------------------------------------------------------------------------------- by hand


class ByHand(nn.Module):
    """A block whose attention is a function of query, key, value in (B, H, S, D) and the (B, S) boolean mask of tokens."""

    def __init__(self, attention: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.attention = attention

    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (t.view(batch, length, HEADS, -1).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        y = self.attention(q, k, v, valid)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


def hand_inputs() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(BATCH, LENGTH, WIDTH), "valid": padding().bool()}


# ---------------------------------------------------------------------------------------------------- running a pass


class Captured:
    """A Dynamo backend that applies passes and keeps the graphs before and after; `inner` runs what comes out."""

    def __init__(self, *passes: Callable[[fx.GraphModule], Any], inner: str | None = None) -> None:
        self.passes = passes
        self.inner = inner
        self.before: list[fx.GraphModule] = []
        self.after: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Any], **_: Any) -> Callable[..., Any]:
        new = normalise(gm)
        for change in self.passes:
            change(new)
        self.before.append(gm)
        self.after.append(new)
        if self.inner is None:
            return new.forward
        return torch._dynamo.lookup_backend(self.inner)(new, inputs)

    @property
    def graph(self) -> fx.Graph:
        (gm,) = self.after
        return gm.graph


def captured(model: Callable[..., Any], *passes: Callable[[fx.GraphModule], Any], **inputs: Any) -> fx.GraphModule:
    """The one normalised graph of a model or function."""
    backend = Captured(*passes)
    torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    (gm,) = backend.after
    return gm


def targets(graph: fx.Graph) -> list[str]:
    """The operators of a graph, in order."""
    return [str(n.target) for n in graph.nodes if n.op == "call_function"]


@contextlib.contextmanager
def nothing() -> Iterator[None]:
    yield


def assert_same(
    model: nn.Module,
    inputs: dict[str, Any],
    backend: Captured,
    *,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = nothing,
    backward: bool = True,
    tolerance: float = 1e-5,
    **compile_options: Any,
) -> None:
    """Output, gradients and buffers of the compiled model are those of eager.  Both draw the same random numbers."""
    results = []
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for function in (model, torch.compile(model, backend=backend, **compile_options)):
        model.load_state_dict(state)
        model.zero_grad()
        torch.manual_seed(7)
        with context():
            outputs = _tensors(function(**{name: value.clone() for name, value in inputs.items()}))
        if backward:
            sum((t.float() * torch.linspace(-1, 1, t.numel()).view(t.shape)).sum() for t in outputs).backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        results.append((outputs, {n: g.clone() for n, g in gradients.items()}, buffers))
    (eager, eager_gradients, eager_buffers), (ours, our_gradients, our_buffers) = results
    assert backend.after, "nothing was compiled"
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, equal_nan=True)
    assert our_gradients.keys() == eager_gradients.keys()
    for name, gradient in eager_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, atol=tolerance, rtol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(our_buffers, eager_buffers)


def _tensors(value: Any) -> list[torch.Tensor]:
    values = tuple(value.values()) if isinstance(value, dict) else value
    return [t for t in torch.utils._pytree.tree_leaves(values) if t is not None]


def text(graph: fx.Graph) -> str:
    """The operators of a graph, one per line, without what differs between versions."""

    def show(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(show, value)) + "]"
        return f"%{value}" if isinstance(value, fx.Node) else "MAX" if value == 2**63 - 1 else str(value)

    lines = []
    for node in graph.nodes:
        if node.op == "call_function":
            keywords = {k: v for k, v in node.kwargs.items() if k not in ("device", "pin_memory", "layout")}
            arguments = [*map(show, node.args), *(f"{k}={show(v)}" for k, v in keywords.items())]
            lines.append(f"%{node} = {node.target}({', '.join(arguments)})")
        elif node.op == "output":
            lines.append(f"return {show(node.args[0])}")
    return "\n".join(lines)
