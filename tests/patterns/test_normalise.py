"""Normalised graphs compute what eager computes, and say what they cannot."""

from __future__ import annotations

import contextlib
import functools
import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tests.patterns import zoo
from tests.patterns.zoo import Captured, assert_same, captured, targets
from varlen_inductor.patterns import recompute
from varlen_inductor.patterns.normalise import NotNormalisable, normalise, replace_body

aten = torch.ops.aten


def bf16_autocast() -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


# ------------------------------------------------------------------------------------------------------ real models


@pytest.mark.parametrize(("name", "attention"), [*((name, "sdpa") for name in zoo.HF_MODELS), ("llama", "eager")])
def test_hugging_face(name: str, attention: str) -> None:
    model, inputs = zoo.hf_model(name, attention)
    assert_same(model.train(), inputs, Captured())


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_hugging_face_dynamic_shapes(name: str) -> None:
    model, inputs = zoo.hf_model(name, "sdpa")
    backend = Captured()
    assert_same(model.eval(), inputs, backend, dynamic=True)
    placeholders = [n for n in backend.graph.nodes if n.op == "placeholder"]
    assert any(isinstance(n.meta["val"], torch.SymInt) for n in placeholders)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "make",
    [zoo.Encoder, lambda: zoo.Encoder(norm_first=True), lambda: zoo.MultiHead(True), lambda: zoo.MultiHead(False, True)],
    ids=["encoder", "encoder_norm_first", "multi_head_weights", "multi_head_returned"],
)
def test_torch_nn(make: Any, training: bool) -> None:
    model = make().train(training)
    with contextlib.nullcontext() if training else torch.no_grad():
        assert_same(model, zoo.nn_inputs(), Captured(), backward=training)


def test_aot_autograd_takes_the_graph() -> None:
    """The normalised graph goes where a Dynamo graph goes, with dropout and parameters."""
    model, inputs = zoo.hf_model("bert", "sdpa")
    model.eval()
    assert_same(model, inputs, Captured(inner="aot_eager"))


def test_constants_under_aot_autograd() -> None:
    """A number is written into the graph, a tensor becomes an input whose source AOTAutograd is told."""
    backend = Captured(inner="aot_eager")
    assert_same(Constants(), zoo.hand_inputs(), backend)
    assert [n.target for n in backend.graph.nodes if n.op == "get_attr"] == ["_tensor_constant1"]
    assert [n.args[1] for n in backend.graph.nodes if n.target is aten.full.default] == [-3.0]


def test_constants_are_fakes_of_the_graph() -> None:
    """What is computed of them beside other values is computed in one fake mode."""
    gm = captured(lambda x: x[torch.tensor([2, 0, 1])], x=torch.randn(3, 4))
    (constant,) = gm.graph.find_nodes(op="get_attr")
    assert len({n.meta["val"].fake_mode for n in gm.graph.nodes if n.op != "output"}) == 1
    assert constant.meta["val"].shape == (3,)


def test_twelve_layers_take_well_under_a_second() -> None:
    import transformers

    config = transformers.BertConfig(
        num_hidden_layers=12, hidden_size=16, intermediate_size=16, num_attention_heads=2, vocab_size=50
    )
    times = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        for _ in range(2):
            start = time.perf_counter()
            normalise(gm)
            times.append(time.perf_counter() - start)
        return gm.forward

    torch.compile(transformers.BertModel(config), backend=backend)(torch.ones(2, 8, dtype=torch.long))
    assert min(times) < 4, "loose, for a busy machine: about 0.4 s on one core"


# ------------------------------------------------------------------------------------- what surrounds the operators


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=valid[:, None, None, :])


class Block(zoo.ByHand):
    def __init__(self) -> None:
        super().__init__(attend)


class AutocastInside(Block):
    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        with bf16_autocast():
            y = super().forward(x, valid)
        return y.float() + self.out(x)


