"""Run a model through the backend and eagerly, and compare everything that can be observed.

The contract: rows at valid positions, whatever is reduced over positions, buffers, written inputs and all gradients are what
eager gives; rows of an output at padded positions are exact or zero.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.utils._pytree import tree_flatten, tree_map

from varlen_inductor import config, driver, report, runtime
from varlen_inductor.backend import varlen_inductor
from varlen_inductor.ops import attention

BATCH, LENGTH, WIDTH, HEADS = 3, 12, 16, 2
FORMS = ("model", "attention")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 3e-2, torch.float16: 1e-2}


# --- masks -----------------------------------------------------------------------------------------------------------


def mask_of(kind: str, batch: int = BATCH, length: int = LENGTH) -> Tensor:
    """A bool (B, S) mask of valid positions: ``right``, ``left``, ``holes``, ``empty row``, ``one token``, ``all``, ``none``."""
    position = torch.arange(length)
    lengths = torch.tensor([length - 1, length // 2, 3, 1])[:batch]
    valid = position < lengths[:, None]
    if kind == "left":
        valid = valid.flip(1)
    elif kind == "holes":
        valid = torch.ones(batch, length, dtype=torch.bool)
        valid[0, 2:5] = False
        valid[-1, ::2] = False
    elif kind == "empty row":
        valid[batch // 2] = False
    elif kind == "one token":
        valid = position.expand(batch, length) == 0
        valid = valid & (torch.arange(batch) == 0)[:, None]
    elif kind == "all":
        valid = torch.ones_like(valid)
    elif kind == "none":
        valid = torch.zeros_like(valid)
    return valid


MASKS = ("right", "left", "holes", "empty row", "one token", "all", "none")
"""What the padding of a batch can look like."""


# --- models ----------------------------------------------------------------------------------------------------------


class SelfAttention(nn.Module):
    """A residual attention block; the mask is given in whatever form SDPA takes."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None, memory: Tensor | None = None) -> Tensor:
        """``x`` (B, S, E); ``memory`` (B, S_k, E): what is attended to, ``x`` itself by default."""
        batch, length, width = x.shape
        query, key, value = self.qkv(x).chunk(3, -1)
        if memory is not None:
            _, key, value = self.qkv(memory).chunk(3, -1)
        query, key, value = (t.view(batch, -1, self.heads, width // self.heads).transpose(1, 2) for t in (query, key, value))
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return x + self.out(y.transpose(1, 2).reshape(batch, length, width))


class Program(nn.Module):
    """A function of some layers and the inputs: ``body(layers, *inputs)``."""

    def __init__(self, body: Callable[..., Any], width: int = WIDTH) -> None:
        super().__init__()
        self.a, self.b = SelfAttention(width), SelfAttention(width)
        self.linear = nn.Linear(width, width)
        self.score = nn.Linear(width, 1)
        self.head = nn.Linear(width, 7)
        self.norm = nn.LayerNorm(width)
        self.embed = nn.Embedding(50, width)
        self.position = nn.Parameter(torch.randn(LENGTH, width))
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.body = body

    def forward(self, *inputs: Any) -> Any:
        return self.body(self, *inputs)


def keys(valid: Tensor) -> Tensor:
    """(B, S) to the (B, 1, 1, S) that SDPA takes."""
    return valid[:, None, None, :]


def causal(valid: Tensor) -> Tensor:
    """Key padding and causality."""
    position = torch.arange(valid.shape[1])
    return (position[None] <= position[:, None]) & keys(valid)


# --- running ---------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What one run showed."""

    outputs: list[Any]
    gradients: dict[str, Tensor | None]
    state: dict[str, Tensor]


@dataclass
class Checked:
    """What the backend made of a model, for further assertions.

    ``packed`` and ``padded`` count the calls of a packed program that ran its body, or the padded graph.
    """

    reports: list[report.Report]
    counters: dict[str, int]
    packed: int = 0
    padded: int = 0
    ours: Outcome | None = None
    eager: Outcome | None = None
    errors: list[str] = field(default_factory=list)

    @property
    def report(self) -> report.Report:
        assert self.reports, "the backend was not called"
        return self.reports[0]

    @property
    def forms(self) -> list[str]:
        """The form of each rewritten attention."""
        return [site.form for one in self.reports for site in one.rewritten]

    @property
    def reasons(self) -> str:
        """All that the report says, as one text."""
        sites = [site.reason for one in self.reports for site in one.sites]
        edges = [edge.why for one in self.reports for region in one.regions for edge in region.edges]
        return "\n".join([*sites, *edges, *(note for one in self.reports for note in one.notes)])

    @property
    def nodes_packed(self) -> int:
        return sum(region.nodes_packed for one in self.reports for region in one.regions)


@contextmanager
def watched_runs() -> Iterator[dict[str, int]]:
    """Count which of its two graphs a packed program ran."""
    runs = {"packed": 0, "padded": 0}
    original = runtime.PackedProgram._plan

    def plan(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        runs["padded" if result is None else "packed"] += 1
        return result

    with mock.patch.object(runtime.PackedProgram, "_plan", plan):
        yield runs


class Direct:
    """In the place of the inner compiler: graphs run as they are."""

    options: Mapping[str, Any] = {}
    records_cuda_graphs = False

    def compile(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        return gm

    def nested(self, fn: Callable[..., Any], *, dynamic: bool | None = None, packed: bool = False) -> Callable[..., Any]:
        return Plain(fn)


class Plain:
    """In the place of `Nested`: calls the function."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, *args: Any, key: Any = None) -> Any:
        return self.fn(*args)

    def knows(self, key: Any) -> bool:
        return False


def direct_backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
    """The passes and nothing else, which is quick."""
    return driver.compile_graph(gm, example_inputs, Direct(), "backend")  # type: ignore[arg-type]


@contextmanager
def quick(**knobs: Any) -> Iterator[None]:
    """Small token counts are packed, failures of our passes raise, and rows that nobody reads are not numbers."""
    settings = {"strict": True, "round_tokens": 4, "max_density": 1.0, **knobs}
    with config.patch(**settings), poisoned_tails():
        yield


@contextmanager
def poisoned_tails() -> Iterator[None]:
    """Rows behind the last sequence, which kernels on a GPU leave as they find them, hold NaN in results, and not in operands."""
    forward, backward = attention.run_forward, attention.run_backward

    def check(*rows: Tensor, after: Tensor) -> None:
        assert all(x[int(after[-1]) :].isfinite().all() for x in rows), "some kernels read behind the last sequence"

    def spoil(*rows: Tensor, after: Tensor, dim: int = 0) -> None:
        for x in rows:
            x.narrow(dim, int(after[-1]), x.shape[dim] - int(after[-1])).fill_(math.nan)

    def run_forward(query: Tensor, key: Tensor, value: Tensor, layout: Any, *args: Any) -> Any:
        if layout.tails_unread:
            check(query, after=layout.cu_seq_q)
            check(key, value, after=layout.cu_seq_k)
        out, lse, rng_state = forward(query, key, value, layout, *args)
        if layout.tails_unread:
            spoil(out, after=layout.cu_seq_q)
            spoil(lse, after=layout.cu_seq_q, dim=1)
        return out, lse, rng_state

    def run_backward(*args: Any) -> Any:
        layout = args[8]
        if layout.tails_unread:
            check(args[0], args[5], after=layout.cu_seq_q)
            check(*args[6:8], after=layout.cu_seq_k)
        gradients = backward(*args)
        if layout.tails_unread:
            spoil(gradients[0], after=layout.cu_seq_q)
            spoil(*gradients[1:], after=layout.cu_seq_k)
        return gradients

    with mock.patch.multiple(attention, run_forward=run_forward, run_backward=run_backward):
        yield


def tensors(tree: Any) -> list[Any]:
    """The leaves of a result: tensors and numbers."""
    return list(tree_flatten(tree)[0])


def _run(
    model: nn.Module, call: Callable[..., Any], inputs: Sequence[Any], cotangents: Sequence[Tensor | None], train: bool
) -> Outcome:
    own = [x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs]
    # Inputs that are written cannot be leaves that require a gradient; what the model gets is a copy.
    given = [x.clone() if isinstance(x, Tensor) and x.requires_grad else x for x in own]
    model.zero_grad()
    torch.manual_seed(1)
    with torch.set_grad_enabled(train):
        result = tensors(call(*given))
    if train:
        pairs = [
            (y, torch.zeros_like(y) if c is None else c)
            for y, c in zip(result, cotangents, strict=True)
            if isinstance(y, Tensor) and y.requires_grad
        ]
        if pairs:
            torch.autograd.backward([y for y, _ in pairs], [c.to(y.dtype) for y, c in pairs])
    gradients: dict[str, Tensor | None] = {n: p.grad for n, p in model.named_parameters()}
    gradients.update({f"input {i}": x.grad for i, x in enumerate(own) if isinstance(x, Tensor) and x.requires_grad})
    state = {n: b.clone() for n, b in model.named_buffers()}
    state.update({f"input {i}": x.detach().clone() for i, x in enumerate(given) if isinstance(x, Tensor)})
    return Outcome([y.detach().clone() if isinstance(y, Tensor) else y for y in result], gradients, state)


def _close(ours: Tensor, eager: Tensor, tolerance: float, scale: float = 1.0) -> Tensor:
    """Elementwise: equal up to rounding, infinities included. Where eager has NaN, ours may be better."""
    if not eager.is_floating_point():
        return ours == eager
    scale = max(scale, _largest(eager))
    return torch.isclose(ours, eager, rtol=tolerance, atol=tolerance * scale) | eager.isnan()


def _largest(x: Tensor) -> float:
    finite = torch.where(x.isfinite(), x, 0)
    return float(finite.abs().max()) if x.numel() else 0.0


def _at(valid: Tensor, value: Tensor) -> Tensor:
    """``valid`` (B, S) or (B*S,) against the shape of ``value``."""
    flat = valid if value.shape[: valid.dim()] == valid.shape else valid.reshape(-1)
    return flat.reshape(*flat.shape, *[1] * (value.dim() - flat.dim())).expand_as(value)


def compare(ours: Outcome, eager: Outcome, rows: Sequence[Tensor | None], tolerance: float, exact: bool = False) -> list[str]:
    """All violations of the contract.

    Args:
        rows: for each output the valid positions of its rows, or None if all of it must be equal.
        exact: no row may be zero instead.
    """
    errors = []
    for i, (y, r, valid) in enumerate(zip(ours.outputs, eager.outputs, rows, strict=True)):
        if not isinstance(r, Tensor):
            if y != r:
                errors.append(f"output {i}: {y} against {r}")
            continue
        if y.shape != r.shape or y.dtype != r.dtype:
            errors.append(f"output {i}: {y.dtype} {tuple(y.shape)} against {r.dtype} {tuple(r.shape)}")
            continue
        same = _close(y, r, tolerance)
        if valid is None or exact:
            if not same.all():
                errors.append(f"output {i}: off by {(y - r).abs().max().item() if r.is_floating_point() else 'some'}")
            continue
        at = _at(valid, r)
        if not same[at].all():
            errors.append(f"output {i}: valid rows differ by {(y - r)[at].abs().max().item() if r.is_floating_point() else 'some'}")
        # A padded row is exact as a whole or zero as a whole.
        row = (valid.reshape(-1) if r.shape[: valid.dim()] != valid.shape else valid).logical_not()
        good = (same.flatten(row.dim()).all(-1) if same.dim() > row.dim() else same) | (
            (y == 0).flatten(row.dim()).all(-1) if y.dim() > row.dim() else y == 0
        )
        if not good[row].all():
            errors.append(f"output {i}: padded rows are neither exact nor zero")
    # Some gradients are sums that cancel (that of a key's bias is zero), so each is as exact as the largest.
    largest = max((_largest(g) for g in eager.gradients.values() if g is not None), default=1.0)
    kinds = (("gradient", ours.gradients, eager.gradients, max(1.0, largest)), ("state", ours.state, eager.state, 1.0))
    for kind, one, other, scale in kinds:
        for name, r in other.items():
            y = one[name]
            if r is None and (y is None or not y.any()):
                continue
            r = torch.zeros_like(y) if r is None else r  # type: ignore[arg-type]
            y = torch.zeros_like(r) if y is None else y
            if y.shape != r.shape or not _close(y, r, tolerance, scale).all():
                gap = (y - r).abs().max().item() if r.is_floating_point() else math.nan
                errors.append(f"{kind} of {name}: off by {gap} of {r.abs().max().item() if r.is_floating_point() else r}")
    return errors


def cotangents_for(outputs: Sequence[Any], rows: Sequence[Tensor | None], exact: bool = False) -> list[Tensor | None]:
    """Random ones, zero at padded output rows (a loss that reads those breaks the contract)."""
    generator = torch.Generator().manual_seed(7)
    made: list[Tensor | None] = []
    for y, valid in zip(outputs, rows, strict=True):
        if not isinstance(y, Tensor) or not y.is_floating_point():
            made.append(None)
            continue
        c = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
        made.append(c if valid is None or exact else torch.where(_at(valid, y), c, 0))
    return made


def check(
    model: nn.Module | Callable[..., Any],
    inputs: Sequence[Any],
    rows: Sequence[Tensor | None] | Tensor | None,
    *,
    packing: str = "model",
    train: bool = True,
    dtype: torch.dtype = torch.float64,
    clean: Sequence[Any] | None = None,
    dynamic: bool | None = None,
    exact: bool = False,
    fullgraph: bool = True,
    tolerance: float | None = None,
    batches: Sequence[Sequence[Any]] = (),
    knobs: Mapping[str, Any] | None = None,
    raises: bool = True,
    inner: str | None = None,
) -> Checked:
    """Compare a model under the backend with eager.

    Args:
        model: a module, or the body of a `Program`.
        inputs: its arguments. Floating-point ones are cast to ``dtype``.
        rows: see `compare`; one mask (or None) stands for all outputs.
        clean: the inputs that eager is given, where ``inputs`` hold NaN, or indices of nothing, at padded positions.
        exact: outputs must be equal at padded rows too, and have cotangents there.
        batches: more inputs for the same compiled model.
        inner: the Dynamo backend that compiles what the passes made; None: it is run as it is.
        raises: whether a violation fails the test; else it is in ``errors`` of the result.
    """
    if not isinstance(model, nn.Module):
        torch.manual_seed(3)
        model = Program(model)
    model = model.to(dtype).train(train)
    torch._dynamo.reset()
    counters.clear()
    result = Checked([], {})
    backend = direct_backend if inner is None else varlen_inductor
    settings = {"packing": packing, **({} if inner is None else {"inner_backend": inner}), **(knobs or {})}
    with quick(**settings), report.collect() as reports, watched_runs() as runs:
        compiled_model = copy.deepcopy(model)
        compiled = torch.compile(compiled_model, backend=backend, dynamic=dynamic, fullgraph=fullgraph)
        for batch in (inputs, *batches):
            cast = [_cast(x, dtype) for x in batch]
            reference = cast if clean is None else [_cast(x, dtype) for x in clean]
            with torch.no_grad():
                shown = tensors(copy.deepcopy(model)(*tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, reference)))
            masks = list(rows) if isinstance(rows, (list, tuple)) else [rows] * len(shown)
            cotangents = cotangents_for(shown, masks, exact)
            eager = _run(model, model, reference, cotangents, train)
            ours = _run(compiled_model, compiled, cast, cotangents, train)
            if clean is not None:
                for i, (x, given) in enumerate(zip(cast, reference, strict=True)):
                    if isinstance(x, Tensor) and not torch.equal(x, given):
                        ours.state.pop(f"input {i}")
                        eager.state.pop(f"input {i}")
            result.errors += compare(ours, eager, masks, tolerance or TOLERANCE[dtype], exact)
            result.ours, result.eager = ours, eager
    result.reports, result.counters = reports, dict(counters["varlen_inductor"])
    result.packed, result.padded = runs["packed"], runs["padded"]
    if raises:
        said = "\n".join(one.table() for one in reports)
        assert not result.errors, "\n".join(result.errors) + "\n" + said
    return result


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().to(dtype).requires_grad_(x.requires_grad)
    return x


def hidden(batch: int = BATCH, length: int = LENGTH, width: int = WIDTH, grad: bool = True) -> Tensor:
    """A random input (B, S, E) that requires a gradient."""
    return torch.randn(batch, length, width, dtype=torch.float64).requires_grad_(grad)


def poisoned(x: Tensor, valid: Tensor) -> Tensor:
    """``x`` with NaN at padded positions."""
    return torch.where(_at(valid, x), x.detach(), math.nan).requires_grad_(x.requires_grad)


def both_ways(test: Callable[..., Any]) -> Callable[..., Any]:
    """Run a test in both forms, in training and in inference."""
    return pytest.mark.parametrize(  # type: ignore[no-any-return]
        ("form", "train"),
        [
            pytest.param("model", True, id="model-train"),
            pytest.param("model", False, id="model-eval"),
            pytest.param("attention", True, id="attention-train"),
            pytest.param("attention", False, id="attention-eval", marks=pytest.mark.thorough),
        ],
    )(test)


def assert_packed(result: Checked, form: str, runs: int = 1) -> None:
    """The attentions run on valid tokens only; in the packed form the body ran ``runs`` times."""
    assert set(result.forms) == {"packed" if form == "model" else "zero rows"}, result.report.table()
    assert result.packed == (runs if form == "model" else 0), f"{result.packed} packed and {result.padded} padded runs"


def assert_leaks(result: Checked, operation: str) -> None:
    """The padded rows of every attention are computed, and the report names the operation that needs them."""
    assert set(result.forms) == {"exact"}, result.report.table()
    assert operation in result.reasons, result.reasons


def assert_left_alone(result: Checked, reason: str) -> None:
    """Nothing was rewritten, and the report says why."""
    assert not result.forms, result.report.table()
    assert not result.nodes_packed
    assert reason in result.reasons, result.reasons
