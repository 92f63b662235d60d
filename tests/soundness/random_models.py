"""Random models over padded batches, and random batches for them.

A model is a list of blocks on a stream of tokens ``x`` (B, S, E), then heads that make the outputs. Each block and each head is a
small function of the layers in `Layers`; to teach the generator something new, add a function to a table below.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, HEADS, CLASSES = 8, 2, 5


class Batch(NamedTuple):
    """What a model is given: tokens and their mask, another mask of the same tokens, and a second stream with its own mask."""

    x: Tensor
    valid: Tensor
    other: Tensor
    memory: Tensor
    memory_valid: Tensor
    labels: Tensor


class Layers(nn.Module):
    """The parameters of one block."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.query, self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.rms = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.mha = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.score, self.classes = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, CLASSES)
        self.position = nn.Parameter(torch.randn(length, WIDTH))
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.register_buffer("table", torch.randn(length, WIDTH))


# --- masks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskKind:
    """How an attention spells its mask.

    ``which``: the key mask. ``form``: what it is made into. ``shape``: what else it hides. ``spelling``: how attention is
    written.
    """

    which: str
    form: str
    shape: str
    spelling: str


def by_length(valid: Tensor) -> Tensor:
    """As many positions of each row, but the first ones."""
    return torch.arange(valid.shape[1])[None] < valid.sum(1)[:, None]


def _visible(kind: MaskKind, batch: Batch, queries: int) -> Tensor:
    """Bool (B, 1, 1 or S_q, S_k), True where a key is visible."""
    valid = {"valid": batch.valid, "other": batch.other, "memory": batch.memory_valid}[kind.which]
    visible = valid[:, None, None, :]
    keys = valid.shape[1]
    q, k = torch.arange(queries)[:, None], torch.arange(keys)[None]
    if kind.form == "lengths":
        visible = by_length(valid)[:, None, None, :]
    elif kind.form == "integers":
        visible = (valid.long() != 0)[:, None, None, :]
    if kind.shape == "causal":
        visible = visible & (k <= q)
    elif kind.shape == "window":
        visible = visible & (k >= q - 2) & (k <= q + 1)
    elif kind.shape == "sliding causal":
        visible = visible & (k <= q) & (q - k < 3)
    elif kind.shape == "queries":
        visible = visible & batch.valid[:, None, :, None]
    return visible


def _additive(kind: MaskKind, visible: Tensor, dtype: torch.dtype) -> Tensor:
    lowest = float("-inf") if kind.form == "-inf" else torch.finfo(dtype).min
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, lowest)


