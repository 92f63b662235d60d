"""Plan and body at run time: which of the two graphs runs, how often anything is compiled, and that nothing runs eagerly."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from packed_models import (
    LENGTHS,
    B,
    Blocks,
    S,
    assert_gradients_close,
    assert_rows_close,
    compare_with_eager,
    compile_,
    feature_batch,
    graphs_compiled,
    packing,
    steps,
)
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._functorch.aot_autograd import make_boxed_func

from helpers import run_python
from varlen_inductor import config, nested, runtime
from varlen_inductor.lowering.quick_launches import FIRST
from varlen_inductor.ops import backends
from varlen_inductor.ops import packing as packing_ops
from varlen_inductor.ops.backends import cpu, kept
from varlen_inductor.ops.problem import Layout, Rule
from varlen_inductor.patterns import wanted

Batches = Sequence[dict[str, Tensor]]
TRAIN = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
NO_RECOMPILES = {"error_on_recompile": True}


def random_lengths(batches: int, rows: int = B, size: int = S) -> list[list[int]]:
    return [[int(n) for n in torch.randint(1, size, (rows,))] for _ in range(batches)]


def dynamo_graphs() -> int:
    return counters["stats"]["unique_graphs"]


class Pair:
    """A model twice: under the backend, and eagerly. A call runs both and compares."""

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        self.model = model
        self.ours = copy.deepcopy(model)
        self.compiled = compile_(self.ours, **kwargs)

    def __call__(self, batch: dict[str, Tensor], tolerance: float = 2e-5) -> Tensor:
        found, expected = self.compiled(**batch), self.model(**batch)
        valid = batch["attention_mask"]
        assert_rows_close(found, expected, valid, tolerance)
        if torch.is_grad_enabled():
            cotangent = torch.randn_like(expected) * valid.unsqueeze(-1)
            for model, result in ((self.ours, found), (self.model, expected)):
                model.zero_grad()
                result.backward(cotangent)
            assert_gradients_close(self.ours, self.model, tolerance)
        return found

    def train(self, mode: bool) -> None:
        self.ours.train(mode)
        self.model.train(mode)


# --- compiled once -----------------------------------------------------------------------------------------------------------


@TRAIN
def test_thirty_batches_compile_once(train: bool) -> None:
    pair = Pair(Blocks())
    with packing(), torch._dynamo.config.patch(NO_RECOMPILES), torch.set_grad_enabled(train):
        for lengths in random_lengths(29):
            pair(feature_batch(lengths))
        pair(feature_batch([S, S, S]))
    assert steps() == (29, 1)
    assert dynamo_graphs() == 3  # the model's, its body, its padded form
    assert graphs_compiled() == 2


def test_two_grad_modes_are_two_graphs_each() -> None:
    pair = Pair(Blocks())
    with packing():
        for train in (True, False, True, False):
            pair.train(train)
            for lengths in random_lengths(3):
                with torch.set_grad_enabled(train):
                    pair(feature_batch(lengths))
    assert steps() == (12, 0)
    assert graphs_compiled() == 2


def test_more_graphs_than_one_code_object_may_have() -> None:
    """Dynamo gives up on a code object after eight compiles and goes on eagerly; no two bodies may share one."""
    with packing():
        for width in range(4, 44, 4):
            model = Blocks(width, layers=1, heads=2).eval()

            def call(x: Tensor, attention_mask: Tensor, model: nn.Module = model) -> Tensor:
                return model(x, attention_mask)

            compiled, batch = compile_(nested.with_own_code(call), fullgraph=True), feature_batch(LENGTHS[0], width=width)
            with torch.no_grad():
                assert_rows_close(compiled(**batch), model(**batch), batch["attention_mask"], 2e-5)
    assert graphs_compiled() == 10
    assert steps() == (10, 0)


@TRAIN
def test_first_batch_all_valid(train: bool) -> None:
    pair = Pair(Blocks())
    with packing(), torch._dynamo.config.patch(NO_RECOMPILES), torch.set_grad_enabled(train):
        for lengths in ([S] * B, *LENGTHS, [S] * B):
            pair(feature_batch(lengths))
    assert steps() == (2, 2)
    assert graphs_compiled() == 2


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("first", [True, False], ids=["at first", "later"])
def test_as_many_tokens_as_another_size(train: bool, first: bool) -> None:
    """24 positions, 32 features, 8 in a head, 4 heads, 64 hidden features: none of them is the number of tokens."""
    pair = Pair(Blocks())
    counts = [24, 32, 8, 4, 64, 16]
    batches = [feature_batch([n - 2, 1]) if n <= 24 else feature_batch([23, 20, max(1, n - 44)][:3]) for n in counts]
    if not first:
        batches.insert(0, feature_batch([11, 2]))
    batches = [pad_batch(batch) for batch in batches]
    with packing(), torch._dynamo.config.patch(NO_RECOMPILES), torch.set_grad_enabled(train):
        for batch in batches:
            pair(batch)
    assert steps()[1] == 0
    assert graphs_compiled() == 1


def pad_batch(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """To B rows; the new ones have one token each."""
    missing = B - batch["x"].shape[0]
    return {
        "x": torch.cat([batch["x"], torch.randn(missing, *batch["x"].shape[1:])]),
        "attention_mask": torch.cat([batch["attention_mask"], (torch.arange(S) == 0).expand(missing, S)]),
    }


@TRAIN
def test_symbolic_sizes_that_coincide(train: bool) -> None:
    """Where batch and length are symbols too, equal sizes at the first call would become one symbol."""
    pair = Pair(Blocks(), dynamic=True)
    shapes = [([3, 2, 2, 1, 1, 1, 1, 1], 12), ([7, 3], 16), ([5, 4, 9], 9), ([16, 1, 1, 1], 16), ([2] * 12, 24)]
    with packing(), torch.set_grad_enabled(train):
        for lengths, size in shapes:
            pair(feature_batch(lengths, size))
        compiled = graphs_compiled()
        for lengths, size in (([30, 2, 5], 31), ([1, 9], 48), ([3] * 9, 10)):
            pair(feature_batch(lengths, size))
        assert graphs_compiled() == compiled <= 2


def test_more_than_4096_tokens_in_training() -> None:
    """Inductor chooses other kernels for reductions beyond 4096 rows and guards on it."""
    pair = Pair(Blocks(16, layers=1, heads=2))
    with packing("inductor"):
        for lengths in ([30, 500, 7, 1], [1200, 1500, 1400, 1300], [1400, 10, 900, 1500]):
            pair(feature_batch(lengths, 1536, 16), 2e-4)
    assert steps() == (3, 0)
    assert 1 <= graphs_compiled() <= 2


# --- grad modes --------------------------------------------------------------------------------------------------------------

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "enable_grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


@pytest.mark.parametrize("first", list(MODES))
def test_grad_modes_in_turn(first: str) -> None:
    pair = Pair(Blocks())
    with packing():
        for _ in range(2):
            for mode in (first, *MODES):
                with MODES[mode]():
                    for lengths in LENGTHS:
                        pair(feature_batch(lengths))
    assert steps() == (16, 0)
    assert graphs_compiled() <= 3


def test_train_and_eval_in_turn() -> None:
    """With dropout: what evaluation gives must be deterministic, whatever was compiled before."""
    pair = Pair(Blocks(dropout=0.5))
    with packing():
        for training in (True, False, True, False):
            pair.train(training)
            if training:
                batch = feature_batch(LENGTHS[0])
                one, other = pair.compiled(**batch), pair.compiled(**batch)
                assert not torch.equal(one, other)
            else:
                pair(feature_batch(LENGTHS[1]))
    assert steps() == (6, 0)


# --- the padded graph runs -----------------------------------------------------------------------------------------------------


@TRAIN
def test_dense_batches_run_padded(train: bool) -> None:
    batches = [feature_batch([S, S, n]) for n in (S, S - 2, 2)]
    outcome = compare_with_eager(Blocks(), batches, train=train, packed_steps=1)
    assert [seen.is_body for seen in outcome.seen] == [False, True]


DENSE, SPARSE = feature_batch([S, S, S]), feature_batch([5, 2, 7])


def run_in_turn(compiled: Callable[..., Any], *batches: dict[str, Tensor]) -> list[str]:
    """Which of the two graphs ran for each batch; each result is compared with the model's own."""
    ran = []
    for batch in batches:
        packed = steps()[0]
        found = compiled(**batch)
        with torch.compiler.set_stance("force_eager"):
            assert_rows_close(found, compiled(**batch), batch["attention_mask"], 2e-5)
        ran.append("packed" if steps()[0] > packed else "padded")
    return ran


