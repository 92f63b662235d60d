"""What the tests of packed models share: batches, an inner compiler that looks at its graphs, a comparison with eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from varlen_inductor import config, report

B, S = 3, 24
VOCABULARY = 64
Batch = Mapping[str, Any]
aten = torch.ops.aten
_LINEAR = {aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.baddbmm.default, aten.bmm.default}


# --- batches -----------------------------------------------------------------------------------------------------------------


def valid_rows(lengths: Sequence[int], size: int = S, side: str = "right") -> Tensor:
    """A (B, S) bool mask with ``lengths[b]`` valid positions in row ``b``, padded on the ``side`` given."""
    valid = torch.arange(size) < torch.tensor(lengths)[:, None]
    return valid.flip(1) if side == "left" else valid


LENGTHS = [(24, 9, 4), (13, 2, 17)]
"""The lengths of the batches that each model is given: two token counts at one shape."""


def token_batch(lengths: Sequence[int], side: str = "right", size: int = S) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, both (B, S) int64."""
    valid = valid_rows(lengths, size, side)
    ids = torch.randint(5, VOCABULARY, valid.shape)
    return {"input_ids": torch.where(valid, ids, 1), "attention_mask": valid.long()}


def with_labels(batch: dict[str, Tensor], classes: int = VOCABULARY) -> dict[str, Tensor]:
    """The batch with token labels: -100 at padded positions, as a data collator makes them."""
    labels = torch.randint(0, classes, batch["input_ids"].shape)
    return {**batch, "labels": torch.where(batch["attention_mask"] == 1, labels, -100)}


