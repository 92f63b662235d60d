"""Rules 6, 10, 14, 15 and 16 of the contract: writes, pieces of programs, layouts and sharing of memory, what is left alone."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soundness.harness import (
    BATCH,
    FORMS,
    HEADS,
    LENGTH,
    WIDTH,
    Program,
    SelfAttention,
    assert_packed,
    both_ways,
    causal,
    check,
    direct_backend,
    hidden,
    keys,
    mask_of,
    quick,
)
from varlen_inductor import report

RIGHT = mask_of("right")


# --- rule 6: writes --------------------------------------------------------------------------------------------------


def _doubled_then_tripled(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    y = m.linear(m.a(x, keys(valid)))
    z = y * 2
    y.mul_(3.0)
    return m.linear(y + z)


def _first_set(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    y = m.linear(m.a(x, keys(valid)))
    y[:, 0] = 7.0
    return m.linear(m.b(y, keys(valid)))


def _padding_set(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    y = m.linear(x)
    y[~valid] = 0
    return m.a(y, keys(valid))


def _features_set(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    y = m.a(x, keys(valid)) * 1
    y[..., :3] = y[..., 3:6] + 1
    y[..., -1] += 2
    return m.b(y, keys(valid))


def _mask_filled(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    mask = torch.zeros(BATCH, 1, 1, LENGTH, dtype=x.dtype)
    mask.masked_fill_(~keys(valid), float("-inf"))
    return m.a(x, mask)


def _mask_slice_filled(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    """The way old HF models add padding to a causal mask."""
    position = torch.arange(LENGTH)
    mask = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=x.dtype).masked_fill(position[None] > position[:, None], -3e38)
    mask[..., :LENGTH].masked_fill_(~keys(valid), -3e38)
    return m.a(x, mask)


def _written_without_grad(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    y = m.linear(m.a(x, keys(valid)))
    z = y * 2
    with torch.no_grad():
        y.mul_(3)
    return m.linear(y) + z


WRITES = {
    "a hidden state": (_doubled_then_tripled, "packed"),
    "a position": (_first_set, "packed"),
    "padding": (_padding_set, "packed"),
    "features": (_features_set, "packed"),
    "a mask": (_mask_filled, "packed"),
    "a slice of a mask": (_mask_slice_filled, "packed"),
    "under no_grad": (_written_without_grad, "any"),
}


@both_ways
@pytest.mark.parametrize("mask", ["right", "left"])
@pytest.mark.parametrize("name", WRITES)
def test_rule_06_writes(name: str, mask: str, form: str, train: bool) -> None:
    body, expected = WRITES[name]
    valid = mask_of(mask)
    result = check(body, (hidden(), valid), valid, packing=form, train=train)
    if expected == "packed":
        assert_packed(result, form)


def _prefix_visible(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    mask = causal(valid).clone()
    mask[..., :4] = True
    return m.a(x, mask)


def _prefix_filled(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    mask = torch.zeros(BATCH, 1, LENGTH, LENGTH, dtype=x.dtype).masked_fill(~causal(valid), float("-inf"))
    mask[..., :4].fill_(0.0)
    return m.a(x, mask)


def _prefix_or(m: Any, x: Tensor, valid: Tensor) -> Tensor:
    return m.a(x, causal(valid) | (torch.arange(LENGTH) < 4))


@both_ways
@pytest.mark.parametrize("body", [_prefix_visible, _prefix_filled, _prefix_or])
def test_rule_06_a_mask_that_was_opened_again(body: Any, form: str, train: bool) -> None:
    """A prefix that every query sees is no causal padding mask."""
    result = check(body, (hidden(), mask_of("left")), None, packing=form, train=train)
    assert not result.forms


@both_ways
def test_rule_06_written_inputs_are_outputs(form: str, train: bool) -> None:
    """An input, and a buffer, that keep what the model wrote: exact, and not packed before a write that comes later."""

    class Cache(Program):
        def __init__(self) -> None:
            super().__init__(self.run)
            self.register_buffer("seen", torch.zeros(BATCH, LENGTH, WIDTH))
            self.register_buffer("steps", torch.zeros(()))

        def run(self, m: Any, x: Tensor, valid: Tensor, cache: Tensor) -> Tensor:
            cache.add_(1)
            y = m.a(x + cache, keys(valid))
            cache.mul_(2)
            y = m.linear(y + cache)
            with torch.no_grad():
                m.seen.copy_(y)
                m.steps.add_(1)
            return y

    given = (hidden(), RIGHT, hidden(grad=False))
    result = check(Cache(), given, RIGHT, packing=form, train=train, batches=[(hidden(), RIGHT, hidden(grad=False))])
    assert set(result.forms) == {"exact"}


@both_ways
def test_rule_06_written_inputs_are_returned(form: str, train: bool) -> None:
    """What is returned was written once, though the output is a view of an input."""

    def body(m: Any, x: Tensor, valid: Tensor, cache: Tensor) -> tuple[Tensor, ...]:
        cache.add_(1)
        return m.linear(m.a(x, keys(valid))), cache, cache.view(-1), cache[:, 0]

    given = (hidden(), RIGHT, hidden(grad=False))
    assert_packed(check(body, given, (RIGHT, None, None, None), packing=form, train=train), form)


@both_ways
def test_rule_06_a_view_of_what_is_written(form: str, train: bool) -> None:
    """A view made before a write and read behind it shows what was written."""

    def body(m: Any, x: Tensor, valid: Tensor, cache: Tensor) -> Tensor:
        view = cache.view(BATCH, LENGTH, WIDTH)
        y = m.a(x + view, keys(valid))
        cache.mul_(2)
        return m.linear(y + view)

    result = check(body, (hidden(), RIGHT, hidden(grad=False).flatten(0, 1)), RIGHT, packing=form, train=train)
    assert_packed(result, form)


class Held:
    def __init__(self, last: Any) -> None:
        self.last = last


class Keeping(Program):
    """Keeps what a layer gave in some object, to which its next call adds the mean over all positions."""

    def __init__(self, way: str) -> None:
        super().__init__(Keeping.run)
        self.way = way
        self.register_buffer("memory", torch.zeros(BATCH, LENGTH, WIDTH))
        self.attribute = torch.zeros(BATCH, LENGTH, WIDTH)
        self.listed, self.named, self.held = [self.attribute], {"last": self.attribute}, Held(self.attribute)
        if way == "a hook":
            self.linear.register_forward_hook(partial(Keeping.note, self.named))

    @staticmethod
    def note(named: dict[str, Tensor], module: nn.Module, args: Any, y: Tensor) -> None:
        named["last"] = y.detach()

    def run(self, x: Tensor, valid: Tensor) -> Any:
        kept = [self.memory, self.attribute, self.listed[-1], self.named["last"], self.held.last]
        y = self.linear(self.a(x + sum(z.mean(1, keepdim=True) for z in kept), keys(valid)))
        z = y.detach()
        match self.way:
            case "a buffer":
                self.memory = z
            case "an attribute":
                self.attribute = z
            case "a list":
                self.listed.append(z)
            case "a dictionary":
                self.named["last"] = z
            case "an object":
                self.held.last = z
            case "within a new tuple":
                self.held.last = (z, 1)[0]
            case "what is returned":
                self.attribute = y
            case "new objects":
                return Held([y]).last[0]
        return y

    def state(self) -> list[Tensor]:
        return [self.memory, self.attribute, *self.listed, *self.named.values(), self.held.last]


KEPT_IN = "a buffer,an attribute,a list,a dictionary,an object,within a new tuple,a hook,what is returned,new objects".split(",")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", KEPT_IN)
def test_rule_06_kept_by_objects(way: str, form: str) -> None:
    """What outlives the call may be read by the next one: it is exact, though to the graph it is an output like any other."""
    torch.manual_seed(3)
    torch._dynamo.reset()
    model = Keeping(way).double().eval()
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend=direct_backend, fullgraph=True)
    with quick(packing=form), torch.no_grad(), report.collect() as reports:
        for _ in range(3):
            given = hidden()
            expected, found = model(given, RIGHT), compiled(given, RIGHT)
            torch.testing.assert_close(found[RIGHT], expected[RIGHT])
            torch.testing.assert_close(other.state(), model.state())
    forms = {site.form for one in reports for site in one.sites}
    assert forms == ({"packed" if form == "model" else "zero rows"} if way == "new objects" else {"exact"})


class Settings(Program):
    """Changes what is no tensor, as models from transformers do with their configuration at each call."""

    def __init__(self, value: Any) -> None:
        super().__init__(Settings.run)
        self.value, self.table, self.held = value, {"value": value}, Held(value)

    def run(self, x: Tensor, valid: Tensor) -> Tensor:
        self.chosen, self.held.last = self.value, self.value
        self.table["chosen"] = self.value
        return self.linear(self.a(x, keys(valid)))


NO_TENSORS = ["sdpa", 3, 0.5, None, True, torch.float32, (1, 2), [1, "a"], {"b": 2}, {1, 2}, nn.ReLU(), abs]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", NO_TENSORS, ids=str)
def test_rule_06_objects_without_tensors(value: Any, form: str) -> None:
    result = check(Settings(value), (hidden(), RIGHT), RIGHT, packing=form)
    assert_packed(result, form)


@pytest.mark.parametrize("form", FORMS)
def test_rule_06_running_statistics(form: str) -> None:
    class Normed(Program):
        def __init__(self) -> None:
            super().__init__(lambda m, x, v: m.b(m.bn(m.a(x, keys(v)).transpose(1, 2)).transpose(1, 2), keys(v)))
            self.bn = nn.BatchNorm1d(WIDTH)

    result = check(Normed(), (hidden(), RIGHT), RIGHT, packing=form)
    assert result.forms[0] == "exact"


@pytest.mark.parametrize("form", FORMS)
def test_rule_06_the_plan_writes_nothing(form: str) -> None:
    """A mask that is counted from an input which the graph itself advances."""

    def body(m: Any, x: Tensor, steps: Tensor) -> Tensor:
        valid = steps.add_(1).cumsum(1) <= LENGTH
        return m.linear(m.a(x, keys(valid)))

    valid = torch.arange(1, LENGTH + 1).expand(BATCH, -1) * 2 <= LENGTH
    result = check(body, (hidden(), torch.ones(BATCH, LENGTH, dtype=torch.long)), valid, packing=form)
    assert set(result.forms) == {"zero rows"}


# --- rule 10: the graph is not the program ---------------------------------------------------------------------------


class Encoder(nn.Module):
    """Two attentions with a graph break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = SelfAttention(), SelfAttention()

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        x = self.a(x, keys(valid))
        torch._dynamo.graph_break()
        return self.b(x, keys(valid))