def _attend(m: Layers, kind: MaskKind, batch: Batch, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in the spelling of ``kind`` from (B, S, E) to (B, S_q, E)."""
    b, s, e = query.shape
    visible = _visible(kind, batch, s)
    q, k, v = (t.view(b, -1, HEADS, e // HEADS).transpose(1, 2) for t in (query, key, value))
    if kind.spelling == "sdpa":
        mask = visible if kind.form in ("bool", "lengths", "integers") else _additive(kind, visible, query.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    elif kind.spelling == "grouped":
        k, v = (t[:, :1].expand(-1, HEADS, -1, -1).reshape(q.shape[0], HEADS, -1, q.shape[-1]) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    elif kind.spelling == "time first":
        q, k, v = (t.transpose(0, 1).reshape(-1, b * HEADS, e // HEADS).transpose(0, 1) for t in (query, key, value))
        mask = visible.expand(b, HEADS, -1, -1).reshape(b * HEADS, -1, k.shape[1])
        weights = (torch.bmm(q * (e // HEADS) ** -0.5, k.transpose(1, 2))).masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1)
        return torch.bmm(weights, v).transpose(0, 1).reshape(s, b, e).transpose(0, 1)
    elif kind.spelling == "folded":
        q, k, v = (t.reshape(b * HEADS, -1, e // HEADS) for t in (q, k, v))
        scores = torch.bmm(q, k.transpose(1, 2)).view(b, HEADS, s, -1) * (e // HEADS) ** -0.5
        scores = scores.masked_fill(~visible, torch.finfo(query.dtype).min)
        y = torch.bmm(scores.softmax(-1).view(b * HEADS, s, -1), v).view(b, HEADS, s, -1)
    else:
        scores = q @ k.transpose(-1, -2) / (e // HEADS) ** 0.5
        if kind.form in ("bool", "lengths", "integers"):
            scores = torch.where(visible, scores, torch.finfo(query.dtype).min)
        else:
            scores = scores + _additive(kind, visible, query.dtype)
        y = scores.softmax(-1) @ v
    return y.transpose(1, 2).reshape(b, s, e)


class Attention:
    """A block: residual attention, on its own tokens or on the second stream."""

    def __init__(self, rng: random.Random) -> None:
        cross = rng.random() < 0.15
        which = "memory" if cross else rng.choice(["valid"] * 6 + ["other"])
        shapes = ["none"] * 4 + (["queries"] if cross else ["causal", "causal", "window", "sliding causal", "queries"])
        spelling = rng.choice(["sdpa"] * 3 + ["folded", "decomposed", "grouped", "time first"])
        form = rng.choice(["bool", "bool", "lengths", "integers", "finfo", "-inf"])
        self.kind = MaskKind(which, form, rng.choice(shapes), spelling)
        self.fused = rng.random() < 0.4
        self.mha = not cross and rng.random() < 0.1
        self.checkpointed = rng.random() < 0.1

    def __call__(self, m: Layers, x: Tensor, batch: Batch) -> Tensor:
        if self.checkpointed:
            return checkpoint(self._block, m, x, batch, use_reentrant=False)  # type: ignore[no-any-return]
        return self._block(m, x, batch)

    def _block(self, m: Layers, x: Tensor, batch: Batch) -> Tensor:
        source = batch.memory if self.kind.which == "memory" else x
        if self.mha:
            hidden = ~{"valid": batch.valid, "other": batch.other}[self.kind.which]
            return x + m.mha(x, x, x, key_padding_mask=hidden, need_weights=False)[0]
        if self.fused and source is x:
            query, key, value = m.qkv(x).chunk(3, -1)
        else:
            query, key, value = m.query(x), m.key(source), m.value(source)
        return x + m.linear(_attend(m, self.kind, batch, query, key, value))

    def __repr__(self) -> str:
        name = "mha" if self.mha else f"attention({self.kind})"
        return f"checkpointed {name}" if self.checkpointed else name


# --- blocks ----------------------------------------------------------------------------------------------------------


def _at(batch: Batch) -> Tensor:
    return batch.valid[..., None]


def _heads(m: Layers, x: Tensor) -> Tensor:
    b, s, e = x.shape
    y = x.view(b, s, HEADS, e // HEADS)
    return (y.transpose(2, 3).reshape(b, s, e) + (y * m.scale.view(HEADS, -1)).flatten(2)) * 0.5


def _rotary(m: Layers, x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] * (0.5 ** torch.arange(half))[None]
    cos, sin = (f(torch.cat([angle, angle], -1)).to(x.dtype) for f in (torch.cos, torch.sin))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def _shifted(x: Tensor) -> Tensor:
    return x + F.pad(x[:, :-1], (0, 0, 1, 0))


def _set_first(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0.5
    return y


def _set_padding(x: Tensor, valid: Tensor) -> Tensor:
    y = x * 1.0
    y[~valid] = 0
    return y


def _add_in_place(m: Layers, x: Tensor) -> Tensor:
    y = m.linear(x)
    z = y[..., :2].sum(-1, keepdim=True)
    y += x
    y.mul_(0.5)
    return y + z


def _masked_mean(x: Tensor, batch: Batch) -> Tensor:
    at = _at(batch).to(x.dtype)
    return (x * at).sum(1, keepdim=True) / at.sum(1, keepdim=True).clamp(min=1)


Block = Callable[[Layers, Tensor, Batch], Tensor]

ROW_WISE: dict[str, Block] = {
    "linear": lambda m, x, b: x + m.linear(x).tanh(),
    "mlp": lambda m, x, b: x + m.down(F.gelu(m.up(x))),
    "gated": lambda m, x, b: x + torch.mul(*m.up(m.norm(x)).chunk(2, -1)),
    "norm": lambda m, x, b: m.norm(x),
    "rms": lambda m, x, b: m.rms(x),
    "silu": lambda m, x, b: F.silu(x) + x,
    "relu": lambda m, x, b: F.relu(x) - 0.1 * x,
    "softplus": lambda m, x, b: F.softplus(x),
    "dropout": lambda m, x, b: F.dropout(x, 0.0, True),
    "scale": lambda m, x, b: x * m.scale + 0.3,
    "heads": lambda m, x, b: _heads(m, x),
    "rotary": lambda m, x, b: _rotary(m, x),
    "position": lambda m, x, b: x + m.position[: x.shape[1]],
    "table": lambda m, x, b: x + m.table[: x.shape[1]].unsqueeze(0).expand(x.shape[0], -1, -1),
    "unit": lambda m, x, b: x / x.norm(dim=-1, keepdim=True),
    "softmax": lambda m, x, b: x + m.linear(x).softmax(-1),
    "sort": lambda m, x, b: x.sort(-1)[0] + x,
    "cumsum": lambda m, x, b: x.cumsum(-1) * 0.3,
    "einsum": lambda m, x, b: torch.einsum("bse,fe->bsf", x, m.linear.weight),
    "matmul": lambda m, x, b: x @ m.linear.weight + x,
    "flattened": lambda m, x, b: m.linear(x.reshape(-1, WIDTH)).view(x.shape) + x,
    "time first": lambda m, x, b: m.norm(m.linear(x.transpose(0, 1)).transpose(0, 1) + x),
    "channels first": lambda m, x, b: (x.transpose(1, 2) * m.scale[:, None]).transpose(1, 2) + x,
    "unbind": lambda m, x, b: torch.stack(x.view(*x.shape[:2], HEADS, -1).unbind(2)[::-1], 2).flatten(2),
    "split": lambda m, x, b: torch.cat(x.split([3, 5], -1)[::-1], -1),
    "slice": lambda m, x, b: torch.cat([x[..., 2:] * 2, x[..., :2]], -1),
    "gather": lambda m, x, b: x.gather(-1, x.argsort(-1)) + x,
    "lookup": lambda m, x, b: x + m.position[x.argmax(-1) % x.shape[1]],
    "lookup of ranks": lambda m, x, b: x * m.table[(b.valid.cumsum(1) - 1).masked_fill(~b.valid, 1)],
    "lookup of features": lambda m, x, b: x[..., torch.arange(WIDTH - 1, -1, -1)],
    "glu": lambda m, x, b: F.glu(m.up(x)) + x,
    "conv of one": lambda m, x, b: F.conv1d(x.transpose(1, 2), m.conv.weight[..., :1], m.conv.bias).transpose(1, 2),
    "error": lambda m, x, b: x + F.smooth_l1_loss(x, m.linear(x), reduction="none"),
    "index": lambda m, x, b: x.index_select(-1, torch.arange(WIDTH - 1, -1, -1)),
    "outer": lambda m, x, b: (x[..., :, None] * x[..., None, :]).mean(-1),
    "extra dim": lambda m, x, b: (x.unsqueeze(2).expand(-1, -1, 3, -1) * m.scale).sum(2),
    "mean of features": lambda m, x, b: x - x.mean(-1, keepdim=True),
    "clamp": lambda m, x, b: x.clamp(-1, 2) + 0.1 * x,
    "where": lambda m, x, b: torch.where(x > 0, x, 0.2 * x),
    "batch vector": lambda m, x, b: x + m.linear(b.memory[:, 0])[:, None],
    "detached": lambda m, x, b: x * x.detach().sigmoid(),
    "no grad": lambda m, x, b: x + _without_grad(m, x),
    "in place": lambda m, x, b: _add_in_place(m, x),
    "features in place": lambda m, x, b: _features_in_place(x),
    "twice": lambda m, x, b: m.linear(x) + m.linear(x * 2),
    "checkpointed": lambda m, x, b: x + checkpoint(lambda y: m.down(F.gelu(m.up(y))), x, use_reentrant=False),
}


def _without_grad(m: Layers, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.linear(x).tanh()


def _features_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    y[..., :3] = y[..., 3:6] * 2
    return y


MASKING: dict[str, Block] = {
    "times mask": lambda m, x, b: x * _at(b),
    "times mask, shifted": lambda m, x, b: x * _at(b).to(x.dtype) - 0.5,
    "times inverse": lambda m, x, b: x * (~_at(b)) + 0.7 * x,
    "fill 0": lambda m, x, b: x.masked_fill(~_at(b), 0.0),
    "fill 1, log": lambda m, x, b: F.softplus(x).masked_fill(~_at(b), 1.0).log(),
    "where": lambda m, x, b: torch.where(_at(b), x, 2.0),
    "where parameter": lambda m, x, b: torch.where(_at(b), x, m.scale),
    "set padding": lambda m, x, b: _set_padding(x, b.valid),
    "plus mask": lambda m, x, b: x + _at(b).to(x.dtype),
    "centred": lambda m, x, b: x - _masked_mean(x, b),
    "other mask": lambda m, x, b: x * b.other[..., None],
}

LEAKY: dict[str, Block] = {
    "conv": lambda m, x, b: x + m.conv(x.transpose(1, 2)).transpose(1, 2),
    "flip": lambda m, x, b: x + 0.5 * x.flip(1),
    "roll": lambda m, x, b: x + 0.5 * x.roll(1, 1),
    "shift": lambda m, x, b: _shifted(x),
    "mean": lambda m, x, b: x - x.mean(1, keepdim=True),
    "max": lambda m, x, b: x + x.amax(1, keepdim=True),
    "cumsum over positions": lambda m, x, b: x + 0.1 * x.cumsum(1),
    "softmax over positions": lambda m, x, b: x * x.softmax(1),
    "mean of batch": lambda m, x, b: x - x.mean(0),
    "flip of batch": lambda m, x, b: x + x.flip(0),
    "first to all": lambda m, x, b: x + x[:, :1],
    "gated positions": lambda m, x, b: x + F.glu(torch.cat([x, x], 1), 1),
    "lookup of tokens": lambda m, x, b: x + x.reshape(-1, WIDTH)[b.labels.clamp(min=0) % (x.shape[0] * x.shape[1])],
    "gather positions": lambda m, x, b: x + x[:, torch.arange(x.shape[1] - 1, -1, -1)],
    "set first": lambda m, x, b: _set_first(x),
    "scores": lambda m, x, b: x + (x @ x.transpose(1, 2)).softmax(-1) @ x,
    "plus masked positions": lambda m, x, b: x + ((x * _at(b)) @ x.new_ones(WIDTH, WIDTH)).cumsum(1),
}


# --- heads -----------------------------------------------------------------------------------------------------------


def _last(x: Tensor, batch: Batch) -> Tensor:
    position = torch.arange(x.shape[1])
    last = (batch.valid * position).argmax(1)
    return x[torch.arange(x.shape[0]), last]


def _softmax_pool(m: Layers, x: Tensor, batch: Batch) -> Tensor:
    weights = m.score(x).squeeze(-1).masked_fill(~batch.valid, torch.finfo(x.dtype).min).softmax(1)
    return (weights[..., None] * x).sum(1)


def _loss(m: Layers, x: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(m.classes(x).reshape(-1, CLASSES), labels.reshape(-1), **options)


def _losses(m: Layers, x: Tensor, batch: Batch, labels: Tensor) -> Tensor:
    loss = F.nll_loss(m.classes(x).log_softmax(-1).transpose(1, 2), labels, reduction="none")
    return (loss * batch.valid).sum() / batch.valid.sum().clamp(min=1)


Head = Callable[[Layers, Tensor, Batch], Any]

TOKEN_HEADS: dict[str, Head] = {
    "tokens": lambda m, x, b: x,
    "token logits": lambda m, x, b: m.classes(x),
    "token classes": lambda m, x, b: m.classes(x).argmax(-1),
    "positive": lambda m, x, b: x > 0,
    "filled": lambda m, x, b: x.masked_fill(~_at(b), -3.0),
    "flat": lambda m, x, b: m.linear(x).view(-1, WIDTH),
    "heads": lambda m, x, b: x.view(*x.shape[:2], HEADS, -1),
    "half": lambda m, x, b: x.float(),
}
"""Outputs with one row per token."""

OTHER_HEADS: dict[str, Head] = {
    "first": lambda m, x, b: m.linear(x[:, 0]).tanh(),
    "last": lambda m, x, b: x[:, -1],
    "two": lambda m, x, b: x[:, :2].sum(1),
    "last valid": lambda m, x, b: _last(x, b),
    "gathered": lambda m, x, b: torch.take_along_dim(x, (b.valid.sum(1) - 1).clamp(min=0)[:, None, None], 1)[:, 0],
    "lengths": lambda m, x, b: x[torch.arange(x.shape[0]), b.valid.sum(1) - 1],
    "masked mean": lambda m, x, b: _masked_mean(x, b)[:, 0],
    "masked sum": lambda m, x, b: torch.einsum("bse,bs->be", x, b.valid.to(x.dtype)),
    "masked mean of all": lambda m, x, b: (x * _at(b)).mean((1, 2)),
    "masked max": lambda m, x, b: x.masked_fill(~_at(b), -100.0).amax(1),
    "mean": lambda m, x, b: x.mean(1),
    "maximum": lambda m, x, b: x.amax(1),
    "sum": lambda m, x, b: x.sum(),
    "softmax pooling": lambda m, x, b: _softmax_pool(m, x, b),
    "scores": lambda m, x, b: m.score(x).squeeze(-1),
    "channels first": lambda m, x, b: x.transpose(1, 2),
    "boolean rows": lambda m, x, b: torch.where(_at(b), x, 0).sum((0, 1)),
    "loss": lambda m, x, b: _loss(m, x, b.labels),
    "smoothed loss": lambda m, x, b: _loss(m, x, b.labels, label_smoothing=0.1, weight=torch.ones(CLASSES, dtype=x.dtype) * 2),
    "summed loss": lambda m, x, b: _loss(m, x, b.labels, reduction="sum"),
    "losses": lambda m, x, b: (_loss(m, x, b.labels, reduction="none") * b.valid.reshape(-1)).sum() / b.valid.sum().clamp(min=1),
    "losses of labels": lambda m, x, b: _losses(m, x, b, b.labels.clamp(min=0)),
    "losses of moved labels": lambda m, x, b: _losses(m, x, b, b.labels.clamp(min=0).roll(-1, 1)),
    "errors": lambda m, x, b: F.mse_loss(m.linear(x) * _at(b), b.x * _at(b)),
    "errors of all": lambda m, x, b: F.huber_loss(m.linear(x), b.x, reduction="sum"),
    "loss of all": lambda m, x, b: _loss(m, x, b.labels.clamp(min=0)),
    "shifted loss": lambda m, x, b: _loss(m, x[:, :-1], b.labels[:, 1:]),
    "shifted labels": lambda m, x, b: _loss(m, x, F.pad(b.labels, (0, 1), value=-100)[:, 1:]),
    "squared": lambda m, x, b: ((x - 1) ** 2 * _at(b)).sum() / b.valid.sum().clamp(min=1),
}
"""Outputs that must be exact as a whole."""


# --- models and batches ----------------------------------------------------------------------------------------------


def with_class_token(batch: Batch, token: Tensor) -> Batch:
    """One more token in front, valid everywhere."""
    x = torch.cat([token.expand(batch.x.shape[0], 1, -1), batch.x], 1)
    valid, other = (F.pad(mask, (1, 0), value=True) for mask in (batch.valid, batch.other))
    return batch._replace(x=x, valid=valid, other=other, labels=F.pad(batch.labels, (1, 0), value=-100))


class RandomModel(nn.Module):
    """The model of ``seed``; ``recipe`` says what it is made of."""

    def __init__(self, seed: int, length: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        self.blocks: list[tuple[str, Block]] = []
        leaky = rng.random() < 0.35
        for _ in range(rng.randint(1, 3)):
            self.blocks += [self._row_wise(rng) for _ in range(rng.randint(0, 3))]
            if rng.random() < 0.25:
                name = rng.choice(list(MASKING))
                self.blocks.append((name, MASKING[name]))
            if leaky and rng.random() < 0.3:
                name = rng.choice(list(LEAKY))
                self.blocks.append((name, LEAKY[name]))
            attention = Attention(rng)
            self.blocks.append((repr(attention), attention))
        self.blocks += [self._row_wise(rng) for _ in range(rng.randint(0, 3))]
        if leaky and rng.random() < 0.2:
            name = rng.choice(list(LEAKY))
            self.blocks.append((name, LEAKY[name]))
        tables = [*(("tokens", n, h) for n, h in TOKEN_HEADS.items()), *(("all", n, h) for n, h in OTHER_HEADS.items())]
        self.heads = [rng.choice(tables) for _ in range(rng.choice([1, 1, 2, 3]))]
        self.shared_positions = rng.random() < 0.2
        self.class_token = rng.random() < 0.1
        self.returns_memory = rng.random() < 0.1
        self.layers = nn.ModuleList(Layers(length + 1) for _ in range(len(self.blocks) + len(self.heads) + 1))
        self.recipe = [n for n, _ in self.blocks] + [f"-> {n}" for _, n, _ in self.heads]
        for flag in ("shared_positions", "class_token", "returns_memory"):
            self.recipe += [flag] if getattr(self, flag) else []

    @staticmethod
    def _row_wise(rng: random.Random) -> tuple[str, Block]:
        name = rng.choice(list(ROW_WISE))
        return name, ROW_WISE[name]

    @property
    def kinds(self) -> list[str]:
        """For each output, ``"tokens"`` or ``"all"``."""
        return [kind for kind, _, _ in self.heads] + (["memory"] if self.returns_memory else [])

    @property
    def masks(self) -> set[tuple[str, bool]]:
        """The key masks of the model's tokens: each a mask of the batch, and whether it is only used for its lengths."""
        attentions = [block for _, block in self.blocks if isinstance(block, Attention)]
        return {(a.kind.which, a.kind.form == "lengths" and not a.mha) for a in attentions if a.kind.which != "memory"}

    def rows(self, batch: Batch, all_rewritten: bool) -> list[Tensor | None]:
        """The rows of each output that must be exact: those that some mask keeps. What a kept attention masks, nobody knows."""
        given = with_class_token(batch, batch.x.new_zeros(WIDTH)) if self.class_token else batch
        masks = [by_length(getattr(given, name)) if lengths else getattr(given, name) for name, lengths in self.masks]
        valid = masks[0] if masks else None
        for other in masks[1:]:
            valid = valid | other if all_rewritten else valid & other
        by_kind = {"tokens": valid, "all": None, "memory": batch.memory_valid}
        return [by_kind[kind] for kind in self.kinds]

    def forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        batch = Batch(*inputs)
        if self.class_token:
            batch = with_class_token(batch, self.layers[-1].scale)
        x, memory = batch.x, self.layers[-1].linear(batch.memory)
        if self.shared_positions and memory.shape[1] == x.shape[1]:
            position = self.layers[-1].position[: x.shape[1]]
            x, memory = x + position, memory + position
        batch = batch._replace(memory=memory)
        layers = iter(self.layers)
        for _, block in self.blocks:
            x = block(next(layers), x, batch)
        outputs = [head(next(layers), x, batch) for _, _, head in self.heads]
        return (*outputs, memory) if self.returns_memory else tuple(outputs)


def _random_mask(rng: random.Random, batch: int, length: int, *, empty: bool) -> Tensor:
    kind = rng.choice(["right"] * 4 + ["left"] * 2 + ["holes"] * 2 + ["all", "one"])
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    lengths = torch.randint(0 if empty and rng.random() < 0.2 else 1, length + 1, (batch,), generator=generator)
    if kind == "one":
        lengths = lengths.clamp(max=1)
    elif kind == "all":
        lengths = torch.full_like(lengths, length)
    valid = torch.arange(length) < lengths[:, None]
    if kind == "left":
        return valid.flip(1)
    if kind == "holes":
        valid = torch.rand(batch, length, generator=generator) < 0.6
        valid[:, rng.randrange(length)] = True
    return valid


def random_batch(seed: int, batch: int, length: int, memory_length: int, dtype: torch.dtype) -> Batch:
    """A batch whose padding is random: right, left, holes, full, one token, and now and then an empty row."""
    rng = random.Random(seed)
    valid = _random_mask(rng, batch, length, empty=True)
    other = _random_mask(rng, batch, length, empty=False)
    memory_valid = _random_mask(rng, batch, memory_length, empty=False)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    memory = torch.randn(batch, memory_length, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, CLASSES, (batch, length), generator=generator)
    if rng.random() < 0.8:
        labels = labels.masked_fill(~valid, -100)
    return Batch(x, valid, other, memory, memory_valid, labels)


# --- sentences in documents ------------------------------------------------------------------------------------------


class Hierarchy(nn.Module):
    """Tokens of sentences of documents, (B, N, S, E): an encoder of sentences, pooling, an encoder of documents."""

    masks: set[tuple[str, bool]] = set()

    def __init__(self, seed: int, length: int) -> None:
        super().__init__()
        rng = random.Random(f"hierarchy {seed}")
        self.inner, self.outer = ([self._block(rng) for _ in range(rng.randint(1, 3))] for _ in range(2))
        self.pooling = rng.choice(["first", "masked mean", "masked max", "softmax pooling", "last valid", "mean"])
        self.heads = [rng.choice(list(TOKEN_HEADS)), rng.choice(["masked mean", "softmax pooling", "masked max", "first", "mean"])]
        count = len(self.inner) + len(self.outer) + 3
        self.layers = nn.ModuleList(Layers(length) for _ in range(count))
        names = [n for n, _ in self.inner] + [self.pooling] + [n for n, _ in self.outer]
        self.recipe = ["sentences", *names, *(f"-> {n}" for n in self.heads)]

    @staticmethod
    def _block(rng: random.Random) -> tuple[str, Block]:
        if rng.random() < 0.5:
            name = rng.choice(list(ROW_WISE))
            return name, ROW_WISE[name]
        attention = Attention(rng)
        form = "bool" if attention.kind.form == "lengths" else attention.kind.form
        attention.kind = MaskKind("valid", form, rng.choice(["none", "none", "causal"]), attention.kind.spelling)
        return repr(attention), attention

    def forward(self, *inputs: Tensor) -> tuple[Any, ...]:
        batch = Batch(*inputs)
        b, n, s, e = batch.x.shape
        memory = batch.memory.unsqueeze(1).expand(-1, n, -1, -1).flatten(0, 1)
        tokens = batch._replace(x=batch.x.flatten(0, 1), valid=batch.valid.flatten(0, 1), memory=memory)
        layers = iter(self.layers)
        x = tokens.x
        for _, block in self.inner:
            x = block(next(layers), x, tokens)
        sentences = OTHER_HEADS[self.pooling](next(layers), x, tokens).view(b, n, e)
        documents = batch._replace(x=sentences, valid=batch.valid.any(-1))
        y = sentences
        for _, block in self.outer:
            y = block(next(layers), y, documents)
        one = TOKEN_HEADS[self.heads[0]](next(layers), y, documents)
        return one, OTHER_HEADS[self.heads[1]](next(layers), y, documents), x.view(b, n, s, e)

    def rows(self, batch: Batch, all_rewritten: bool) -> list[Tensor | None]:
        """Sentences that hold a token; and of tokens those that are valid."""
        return [batch.valid.any(-1), None, batch.valid]


def random_documents(seed: int, batch: int, sentences: int, length: int, dtype: torch.dtype) -> Batch:
    """A batch of documents, some sentences of which are all padding."""
    one = random_batch(seed, batch * sentences, length, 3, dtype)
    rng = random.Random(seed)
    kept = _random_mask(rng, batch, sentences, empty=False)
    valid = (one.valid | (torch.arange(length) == 0)).view(batch, sentences, length) & kept[..., None]
    x = one.x.detach().view(batch, sentences, length, WIDTH).requires_grad_()
    return one._replace(x=x, valid=valid, memory=one.memory.detach()[:batch].clone().requires_grad_())