def test_after_dense_batches_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch then runs padded until one that was worth packing was seen; from there on it is as at first."""
    monkeypatch.setattr(runtime, "LOOKS_BACK_ON", ("cpu",))
    monkeypatch.setattr(runtime, "PATIENCE", 2)
    asked: list[runtime._Pending] = []
    counts = runtime._Pending.counts
    monkeypatch.setattr(runtime._Pending, "counts", lambda self: (asked.append(self), counts(self))[1])
    with packing(inner="eager"), torch.no_grad():
        compiled = compile_(Blocks().eval())
        assert run_in_turn(compiled, DENSE, SPARSE, DENSE, DENSE) == ["padded", "packed", "padded", "padded"]
        before = len(asked)
        assert run_in_turn(compiled, DENSE) == ["padded"] and len(asked) == before
        assert run_in_turn(compiled, SPARSE) == ["padded"], "nobody has looked yet"
        assert run_in_turn(compiled, SPARSE, DENSE, SPARSE) == ["packed", "padded", "packed"]
        assert run_in_turn(compiled, DENSE, DENSE, DENSE, DENSE, SPARSE) == ["padded"] * 5
    assert len(set(map(id, asked))) == len(asked), "what a kernel gives the host is read once"


@pytest.mark.parametrize("why", ["gradients", "random numbers"])
def test_a_step_that_may_be_computed_again_is_always_looked_at(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpointing calls it twice with one batch: both must be the same graph."""
    monkeypatch.setattr(runtime, "LOOKS_BACK_ON", ("cpu",))
    monkeypatch.setattr(runtime, "PATIENCE", 1)
    model = nn.Sequential()
    model.blocks, model.dropout = Blocks(), nn.Dropout(0.5)
    forward = lambda x, attention_mask: model.dropout(model.blocks(x, attention_mask))  # noqa: E731
    with packing(inner="aot_eager"), torch.set_grad_enabled(why == "gradients"):
        compiled = compile_(model.blocks if why == "gradients" else forward)
        for batch, expected in ((DENSE, (0, 1)), (DENSE, (0, 2)), (DENSE, (0, 3)), (SPARSE, (1, 3))):
            compiled(**batch)
            assert steps() == expected