class AutocastTwice(Block):
    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        with bf16_autocast():
            y = self.out(x)
            with torch.autocast("cpu", enabled=False):
                y = self.project(y.float())
            return (self.out(y[..., : zoo.WIDTH]) * valid[..., None]).float()


class ChosenCheckpoint(Block):
    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        chosen = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
        return checkpoint(super().forward, x, valid, use_reentrant=False, context_fn=chosen) + x


class Checkpointed(Block):
    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, valid, use_reentrant=False) + x


class NoGradRegion(Block):
    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = super().forward(x, valid)
        return super().forward(x, valid) * 2 - target


class Mutating(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        y = super().forward(x, valid)
        y += x
        y[:, 0] = 7
        return F.relu(y, inplace=True) * self.count


class DoubleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 2


class CustomFunction(Block):
    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return DoubleGradient.apply(super().forward(x, valid))


class Constants(Block):
    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        y = torch.where(valid[..., None], super().forward(x, valid), torch.tensor(-3.0))
        return y + torch.tensor([0.5] * zoo.WIDTH)


class Dropout(Block):
    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(F.dropout(x, 0.2), valid), 0.5, training=self.training)


class SubmodulesAndMethods(Block):
    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        y = super().forward(x, valid)
        return y.flatten(1).unflatten(1, (-1, 4)).movedim(1, 2).mT.contiguous().clamp(min=-1).type_as(x)[..., 1:]


EINSUMS = {"shared": "bhqd,bhkd->bhqk", "transposed": "bqhd,bkhd->bhqk"}


