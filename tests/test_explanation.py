from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

import varlen_inductor
from helpers import MaskedAttention, padded_batch, stub_driver
from varlen_inductor import Explanation, backend, config, explanation, report
from varlen_inductor.report import Edge, Region, Report, Site


def looking(gm: fx.GraphModule, inputs: Any, inner: backend.InnerCompiler, route: str) -> Any:
    """A driver that reports each attention and changes nothing."""
    made = Report()
    made.see_before(gm)
    for node in gm.graph.nodes:
        if "scaled_dot_product_attention" in str(node.target):
            made.sites.append(Site(report.source_of(node), "scaled_dot_product_attention", "valid[b, k]", "rewritten", "exact"))
    made.regions.append(Region("valid[b, s]", 3, [Edge("pack", "x", "enters")]))
    made.see_after(gm)
    report.publish(made)
    return inner.compile(gm, inputs)


class Noisy(nn.Module):
    """Draws random numbers and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) + torch.rand_like(x)


def test_rows_regions_and_graphs() -> None:
    model = MaskedAttention()
    with stub_driver(looking):
        explained = varlen_inductor.explain(model, *padded_batch())
    assert isinstance(explained, Explanation)
    (site,) = explained.sites
    assert site.source.startswith("helpers.py:")
    assert explained.regions[0].packs == 1
    assert "scaled_dot_product_attention" in explained.graph_before
    assert explained.graph_after
    text = str(explained)
    for word in ("helpers.py", "valid[b, k]", "rewritten (exact)", "region 0"):
        assert word in text
    assert repr(explained) == text


def test_nothing_of_the_user_is_disturbed() -> None:
    model, x = Noisy(), torch.randn(3, 4)
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    counted = dict(torch._dynamo.utils.counters["varlen_inductor"])
    frames = torch._dynamo.utils.counters["frames"]["total"]
    state = torch.get_rng_state()
    with stub_driver(looking), config.patch(packing="attention"):
        varlen_inductor.explain(compiled, x)
        assert config.inner_backend == "inductor"
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert dict(torch._dynamo.utils.counters["varlen_inductor"]) == counted
    total = torch._dynamo.utils.counters["frames"]["total"]
    compiled(x)
    assert torch._dynamo.utils.counters["frames"]["total"] == total > frames


def test_several_graphs() -> None:
    def broken(x: torch.Tensor, valid: torch.Tensor, model: nn.Module) -> torch.Tensor:
        x = model(x, valid)
        torch._dynamo.graph_break()
        return model(x, valid)

    with stub_driver(looking):
        explained = varlen_inductor.explain(broken, *padded_batch(), MaskedAttention())
    assert len(explained.reports) == len(explained.sites) == 2
    assert "broke the model into 2 graphs" in str(explained)


def test_keyword_arguments_and_repeated_calls() -> None:
    model = MaskedAttention()
    with stub_driver(looking):
        for width in range(2, 14):
            x, valid = padded_batch(batch=width)
            assert len(varlen_inductor.explain(model, x=x, valid=valid).sites) == 1


def test_names_of_arguments() -> None:
    def by_position(x: int, /, y: int) -> None: ...

    def anything(x: int, *rest: int, **more: int) -> None: ...

    def usual(x: int, y: int = 0, *, z: int = 0, **more: int) -> None: ...

    assert explanation._by_name(by_position, (1, 2), {}) == ((1, 2), {})
    assert explanation._by_name(anything, (1, 2), {"a": 3}) == ((1, 2), {"a": 3})
    assert explanation._by_name(usual, (1, 2), {"z": 3, "a": 4}) == ((), {"x": 1, "y": 2, "z": 3, "a": 4})
    assert explanation._by_name(usual, (), {}) == ((), {})


def test_no_graph() -> None:
    assert "no graph was captured" in str(Explanation())


def test_failure_is_shown() -> None:
    def stumble(*args: Any) -> Any:
        raise RuntimeError("a pass stumbled")

    with stub_driver(stumble):
        assert "a pass stumbled" in str(varlen_inductor.explain(MaskedAttention(), *padded_batch()))


def test_with_the_real_passes() -> None:
    model, (x, valid) = MaskedAttention(), padded_batch()
    explained = varlen_inductor.explain(model, x, valid)
    (site,) = explained.sites
    assert (site.decision, site.reason) == ("rewritten", "")
    assert "valid[b, k]" in site.mask
    assert "varlen_attn" in explained.graph_after
    assert "varlen_attn" not in explained.graph_before
    with config.patch(packing="off"):
        (site,) = varlen_inductor.explain(model, x, valid).sites
    assert site.decision == "kept"
    assert "packing" in site.reason