def test_density_is_a_knob() -> None:
    batches = [feature_batch(lengths) for lengths in ([12, 12, 11], [12, 12, 13])]
    compiled = compile_(
        Blocks(), options={"varlen.max_density": 0.5, "varlen.inner_backend": "aot_eager", "varlen.round_tokens": 4}
    )
    with torch.no_grad():
        for batch in batches:
            compiled(**batch)
    assert steps() == (1, 1)
    assert graphs_compiled() == 2


def test_smallest_size_is_a_knob() -> None:
    """Whether a batch is that small is known from its shape: nothing waits for the device."""
    options = {"varlen.min_positions": 3 * S + 1, "varlen.inner_backend": "aot_eager", "varlen.round_tokens": 4}
    compiled = compile_(Blocks(), options=options)
    with torch.no_grad():
        compiled(**feature_batch([5, 2, 7]))
        compiled(**feature_batch([5, 2, 7, 1]))
    assert steps() == (1, 1)


def test_a_size_that_is_too_small_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it cannot change: the plan would be work for nothing in every step."""
    plans: list[int] = []
    plan = runtime.PackedProgram._look
    monkeypatch.setattr(runtime.PackedProgram, "_look", lambda self, *args: (plans.append(1), plan(self, *args))[1])
    for dynamic, looks in ((False, 1), (True, 3)):
        options = {"varlen.min_positions": 3 * S + 1, "varlen.inner_backend": "aot_eager", "varlen.round_tokens": 4}
        compiled = compile_(Blocks(), dynamic=dynamic, options=options)
        plans.clear()
        with torch.no_grad():
            for lengths in ([5, 2, 7], [1, 1, 3], [9, 2, 1]):
                compiled(**feature_batch(lengths))
        assert len(plans) == looks
    assert steps() == (0, 6)


@TRAIN
def test_the_longest_sequences_come_first(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    def spy(*args: Any) -> tuple[Tensor, ...]:
        found = plan_packed(*args)
        seen.append(found[2].diff().tolist()[:-1])
        return found

    plan_packed = packing_ops.plan_packed
    monkeypatch.setattr(packing_ops, "plan_packed", spy)
    run = Pair(Blocks())
    run.train(train)
    with packing(), torch.set_grad_enabled(train):
        for lengths in ([2, 9, 5], [0, 3, 3]):
            run(feature_batch(lengths))
    assert seen == [[9, 5, 2], [3, 3, 0]]


@TRAIN
def test_recorded_by_the_user(train: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Inside of a CUDA graph nothing is found out about the data, nothing packed, and nothing compiled."""
    run = Pair(Blocks())
    run.train(train)
    monkeypatch.setattr(logging.getLogger("varlen_inductor"), "propagate", True)
    recording = False
    monkeypatch.setattr(runtime, "_records_users_graph", lambda devices: recording)
    with packing(), torch.set_grad_enabled(train):
        run(feature_batch(LENGTHS[0]))
        compiled, recording = graphs_compiled(), True
        for lengths in LENGTHS:
            run(feature_batch(lengths))
        assert graphs_compiled() == compiled
        assert steps() == (1, len(LENGTHS))
        assert caplog.text.count("a CUDA graph is being recorded") == len(LENGTHS)
        recording = False
        run(feature_batch([S] * B))
        assert graphs_compiled() > compiled
        recording = True
        run(feature_batch(LENGTHS[1]))
        assert caplog.text.count("a CUDA graph is being recorded") == len(LENGTHS)