class Einsum(Block):
    def forward(self, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        y = self.project(x).unflatten(-1, (3, 4, -1))
        q, k, v = y.unbind(2)
        p = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", p, v).flatten(2)) + torch.einsum("ij,bsj->bsi", self.out.weight, x)


@pytest.mark.parametrize(
    "make",
    [
        Block,
        AutocastInside,
        AutocastTwice,
        Checkpointed,
        NoGradRegion,
        Mutating,
        CustomFunction,
        Constants,
        Dropout,
        SubmodulesAndMethods,
        Einsum,
    ],
    ids=lambda m: m.__name__,
)
def test_numbers_and_gradients(make: type[nn.Module]) -> None:
    tolerance = 2e-2 if make in (AutocastInside, AutocastTwice) else 1e-5
    assert_same(make(), zoo.hand_inputs(), Captured(), tolerance=tolerance)


@pytest.mark.parametrize("make", [Checkpointed, NoGradRegion, Mutating, SubmodulesAndMethods], ids=lambda m: m.__name__)
def test_numbers_and_gradients_dynamic_shapes(make: type[nn.Module]) -> None:
    assert_same(make(), zoo.hand_inputs(), Captured(), dynamic=True)


def test_values_are_those_under_autocast() -> None:
    backend = Captured()
    torch.compile(AutocastTwice(), backend=backend, fullgraph=True)(**zoo.hand_inputs())
    dtypes = [n.meta["val"].dtype for n in backend.graph.nodes if n.target is aten.linear.default]
    assert dtypes == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert sum("_exit_autocast" in t for t in targets(backend.graph)) == 2


@pytest.mark.parametrize("make", [Block, Checkpointed, CustomFunction, NoGradRegion, Mutating], ids=lambda m: m.__name__)
def test_numbers_and_gradients_under_autocast(make: type[nn.Module]) -> None:
    # What torch 2.13 makes of in-place writes under autocast has wrong gradients, with or without us.
    backend = Captured(inner=None if make is Mutating else "aot_eager")
    assert_same(make(), zoo.hand_inputs(), backend, context=bf16_autocast, tolerance=3e-2)
    if make is Block:
        linear = next(n for n in backend.graph.nodes if n.target is aten.linear.default)
        assert linear.meta["val"].dtype == torch.bfloat16, "values are those under autocast"
    assert not torch.is_autocast_enabled("cpu")


def test_checkpoint_is_recorded_in_its_place() -> None:
    backend = Captured()
    torch.compile(Checkpointed(), backend=backend, fullgraph=True)(**zoo.hand_inputs())
    assert not [n for n in backend.graph.nodes if isinstance(n.target, HigherOrderOperator)]
    calls = [n for n in backend.graph.nodes if n.op == "call_function"]
    assert [recompute.group_of(n) for n in calls if n.target is aten.scaled_dot_product_attention.default] == [0]
    assert recompute.group_of(calls[-1]) is None


def test_rule_13_higher_order_operators_stay_whole() -> None:
    backend = Captured()
    torch.compile(ChosenCheckpoint(), backend=backend, fullgraph=True)(**zoo.hand_inputs())
    (node,) = (n for n in backend.graph.nodes if isinstance(n.target, HigherOrderOperator))
    assert "checkpoint" in str(node.target)
    assert aten.scaled_dot_product_attention.default not in [n.target for n in backend.graph.nodes]
    taken = [n for n in backend.graph.nodes if n.op == "call_function" and node in n.all_input_nodes]
    value = taken[0].meta["val"]
    assert value.fake_mode is next(n for n in backend.graph.nodes if n.op == "placeholder").meta["val"].fake_mode


# ------------------------------------------------------------------------------------------- what the graph carries


def test_meta() -> None:
    model = Block()
    backend = Captured()
    torch.compile(model, backend=backend, fullgraph=True)(**zoo.hand_inputs())
    before, after = backend.before[0].graph, backend.graph
    old = [n for n in before.nodes if n.op == "placeholder"]
    new = [n for n in after.nodes if n.op == "placeholder"]
    assert [n.target for n in old] == [n.target for n in new]
    assert [n.name for n in old] == [n.name for n in new]
    for a, b in zip(old, new, strict=True):
        assert b.meta["example_value"] is a.meta["example_value"]
        assert a.meta.keys() <= b.meta.keys(), "what Inductor reads of parameters"
        assert b.meta["val"] is a.meta["example_value"]
    fake_mode = new[0].meta["val"].fake_mode
    for node in after.nodes:
        if node.op == "call_function":
            assert isinstance(node.target, OpOverload) or node.target.__module__ == "_operator"
            assert "def forward" not in node.meta["stack_trace"]
            assert "zoo.py" in node.meta["stack_trace"] or "test_normalise.py" in node.meta["stack_trace"]
            if isinstance(node.meta["val"], torch.Tensor):
                assert node.meta["val"].fake_mode is fake_mode


def test_requires_grad() -> None:
    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        mask = x > 0
        z = torch.zeros_like(x)
        z[:, 0] = w[:, 0]
        with torch.no_grad():
            n = w * 2
        return x * w.detach() + z + n + w * mask

    gm = captured(function, x=torch.randn(2, 2), w=torch.randn(2, 2, requires_grad=True))
    flags = {n.name: n.meta["requires_grad"] for n in gm.graph.nodes if n.op != "output"}
    assert flags["l_w_"]
    assert not flags["l_x_"]
    assert not flags["gt"]
    assert flags["zeros_like"], "it is written with a gradient"
    assert not flags["mul"], "made without grad mode"
    assert flags["mul_2"]


# ----------------------------------------------------------------------------------------------------- replace_body


def test_replace_body() -> None:
    model = Checkpointed()
    kept: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        metas = [n.meta for n in placeholders]
        replace_body(gm, normalise(gm))
        assert [n for n in gm.graph.nodes if n.op == "placeholder"] == placeholders
        assert all(n.meta is meta for n, meta in zip(placeholders, metas, strict=True))
        kept.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    inputs = zoo.hand_inputs()
    result = torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    torch.testing.assert_close(result, model(**inputs))
    assert all("val" in n.meta for n in kept[0].graph.nodes if n.op == "call_function")


def test_replace_body_keeps_constants_apart() -> None:
    """Both modules may have a constant of the same name."""

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        new = normalise(gm)
        gm.register_buffer("_tensor_constant0", torch.zeros(3), persistent=False)
        replace_body(gm, new)
        return gm.forward

    y = torch.compile(lambda x: x + torch.tensor([1.0, 2.0]), backend=backend, fullgraph=True)(torch.zeros(2))
    torch.testing.assert_close(y, torch.tensor([1.0, 2.0]))


def test_replace_body_wants_the_same_inputs() -> None:
    one, two = torch.fx.symbolic_trace(lambda x: x), torch.fx.symbolic_trace(lambda x, y: x + y)
    with pytest.raises(ValueError, match="placeholders"):
        replace_body(one, two)


# --------------------------------------------------------------------------------------------------------- refusals


class Refused:
    """A backend that keeps the reason and runs the original."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        try:
            normalise(gm)
        except NotNormalisable as refusal:
            self.reason = refusal.reason
        assert (grad, autocast) == (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
        return gm.forward


def refusal(function: Any, *args: Any, context: Any = contextlib.nullcontext) -> str:
    backend = Refused()
    with context():
        torch.compile(function, backend=backend)(*args)
    assert backend.reason is not None, "it was normalised"
    return backend.reason


def test_rule_15_function_transforms() -> None:
    assert "torch.func" in refusal(torch.vmap(lambda x: x.sin() * 2), torch.randn(3, 3))
    assert "torch.func" in refusal(lambda x: torch.func.grad(lambda y: y.sin().sum())(x), torch.randn(3))


def test_rule_15_saved_tensor_hooks() -> None:
    def context() -> Any:
        return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)

    assert "saved-tensor hooks" in refusal(lambda x: x.sin(), torch.randn(3, requires_grad=True), context=context)


def test_rule_15_tensor_subclasses() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    x = TwoTensor(torch.randn(3), torch.randn(3))
    assert "tensor subclass (" in refusal(lambda x: x.sin(), x)


def test_jagged_tensors_are_refused() -> None:
    x = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    assert "subclass (nested tensor)" in refusal(lambda x: x.sin(), x)


def test_inference_mode_inside_is_refused() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return x * 2

    assert refusal(function, torch.randn(3, 4)) == "it enters inference mode inside the graph"


def test_a_choice_of_kernel_inside_is_refused() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return F.scaled_dot_product_attention(x, x, x)

    assert "selects an attention kernel" in refusal(function, torch.randn(1, 3, 4))


@pytest.mark.parametrize("inner", [None, "aot_eager"])
def test_sizes_that_depend_on_data(inner: str | None) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        positive = (x > 0).nonzero()
        return x[positive[:, 0]].sum(0) + torch.arange((x[:, 0] > 0).sum().item()).sum()

    x = torch.randn(6, 4)
    with torch._dynamo.config.patch(capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True):
        result = torch.compile(function, backend=Captured(inner=inner), fullgraph=True)(x)
    torch.testing.assert_close(result, function(x))


def test_inference_mode_outside() -> None:
    model, inputs = Block(), zoo.hand_inputs()
    with torch.inference_mode():
        assert_same(model, inputs, Captured(inner="aot_eager"), backward=False)


def test_metadata_writes_are_refused() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        y.t_()
        return y * 2

    assert "changes a tensor's shape in place (.t_)" in refusal(function, torch.randn(3, 4))


def test_a_failure_inside_autocast_restores_it() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            y = x + 1
            y.t_()
        return y

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        for node in gm.graph.nodes:
            if node.target == "t_":
                node.target = "no_such_method"
        with pytest.raises(NotNormalisable, match="could not be retraced"):
            normalise(gm)
        assert not torch.is_autocast_enabled("cpu")
        assert torch.is_grad_enabled()
        for node in gm.graph.nodes:
            if node.target == "no_such_method":
                node.target = "t_"
        gm.recompile()
        return gm.forward

    torch.compile(function, backend=backend)(torch.randn(3, 4))


def test_module_calls_are_refused() -> None:
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(NotNormalisable, match="calls the module '0'"):
        normalise(gm)
