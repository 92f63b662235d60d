"""Calls of PyTorch's varlen attention become calls of ours, with the same results. (PyTorch's runs on CUDA only.)"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from torch.utils.checkpoint import checkpoint

import varlen_inductor
from helpers import MaskedAttention, padded_batch
from varlen_inductor import report
from varlen_inductor.ops.reference import varlen_attn_reference
from varlen_inductor.patterns import upstream_varlen

OFFSETS = torch.tensor([0, 5, 5, 16], dtype=torch.int32)
LSE = AuxRequest(lse=True)


def captured(function: Callable[..., Any], *args: Any) -> fx.GraphModule:
    """The graph that Dynamo hands to a backend. It is not run: PyTorch's operator could not be."""
    graphs: list[fx.GraphModule] = []

    class Captured(Exception):
        pass

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(gm)
        raise Captured

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    return graphs[0]


def reasons(function: Callable[..., Any], *args: Any) -> list[str | None]:
    # Found while the graph is compiled, when autocast is as it will be.
    found: list[str | None] = []

    class Captured(Exception):
        pass

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        found.extend(call.reason for call in upstream_varlen.find(gm).all())
        raise Captured

    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed):
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    return found


def operands(heads_k: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = torch.randn(16, 2, 8), torch.randn(16, heads_k, 8), torch.randn(16, heads_k, 8)
    return tuple(x.to(dtype).requires_grad_() for x in (query, key, value))  # type: ignore[return-value]


def exact(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = varlen_attn_reference(*args, **options)
    return out.float(), lse.float()


def text(gm: fx.GraphModule) -> str:
    lines = [str(node.format_node()) for node in gm.graph.nodes if node.op not in ("placeholder", "output")]
    calls = "\n".join(line.split("[target=", 1)[1][:-1] for line in lines)
    short = calls.replace(", kwargs = {}", "").replace("](args = ", "\n    ").replace(", kwargs = ", "\n    ").replace("%l_", "%")
    return short.replace(", False, None, None, None)", ")")  # arguments that came with 2.12


class TestGraphs(expecttest.TestCase):
    def test_forward(self) -> None:
        def function(q: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:
            out, lse = varlen_attn(q, q, q, cu, cu, 11, 11, window_size=(-1, 0), scale=0.5, return_aux=LSE)
            return out.cos(), lse

        before = captured(function, operands()[0], OFFSETS)
        after = upstream_varlen.rewrite(before, upstream_varlen.find(before))
        self.assertExpectedInline(
            text(before),
            """\
torch.ops.torch_attn._varlen_attn
    (%q_, %q_, %q_, %cu_, %cu_, 11, 11, True, 0.5, [-1, 0])
operator.getitem
    (%_varlen_attn, 0)
operator.getitem
    (%_varlen_attn, 1)
cos
    (%out,)""",
        )
        self.assertExpectedInline(
            text(after),
            """\
torch.ops.varlen_inductor.varlen_attn.default
    (%q_, %q_, %q_, %cu_, %cu_, 11, 11)
    {scale: 0.5, window_right: 0}
operator.getitem
    (%_varlen_attn, 0)
operator.getitem
    (%_varlen_attn, 1)
torch.ops.aten.detach.default
    (%lse,)
cos
    (%out,)""",
        )

    def test_backward(self) -> None:
        def function(g: Tensor, q: Tensor, out: Tensor, lse: Tensor, cu: Tensor, rng: Tensor) -> Any:
            return torch.ops.torch_attn._varlen_attn_backward(g, q, q, q, out, lse, cu, cu, 11, 11, True, rng, None, [4, -1])

        g, q, out = torch.randn(3, 16, 2, 8)
        before = captured(function, g, q, out, torch.randn(2, 16), OFFSETS, torch.zeros(2, dtype=torch.uint64))
        after = upstream_varlen.rewrite(before, upstream_varlen.find(before))
        self.assertExpectedInline(
            text(after),
            """\
torch.ops.aten.isposinf.default
    (%lse_,)
torch.ops.aten.masked_fill.Scalar
    (%lse_, %isposinf_default, -inf)
torch.ops.aten.new_empty.default
    (%q_, [0])
    {dtype: torch.uint64}
torch.ops.varlen_inductor.varlen_attn_backward.default
    (%g_, None, %out_, %masked_fill_scalar, %new_empty_default, %q_, %q_, %q_, %cu_, %cu_, 11, 11)
    {window_left: 4, window_right: 0}
operator.getitem
    (%_varlen_attn_backward, 0)
operator.getitem
    (%_varlen_attn_backward, 1)
operator.getitem
    (%_varlen_attn_backward, 2)""",
        )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("window", "heads_k"), [((-1, -1), 2), ((-1, 0), 1), ((3, 0), 2), ((2, 4), 2), ((-1, 2), 1)])
def test_results(window: tuple[int, int], heads_k: int, dynamic: bool) -> None:
    gqa = {"enable_gqa": True} if heads_k == 1 and "enable_gqa" in varlen_attn.__kwdefaults__ else {}

    def function(query: Tensor, key: Tensor, value: Tensor, cu: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = varlen_attn(query.sin(), key, value, cu, cu, 11, 11, window_size=window, return_aux=LSE, **gqa)
        return out.cos(), lse.exp()

    inputs = operands(heads_k)
    compiled = torch.compile(function, backend="varlen_inductor", fullgraph=True, dynamic=dynamic)
    out, lse = compiled(*inputs, OFFSETS)
    expected_out, expected_lse = exact(inputs[0].sin(), *inputs[1:], OFFSETS, OFFSETS, window_size=window)
    assert torch.allclose(out, expected_out.cos(), atol=1e-5)
    assert torch.allclose(lse, expected_lse.exp(), atol=1e-4)
    # PyTorch drops the gradient of lse.
    grads = torch.autograd.grad(out.sum() + lse.sum(), inputs)
    for grad, expected in zip(grads, torch.autograd.grad(expected_out.cos().sum(), inputs)):
        assert torch.allclose(grad, expected, atol=1e-5)


def test_backward_call() -> None:
    """As PyTorch's forward leaves it: lse is +inf for queries without keys."""
    query, key, value = operands()
    cu_k = torch.tensor([0, 5, 16, 16], dtype=torch.int32)  # the last sequence has queries and no keys
    out, lse = exact(query, key, value, OFFSETS, cu_k)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, (query, key, value), grad)

    def function(*args: Any) -> Any:
        return torch.ops.torch_attn._varlen_attn_backward(*args[:8], 11, 11, False, args[8])

    lse = lse.detach().masked_fill(lse.isinf(), torch.inf)
    args = (grad, query, key, value, out, lse, OFFSETS, cu_k, torch.zeros(2, dtype=torch.uint64))
    compiled = torch.compile(function, backend="varlen_inductor", fullgraph=True)
    for actual, wanted in zip(compiled(*(x.detach() for x in args)), expected):
        assert torch.allclose(actual, wanted, atol=1e-5)


def test_in_a_checkpoint() -> None:
    query = operands()[0]

    def inner(query: Tensor) -> Tensor:
        return varlen_attn(query, query, query, OFFSETS, OFFSETS, 11, 11) * 2

    compiled = torch.compile(lambda query: checkpoint(inner, query, use_reentrant=False), backend="varlen_inductor", fullgraph=True)
    (grad,) = torch.autograd.grad(compiled(query).cos().sum(), query)
    expected, _ = exact(query, query, query, OFFSETS, OFFSETS)
    (expected_grad,) = torch.autograd.grad((expected * 2).cos().sum(), query)
    assert torch.allclose(grad, expected_grad, atol=1e-5)


class Both(nn.Module):
    """Padded attention, and PyTorch's varlen attention of something else."""

    def __init__(self) -> None:
        super().__init__()
        self.padded = MaskedAttention()

    def forward(self, x: Tensor, valid: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        return self.padded(x, valid) * valid[..., None], varlen_attn(query, query, query, OFFSETS, OFFSETS, 11, 11)


@pytest.mark.parametrize("density", [0.9, 0.0])  # packed, and the padded graph
def test_beside_padded_attention(density: float) -> None:
    model, (x, valid), query = Both(), padded_batch(), operands()[0]
    with report.collect() as reports:
        compiled = torch.compile(model, backend="varlen_inductor", options={"varlen.max_density": density})
        padded, packed = compiled(x, valid, query)
    assert [site.decision for site in reports[0].sites] == ["rewritten", "rewritten"]
    assert torch.allclose(padded, model.padded(x, valid) * valid[..., None], atol=1e-5)
    assert torch.allclose(packed, exact(query, query, query, OFFSETS, OFFSETS)[0], atol=1e-5)


@pytest.mark.parametrize("in_checkpoint", [False, True])
def test_as_a_pass(in_checkpoint: bool) -> None:
    def inner(query: Tensor) -> Tensor:
        return varlen_attn(query.sin(), query, query, OFFSETS, OFFSETS, 11, 11)

    def function(query: Tensor) -> Tensor:
        return checkpoint(inner, query, use_reentrant=False) if in_checkpoint else inner(query)

    query = operands()[0]
    compiled = torch.compile(function, options={"pre_grad_custom_pass": varlen_inductor.VarlenPass()})
    expected, _ = exact(query.sin(), query, query, OFFSETS, OFFSETS)
    assert torch.allclose(compiled(query), expected, atol=1e-5)


def test_counted_and_explained() -> None:
    query = operands()[0]

    def function(query: Tensor) -> Tensor:
        return varlen_attn(query, query, query, OFFSETS, OFFSETS, 11, 11)

    (site,) = varlen_inductor.explain(function, query).sites
    assert (site.kind, site.decision, site.kernel) == ("varlen_attn (PyTorch's)", "rewritten", "cpu")
    torch._dynamo.utils.counters.clear()
    torch.compile(function, backend="varlen_inductor")(query)
    counters = torch._dynamo.utils.counters["varlen_inductor"]
    assert (counters["attention_seen"], counters["attention_rewritten"]) == (1, 1)


def test_off() -> None:
    query = operands()[0]
    with varlen_inductor.config.patch(packing="off"), report.collect() as reports, pytest.raises(NotImplementedError):
        torch.compile(lambda q: varlen_attn(q, q, q, OFFSETS, OFFSETS, 11, 11), backend="varlen_inductor")(query)
    assert [site.reason for site in reports[0].sites] == ['config.packing is "off"']


def test_autocast_that_would_cast() -> None:
    def function(query: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return varlen_attn(query, query, query, OFFSETS, OFFSETS, 11, 11)

    (reason,) = reasons(function, operands()[0])
    assert reason == (
        "its operands are torch.float32, which autocast to torch.bfloat16 would change; PyTorch's operator is not cast"
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert reasons(lambda q: varlen_attn(q, q, q, OFFSETS, OFFSETS, 11, 11), operands()[0]) == [reason]
    assert reasons(function, operands(dtype=torch.bfloat16)[0]) == [None]


def test_layout_of_the_result() -> None:
    query = torch.randn(2, 16, 8).transpose(0, 1)
    assert reasons(lambda q: varlen_attn(q, q, q, OFFSETS, OFFSETS, 11, 11), query) == [
        "its results are not contiguous, as its operands are not, and ours would be"
    ]
    rows = torch.randn(16, 3, 2, 8)
    assert reasons(lambda x: varlen_attn(*x.unbind(1), OFFSETS, OFFSETS, 11, 11), rows) == [None]


def test_uses_that_ours_has_not() -> None:
    query = operands()[0].detach()
    call = torch.ops.torch_attn._varlen_attn
    assert reasons(lambda q: call(q, q, q, OFFSETS, OFFSETS, 11, 11)[2], query) == ["its rng_state is used"]
    offsets = OFFSETS.long()
    assert reasons(lambda q: varlen_attn(q, q, q, offsets, offsets, 11, 11), query) == [
        "cu_seq_q is torch.int64; it must be torch.int32 (use cu_seq_q.to(torch.int32))"
    ]
    assert reasons(lambda q: varlen_attn(q, q, q, OFFSETS, OFFSETS, 11, 11, window_size=(-3, 0)), query) == [
        "its window_size is [-3, 0]; each side must be a number of keys, or -1 for no limit"
    ]


newer = pytest.mark.skipif("num_splits" not in varlen_attn.__kwdefaults__, reason="PyTorch 2.12 and later")


@newer
def test_options_that_ours_has_not() -> None:
    query = operands()[0].detach()
    assert reasons(lambda q: varlen_attn(q, q, q, OFFSETS, OFFSETS, 11, 11, num_splits=1), query) == [
        "it sets num_splits, which the rewrite does not know"
    ]
    table, used = torch.zeros(3, 1, dtype=torch.int32), torch.tensor([5, 0, 11], dtype=torch.int32)

    def paged(query: Tensor, pages: Tensor) -> Tensor:
        return varlen_attn(query, pages, pages, OFFSETS, None, 11, 11, block_table=table, seqused_k=used)

    assert reasons(paged, query, torch.randn(2, 16, 2, 8)) == [
        "its keys lie in pages (block_table), which the rewrite does not know"
    ]


@newer
def test_used_keys() -> None:
    query = operands()[0].detach()
    used = torch.tensor([3, 0, 9], dtype=torch.int32)
    compiled = torch.compile(lambda q: varlen_attn(q, q, q, OFFSETS, OFFSETS, 11, 11, seqused_k=used), backend="varlen_inductor")
    expected, _ = exact(query, query, query, OFFSETS, OFFSETS, seqused_k=used)
    assert torch.allclose(compiled(query), expected, atol=1e-5)