@pytest.mark.parametrize(
    ("recording", "devices", "found"), [(True, ["cuda"], True), (True, ["cpu"], False), (False, ["cuda"], False)]
)
def test_only_what_runs_on_cuda_is_recorded(
    recording: bool, devices: list[str], found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
    assert runtime._records_users_graph(map(torch.device, devices)) == found


@TRAIN
def test_nothing_valid_runs_padded(train: bool) -> None:
    batches = [feature_batch([0, 0, 0]), *map(feature_batch, LENGTHS)]
    compare_with_eager(Blocks(), batches, train=train, packed_steps=2)


def test_some_sequences_empty() -> None:
    batches = [feature_batch([0, 5, 0]), feature_batch([1, 0, 9])]
    compare_with_eager(Blocks(), batches, train=True)


class First(nn.Module):
    """Reads the first position of each sequence, which is right only if it is valid."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = Blocks(), nn.Linear(32, 2)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.blocks(x, attention_mask)[:, 0])


@TRAIN
def test_false_fact_runs_padded(train: bool) -> None:
    batches = [feature_batch(lengths) for lengths in LENGTHS * 2]
    batches[1]["attention_mask"] = batches[1]["attention_mask"].flip(1)
    batches[2]["attention_mask"][0, 0] = False
    outcome = compare_with_eager(First(), batches, train=train, packed_steps=2)
    assert "position 0 of every sequence is valid" in outcome.reasons


class Gated(nn.Module):
    """Saves slices of a projection for the backward, whose strides a copy does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask[:, None, None, :])
        return self.out((y * q.sigmoid()).transpose(1, 2).flatten(2)) * attention_mask[..., None]