class Pooled(nn.Module):
    """Calls an encoder that breaks, then needs every row of what it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return self.encoder(x, valid).mean(1)


class Looped(nn.Module):
    """The encoder is called from code that Dynamo leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SelfAttention()

    def pooled(self, x: Tensor, valid: Tensor) -> Tensor:
        return self.inner(x, keys(valid)).mean(1)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return torch._dynamo.disable(self.pooled, recursive=False)(x * 2, valid)


@both_ways
def test_rule_10_a_break_before_a_mean(form: str, train: bool) -> None:
    def body(m: Any, x: Tensor, valid: Tensor) -> Tensor:
        y = m.a(x, keys(valid))
        torch._dynamo.graph_break()
        return y.mean(1)

    result = check(body, (hidden(), RIGHT), None, packing=form, train=train, fullgraph=False)
    assert result.forms == ["exact"]
    assert "graph break" in result.reasons


@both_ways
@pytest.mark.parametrize("model", [Pooled, Looped])
def test_rule_10_a_break_in_a_callee(model: type[nn.Module], form: str, train: bool) -> None:
    """The last graph of the callee is whole, and still its rows feed a mean."""
    result = check(model(), (hidden(), RIGHT), None, packing=form, train=train, fullgraph=False)
    assert set(result.forms) == {"exact"}