# --- models ------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm transformer block under a boolean padding mask (B, S)."""

    def __init__(self, width: int = 32, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.attend, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """``x``: (B, S, E); ``valid``: bool (B, S). Returns (B, S, E)."""
        query, key, value = self.attend(self.first(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=valid[:, None, None, :], dropout_p=dropout)
        x = x + F.dropout(self.out(y.transpose(1, 2).flatten(2)), self.dropout, self.training)
        return x + F.dropout(self.down(F.silu(self.up(self.second(x)))), self.dropout, self.training)


class Blocks(nn.Module):
    """A stack of blocks: hidden states (B, S, E) to hidden states."""

    def __init__(self, width: int = 32, layers: int = 2, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, attention_mask)
        return x


def feature_batch(lengths: Sequence[int], size: int = S, width: int = 32) -> dict[str, Tensor]:
    """What `Blocks` takes: ``x`` (B, S, E) and ``attention_mask``, bool (B, S)."""
    return {"x": torch.randn(len(lengths), size, width), "attention_mask": valid_rows(lengths, size)}


# --- what the inner compiler was given ---------------------------------------------------------------------------------------


@dataclass
class Seen:
    """What one graph that was compiled holds: its linears by the rows they run on, and its unpacks."""

    is_body: bool = False
    """Whether it is a packed graph, and not a padded one or one that was rewritten in place."""
    packed: int = 0
    padded: int = 0
    other: int = 0
    unpacks: int = 0
    checkpoints: int = 0


_seen: list[Seen] = []


def look_at(gm: fx.GraphModule) -> Seen:
    """Count the linears of a graph, and of those inside of it, whose nodes carry ``example_value``, as Dynamo's do."""
    ops = torch.ops.varlen_inductor
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes if node.op == "call_function"]
    indices = {node.args[1] for node in nodes if node.target is ops.pack.default}
    if not all(node.op == "placeholder" and "example_value" in node.meta for node in indices):
        return Seen()
    tokens = {_size(node.meta["example_value"], 0) for node in indices}
    seen = Seen(bool(indices), unpacks=sum(node.target is ops.unpack.default for node in nodes))
    seen.checkpoints = sum("tag_activation_checkpoint" in str(node.target) for node in nodes)
    for node in nodes:
        if node.target not in _LINEAR and "linear" not in getattr(node.target, "__name__", ""):
            continue
        operand = node.all_input_nodes[1 if node.target is aten.addmm.default else 0].meta["example_value"]
        if _size(operand, 0) in tokens:
            seen.packed += 1
        elif operand.dim() > 2:
            seen.padded += 1
        else:
            seen.other += 1
    return seen


def _size(tensor: Tensor, dim: int) -> object:
    n = tensor.shape[dim]
    return n.node.expr if isinstance(n, torch.SymInt) else n


def _recorded(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
    _seen.append(look_at(gm))
    return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)  # type: ignore[attr-defined]


torch._dynamo.register_backend(_recorded, name="varlen_recorded")  # type: ignore[arg-type]


@contextmanager
def packing(inner: str = "varlen_recorded", **knobs: Any) -> Iterator[list[Seen]]:
    """Knobs under which tiny batches are packed and failures raise. Gives the graphs that the inner compiler was given."""
    _seen.clear()
    with config.patch(inner_backend=inner, strict=True, round_tokens=4, max_density=0.95, **knobs):
        yield _seen


def compile_(model: Any, **kwargs: Any) -> Any:
    """``torch.compile`` by our backend. Knobs are read when a graph is compiled, which is when it is first called."""
    return torch.compile(model, backend="varlen_inductor", **kwargs)


def steps() -> tuple[int, int]:
    """How many calls of packed programs have run packed, and how many padded."""
    ours = counters["varlen_inductor"]
    return ours["packed_steps"], ours["padded_steps"]


def graphs_compiled() -> int:
    """How many graphs AOTAutograd has compiled: 0 would mean that everything ran eagerly."""
    return counters["aot_autograd"]["total"]


# --- against eager -----------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What a comparison found, for further assertions."""

    reports: list[report.Report]
    seen: list[Seen]
    outputs: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def body(self) -> Seen:
        """The packed graph, of which there must be one."""
        (body,) = (seen for seen in self.seen if seen.is_body)
        return body

    @property
    def report(self) -> report.Report:
        (only,) = self.reports
        return only

    @property
    def reasons(self) -> str:
        """All that the reports say, as one text."""
        return "\n".join(one.table(400) for one in self.reports)


def outputs_of(result: Any) -> dict[str, Tensor]:
    """The tensors of a result, by name where they have one."""
    if isinstance(result, Tensor):
        return {"output": result}
    items = result.items() if isinstance(result, Mapping) else enumerate(result)
    return {str(name): value for name, value in items if isinstance(value, Tensor)}


def rows_of(value: Tensor, masks: Sequence[Tensor]) -> Tensor | None:
    """The mask (B, S) of the rows that ``value`` (B, S, ...) has; the first that fits."""
    return next((mask.bool() for mask in masks if value.shape[:2] == mask.shape), None)


def compare_with_eager(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    train: bool = True,
    masks: Mapping[str, str] | None = None,
    packed_steps: int | None = None,
    tolerance: float = 2e-5,
    call: Callable[[nn.Module], Callable[..., Any]] = lambda model: model,
    dynamic: bool | None = None,
    knobs: Mapping[str, Any] | None = None,
) -> Outcome:
    """Run a model on several batches, under the backend and eagerly, and compare outputs and gradients.

    Args:
        model: its dropout must be 0.
        batches: keyword arguments.
        train: with gradients, of random cotangents that are zero at padded rows.
        masks: for an output its mask, by the name of the argument; the default is ``attention_mask`` for all that fit.
        packed_steps: how many of the batches must have run packed; the default is all.
        call: what to compile, made of the model.
    """
    model.train(train)
    ours = copy.deepcopy(model)
    counters.clear()
    outputs = []
    with packing(**(knobs or {})) as seen, report.collect() as reports:
        compiled = compile_(call(ours), dynamic=dynamic)
        for batch in batches:
            outputs.append(_compare_one(compiled, ours, call(model), model, batch, train, masks or {}, tolerance))
    expected = len(batches) if packed_steps is None else packed_steps
    said = "\n".join(one.table(160) for one in reports)
    assert graphs_compiled() > 0, said
    if expected or steps() != (0, 0):
        assert steps() == (expected, len(batches) - expected), said
    return Outcome(list(reports), list(seen), outputs)


def _compare_one(
    compiled: Any,
    ours: nn.Module,
    eager: Any,
    model: nn.Module,
    batch: Batch,
    train: bool,
    masks: Mapping[str, str],
    tolerance: float,
) -> dict[str, Tensor]:
    with torch.set_grad_enabled(train):
        found, expected = outputs_of(compiled(**batch)), outputs_of(eager(**batch))
    assert found.keys() == expected.keys()
    losses: list[tuple[Tensor, Tensor]] = []
    for name, value in expected.items():
        mask = batch[masks[name]] if name in masks else batch.get("attention_mask")
        valid = rows_of(value, [mask]) if mask is not None else None
        assert_rows_close(found[name], value, valid, tolerance, name)
        if train and value.requires_grad:
            cotangent = torch.randn_like(value)
            if valid is not None:
                cotangent[~valid] = 0
            losses.append((found[name], cotangent))
            losses.append((value, cotangent))
    if train:
        ours.zero_grad()
        model.zero_grad()
        for pairs in (losses[::2], losses[1::2]):
            torch.autograd.backward([value for value, _ in pairs], [cotangent for _, cotangent in pairs])
        assert_gradients_close(ours, model, tolerance)
    return {name: value.detach() for name, value in found.items()}


def assert_rows_close(found: Tensor, expected: Tensor, valid: Tensor | None, tolerance: float, name: str = "output") -> None:
    """Equal up to rounding; where ``valid`` (B, S) is given and false, equal or zero."""
    assert found.shape == expected.shape and found.dtype == expected.dtype, name
    options = {"rtol": tolerance, "atol": tolerance, "msg": lambda text: f"{name}: {text}"}
    if valid is None:
        torch.testing.assert_close(found, expected, **options)
        return
    torch.testing.assert_close(found[valid], expected[valid], **options)
    padded, exact = found[~valid], expected[~valid]
    written = padded.flatten(1).any(1) if padded.dim() > 1 else padded != 0
    torch.testing.assert_close(padded[written], exact[written], **options)


def assert_gradients_close(ours: nn.Module, eager: nn.Module, tolerance: float = 2e-5) -> None:
    """Gradients of all parameters: as large a share of the largest entry may be rounding."""
    for (name, mine), theirs in zip(ours.named_parameters(), eager.parameters(), strict=True):
        if theirs.grad is None:
            assert mine.grad is None or not mine.grad.any(), name
            continue
        assert mine.grad is not None, name
        scale = max(1e-2, theirs.grad.abs().max().item())
        options = {"rtol": tolerance, "atol": tolerance * scale}
        said = f"gradient of {name}"
        torch.testing.assert_close(mine.grad, theirs.grad, **options, msg=lambda text, said=said: f"{said}: {text}")