def test_hooks_on_saved_tensors_are_never_silently_wrong() -> None:
    """No guard knows of hooks that come later. What they give back in other strides is refused, however often the code has run."""
    model, batch = Gated(), feature_batch([S, 5, 2])
    compiled = torch.compile(model, backend="varlen_inductor", options={"varlen.round_tokens": 4, "varlen.min_positions": 0})
    copied = torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(memory_format=torch.contiguous_format), lambda x: x)
    for _ in range(2 * FIRST):
        compiled(**batch).square().sum().backward()
    with copied:
        result = compiled(**batch)
    with pytest.raises(AssertionError, match="stride"):
        result.square().sum().backward()
    assert steps() == (2 * FIRST + 1, 0)


# --- eager, where the user asks for it, and only there ---------------------------------------------------------------------------


def test_force_eager() -> None:
    pair = Pair(Blocks())
    with packing():
        with torch.compiler.set_stance("force_eager"):
            pair(feature_batch(LENGTHS[0]))
        assert graphs_compiled() == 0 and steps() == (0, 0)
        pair(feature_batch(LENGTHS[0]))
        with torch.compiler.set_stance("force_eager"):
            pair(feature_batch(LENGTHS[1]))
        assert graphs_compiled() == 1 and steps() == (1, 0)


def test_fail_on_recompile_after_a_warm_up() -> None:
    """Which of our two graphs a batch takes is no concern of the user's."""
    pair = Pair(Blocks())
    with packing():
        pair(feature_batch(LENGTHS[0]))
        with torch.compiler.set_stance("fail_on_recompile"):
            pair(feature_batch([S] * B))
            for lengths in random_lengths(4):
                pair(feature_batch(lengths))
            with pytest.raises(RuntimeError, match="recompile"):
                pair(feature_batch([3, 2], 7))
    assert steps() == (5, 1)


def test_dynamo_disabled() -> None:
    for variable in ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE"):
        said = run_python(
            """
            import sys; sys.path.append("tests")
            import torch
            from helpers import MaskedAttention, padded_batch
            from varlen_inductor.backend import register_by_name

            register_by_name()
            model, batch = MaskedAttention(), padded_batch()
            assert torch.equal(torch.compile(model, backend="varlen_inductor")(*batch), model(*batch))
            print(dict(torch._dynamo.utils.counters["varlen_inductor"]))
            """,
            **{variable: "1"},
        )
        assert said == "{}"