@both_ways
def test_rule_10_after_the_last_break(form: str, train: bool) -> None:
    """What follows the last break of the compiled function itself is the end of the program."""
    result = check(Encoder(), (hidden(), RIGHT), RIGHT, packing=form, train=train, fullgraph=False)
    assert result.forms == ["exact", "packed" if form == "model" else "zero rows"]


# --- rule 14: atoms, sizes that coincide, strides and sharing of memory ------------------------------------------------


SHAPES = [(1, 1), (1, 2), (1, 6), (2, 2), (6, 6), (HEADS, 5), (3, HEADS), (WIDTH, 4), (3, WIDTH), (WIDTH // HEADS, WIDTH)]
LAYOUTS = {
    "tokens": (lambda m, y: y, "rows"),
    "flat": (lambda m, y: m.linear(y.reshape(-1, WIDTH)), "rows"),
    "heads": (lambda m, y: y.view(*y.shape[:2], HEADS, -1), "rows"),
    "cache": (lambda m, y: y.view(*y.shape[:2], HEADS, -1).transpose(1, 2), "heads"),
    "time first": (lambda m, y: m.linear(y).transpose(0, 1), "time"),
    "pairs": (lambda m, y: y[..., :2].unsqueeze(2), "rows"),
}


def _rows(valid: Tensor, layout: str) -> Tensor:
    return {"rows": valid, "heads": valid[:, None].expand(-1, HEADS, -1), "time": valid.t()}[layout]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rule_14_sizes_that_coincide(shape: tuple[int, int], form: str) -> None:
    """Batch, length, heads and width of the same size are still different dimensions; and dimensions of one are none."""
    batch, length = shape
    valid = torch.ones(batch, length, dtype=torch.bool)
    valid[:, length // 2 + 1 :] = False
    valid[0, 1:] = False

    def body(m: Any, x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        y = m.norm(m.a(x, keys(valid)))
        folded = F.scaled_dot_product_attention(
            *(
                t.reshape(batch, length, HEADS, -1).transpose(1, 2).reshape(batch * HEADS, length, -1)
                for t in m.b.qkv(y).chunk(3, -1)
            ),
            attn_mask=valid[:, None, None, :].expand(-1, HEADS, 1, -1).reshape(batch * HEADS, 1, length),
        )
        y = y + folded.view(batch, HEADS, length, -1).transpose(1, 2).reshape(y.shape)
        return tuple(make(m, y) for make, _ in LAYOUTS.values())

    masks = [_rows(valid, layout) for _, layout in LAYOUTS.values()]
    result = check(body, (hidden(batch, length), valid), masks, packing=form, knobs={"round_tokens": 1})
    if batch > 1:
        assert set(result.forms) == {"packed" if form == "model" else "zero rows"}, result.reasons
    elif length > 1:
        assert result.forms  # heads that are folded into a batch of one are taken for the batch, whose rows stay exact


@both_ways
@pytest.mark.parametrize("name", LAYOUTS)
def test_rule_14_layouts(name: str, form: str, train: bool) -> None:
    make, layout = LAYOUTS[name]
    result = check(lambda m, x, v: make(m, m.a(x, keys(v))), (hidden(), RIGHT), _rows(RIGHT, layout), packing=form, train=train)
    assert_packed(result, form)
    assert result.ours is not None and result.eager is not None
    assert result.ours.outputs[0].stride() == result.eager.outputs[0].stride()


@both_ways
@pytest.mark.parametrize("dynamic", [False, True])
def test_rule_14_mask_of_one_row(dynamic: bool, form: str, train: bool) -> None:
    """The batch size is that of the queries: a mask (1, S) broadcasts."""
    valid = mask_of("holes", 1)
    result = check(
        lambda m, x, v: m.a(x, keys(v)),
        (hidden(), valid),
        valid.expand(BATCH, -1),
        packing=form,
        train=train,
        dynamic=dynamic or None,
    )
    assert_packed(result, form)


@pytest.mark.parametrize("form", FORMS)
def test_rule_14_outputs_that_share_memory(form: str) -> None:
    """Views of one output stay views of it, and a view of an input stays one."""

    def body(m: Any, x: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        y = m.linear(m.a(x, keys(valid)))
        query, key = m.linear(y).chunk(2, -1)
        return y, y.transpose(0, 1), y.view(BATCH, LENGTH, HEADS, -1), x, x.view(-1, WIDTH), y[:, 0], query, key

    masks = [RIGHT, RIGHT.t(), RIGHT, None, None, None, RIGHT, RIGHT]
    if form == "attention":
        masks[5] = None
    x, model = hidden(grad=False), Program(body).double()
    check(model, (x, RIGHT), masks, packing=form, train=False)
    with quick(packing=form), torch.no_grad():
        for call in (model, torch.compile(model, backend=direct_backend)):
            y, swapped, split, same, flat, first, query, key = call(x, RIGHT)
            assert same is x
            shares = [t.untyped_storage().data_ptr() for t in (y, swapped, split, first, flat, x, query, key)]
            assert len(set(shares[:4])) == 1
            assert shares[4] == shares[5]
            assert shares[6] == shares[7]
            assert swapped.stride() == y.transpose(0, 1).stride()


@both_ways
def test_rule_14_outputs_of_every_kind(form: str, train: bool) -> None:
    """Integers, booleans, inputs that pass through, the same value twice, numbers and None."""

    def body(m: Any, x: Tensor, valid: Tensor) -> Any:
        y = m.a(x, keys(valid))
        best = m.head(y).argmax(-1, keepdim=True)
        return y, {"again": y, "best": (best, y > 0)}, x, valid, 3, None, [y.to(torch.int8)]

    masks = [RIGHT, RIGHT, RIGHT, RIGHT, None, None, None, None, RIGHT]
    result = check(body, (hidden(), RIGHT), masks, packing=form, train=train)
    assert_packed(result, form)


# --- rules 15 and 16: left alone, and asked for --------------------------------------------------------------------------


def test_rule_15_functorch() -> None:
    """Inside vmap nothing is rewritten."""
    model = SelfAttention().double().eval()

    def call(x: Tensor, valid: Tensor) -> Tensor:
        return torch.vmap(lambda a, v: model(a[None], keys(v[None]))[0])(x, valid)

    class Mapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, valid: Tensor) -> Tensor:
            return call(x, valid)

    result = check(Mapped(), (hidden(), RIGHT), None, train=False)
    assert not result.forms
    assert "vmap" in result.reasons


def test_rule_15_saved_tensor_hooks() -> None:
    model = Program(lambda m, x, v: m.a(x, keys(v)))
    with torch.autograd.graph.save_on_cpu():
        result = check(model, (hidden(), RIGHT), None)
    assert not result.forms


@both_ways
def test_rule_16_exact_rows_on_request(form: str, train: bool) -> None:
    """``padded_rows="keep"``: a mask that hides real tokens, whose rows are wanted."""

    class Separate(Program):
        """Keys and values have linears of their own, which may be packed though queries are not."""

        def __init__(self) -> None:
            super().__init__(self.run)
            self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def run(self, m: Any, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
            for _ in range(2):
                q, k, v = (t.view(BATCH, LENGTH, HEADS, -1).transpose(1, 2) for t in (m.linear(x), m.key(x), m.value(x)))
                y = F.scaled_dot_product_attention(q, k, v, attn_mask=keys(valid))
                x = x + y.transpose(1, 2).reshape(x.shape)
            return m.head(x), x.mean(1)

    result = check(
        Separate(), (hidden(), mask_of("holes")), None, packing=form, train=train, exact=True, knobs={"padded_rows": "keep"}
    )
    assert result.forms == ["exact", "exact"]
    assert (result.nodes_packed > 0) == (form == "model")