class Unfriendly(nn.Module):
    """Dynamo cannot capture the whole of it; what it does capture holds no whole attention."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = Blocks(layers=1), Blocks(layers=1)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.before(x, attention_mask)
        torch._dynamo.graph_break()
        return self.after(x, attention_mask)


def test_graph_breaks() -> None:
    """Each part is a graph of its own; what the first hands on is exact, for nobody knows who reads it."""
    outcome = compare_with_eager(Unfriendly(), [feature_batch(lengths) for lengths in LENGTHS], packed_steps=2)
    assert [one.form for report in outcome.reports for one in report.rewritten] == ["exact", "packed"]


@pytest.mark.parametrize("strict", [True, False])
def test_body_that_does_not_compile(strict: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A packed graph that the inner compiler cannot digest: the padded one runs, and the log says so."""
    calls = []

    def picky(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        calls.append(gm)
        if gm.graph.find_nodes(op="call_function", target=torch.ops.varlen_inductor.pack.default):
            raise RuntimeError("cannot digest this")
        return torch._dynamo.lookup_backend("aot_eager")(gm, example_inputs)

    torch._dynamo.register_backend(picky, name=f"varlen_picky_{strict}")  # type: ignore[arg-type]
    model = Blocks()
    with config.patch(inner_backend=f"varlen_picky_{strict}", strict=strict, round_tokens=4):
        compiled = compile_(model)
        with pytest.raises(Exception, match="cannot digest this") if strict else nullcontext():
            for lengths in LENGTHS * 2:
                batch = feature_batch(lengths)
                assert_rows_close(compiled(**batch), model(**batch), batch["attention_mask"], 2e-5)
    if not strict:
        assert len(calls) == 2
        assert steps() == (0, 4)
        assert graphs_compiled() == 1
        assert "cannot digest this" in caplog.text


# --- Inductor's modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes(mode: str) -> None:
    pair = Pair(Blocks(layers=1), mode=mode)
    with packing("inductor"):
        for lengths in LENGTHS:
            pair(feature_batch(lengths))
    assert steps() == (2, 0)
    assert graphs_compiled() == 1


@pytest.mark.parametrize(
    ("cuda_graphs", "kernels", "expected"),
    [(False, "auto", "auto"), (True, "auto", "fastest"), (True, "math", "math")],
)
def test_replayed_graphs_ask_for_the_fastest_kernel(cuda_graphs: bool, kernels: str, expected: str) -> None:
    """In the graph itself, so that a forward and its backward agree: with dropout they must be the same kernel's."""
    asked: list[tuple[str, Any]] = []

    def seen(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        for name in ("varlen_attn", "varlen_attn_backward"):
            for node in gm.graph.find_nodes(op="call_function", target=getattr(torch.ops.varlen_inductor, name).default):
                asked.append((name, node.kwargs["kernels"]))
        return make_boxed_func(gm.forward)

    name = f"varlen_asked_{cuda_graphs}_{kernels}"
    torch._dynamo.register_backend(aot_autograd(fw_compiler=seen, bw_compiler=seen), name=name)  # type: ignore[arg-type]
    batch = feature_batch(LENGTHS[0])
    with config.patch(inner_backend=name, round_tokens=4, kernels=kernels):
        compiled = compile_(Blocks(dropout=0.2), options={"triton.cudagraphs": cuda_graphs})
        result = compiled(**batch)
        assert config.kernels == kernels
    result.square().sum().backward()
    assert steps() == (1, 0)
    assert sorted(asked) == [("varlen_attn", expected)] * 2 + [("varlen_attn_backward", expected)] * 2


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_layers_know_that_offsets_stay(cuda_graphs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one layer of a step finds out, the next may use, and no other step; never in the memory of CUDA graphs."""
    asked: list[Any] = []

    def forward_drawn(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: Rule, wants_lse: bool) -> Any:
        asked.append(kept.with_tensor(layout.cu_seq_q))
        assert not wants_lse
        return cpu.BACKEND.forward(query, key, value, layout, rule)[0], None

    alone = dataclasses.replace(cpu.BACKEND, forward_drawn=forward_drawn)
    monkeypatch.setattr(backends, "BACKENDS", tuple(alone if x is cpu.BACKEND else x for x in backends.BACKENDS))
    backends.choose.cache_clear()
    try:
        model = Blocks(layers=2).eval()
        with packing("inductor"), torch.no_grad():
            compiled = compile_(model, options={"triton.cudagraphs": cuda_graphs})
            for lengths in (*LENGTHS, LENGTHS[0]):
                batch = feature_batch(lengths)
                assert_rows_close(compiled(**batch), model(**batch), batch["attention_mask"], 2e-5)
    finally:
        backends.choose.cache_clear()
    assert steps() == (3, 0)
    assert len(asked) == 6
    if cuda_graphs:
        assert asked == [None] * 6
    else:
        first, second = asked[::2], asked[1::2]
        assert all(x is not None and x is y for x, y in zip(first, second, strict=True))
        assert len({id(x) for x in first}) == 3


def test_other_threads_do_not_see_what_a_graph_wants() -> None:
    with wanted.for_graph(replayed=True), ThreadPoolExecutor(1) as pool:
        assert wanted.kernels() == "fastest"
        assert pool.submit(wanted.kernels).result() == config.kernels == "auto"
    assert wanted.kernels() == "auto"
