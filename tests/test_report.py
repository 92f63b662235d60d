import json
import logging

import pytest
import torch
from torch import fx, nn

from varlen_inductor import _compat, report
from varlen_inductor.report import Edge, Region, Report, Site


def example() -> Report:
    return Report(
        graph_id="0/0",
        sites=[
            Site(
                "layer.0 (model.py:12)", "scaled_dot_product_attention", "mask[b, k] != 0", "rewritten", "zero rows", kernel="cpu"
            ),
            Site("layer.1 (model.py:12)", "matmul, softmax, matmul", "not proven", reason="the mask depends on the query"),
        ],
        regions=[Region("mask[b, s] != 0", 7, [Edge("pack", "x", "enters"), Edge("unpack", "y", "mean over positions", "m.py:3")])],
        notes=["scores are assumed to stay above -9000"],
    )


def test_summary() -> None:
    assert example().summary() == (
        "graph 0/0: 1 of 2 attentions rewritten, 7 operations on valid tokens only, in 1 region (1 pack, 1 unpack), "
        "kept: the mask depends on the query"
    )
    assert Report(graph_id="1/0").summary() == "graph 1/0: no attention found"
    assert "because a pass failed: ValueError: no" in Report(error="Traceback\n  ...\nValueError: no\n").summary()


def test_table_shows_every_word_and_fits() -> None:
    text = example().table(width=100)
    assert max(map(len, text.splitlines()[1:])) <= 100
    for word in ("model.py:12", "not", "proven", "depends", "query", "cpu", "unpack", "m.py:3", "-9000"):
        assert word in text


def test_narrow_table_wraps_instead_of_cutting() -> None:
    text = report.table(("a", "b"), [("one two three four five", "y" * 30)], width=30)
    assert text.count("y") == 30
    assert max(map(len, text.splitlines())) <= 30


def test_publish_bumps_counters() -> None:
    report.publish(example())
    report.publish(Report(error="boom"))
    counters = _compat.counters()
    assert dict(counters) == {
        "graphs": 2,
        "failures": 1,
        "attention_seen": 2,
        "attention_rewritten": 1,
        "attention_kept": 1,
        "regions": 1,
        "nodes_packed": 7,
        "packs": 1,
        "unpacks": 1,
    }


def test_collect_and_recent() -> None:
    report.forget()
    with report.collect() as outer:
        report.publish(example())
        with report.collect() as inner:
            report.publish(example())
    report.publish(example())
    assert (len(outer), len(inner), len(report.recent())) == (2, 1, 3)


def test_graphs_are_printed_only_for_somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_compat, "structured_trace_wanted", lambda: False)
    gm = fx.symbolic_trace(nn.Linear(2, 2))
    quiet = Report()
    quiet.see_before(gm)
    assert quiet.graph_before == ""
    with report.collect():
        quiet.see_before(gm)
        quiet.see_after(gm)
    assert "def forward" in quiet.graph_before
    assert quiet.graph_after == quiet.graph_before


def test_levels(caplog: pytest.LogCaptureFixture) -> None:
    one = example()
    one.graph_before = one.graph_after = "def forward(self): ..."
    logging.getLogger("varlen_inductor").propagate = True
    with caplog.at_level(logging.INFO, "varlen_inductor"):
        report.publish(one)
    assert [record.getMessage() for record in caplog.records if record.name == report.log.name] == [one.summary()]
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "varlen_inductor"):
        report.publish(one)
    messages = "\n".join(record.getMessage() for record in caplog.records)
    assert "the mask depends on the query" in messages
    assert "graph 0/0 before\ndef forward" in messages
    assert "graph 0/0 after\ndef forward" in messages
    caplog.clear()
    report.publish(Report(error="Traceback\nValueError: no"))
    assert [record.levelno for record in caplog.records if record.name == report.log.name] == [logging.ERROR]


def test_as_dict_is_json() -> None:
    text = json.dumps(example().as_dict())
    assert "graph_before" not in text
    assert json.loads(text)["regions"][0]["edges"][1]["why"] == "mean over positions"


def test_keep_all() -> None:
    one = example()
    one.keep_all("too few positions are padded")
    assert {site.decision for site in one.sites} == {"kept"}
    assert {site.reason for site in one.sites} == {"too few positions are padded"}
    assert one.regions == []


def test_source_of() -> None:
    node = fx.Graph().placeholder("x")
    assert report.source_of(node) == "x"
    node.meta["stack_trace"] = (
        '  File "/home/me/net.py", line 3, in forward\n    a = attend(q)\n'
        '  File "/home/me/parts.py", line 7, in attend\n    F.sdpa(q)\n'
        '  File "/usr/lib/site-packages/torch/nn/functional.py", line 9, in sdpa\n    ...\n'
    )
    assert report.source_of(node) == "parts.py:7"
    node.meta["nn_module_stack"] = {
        "a": ("L['self']", nn.Module),
        "b": ("L['self']._modules['layer']._modules['0']", nn.Module),
    }
    assert report.source_of(node) == "layer.0 (parts.py:7)"


@pytest.mark.parametrize(
    ("qualified", "path"),
    [
        ("L['self']", ""),
        ("L['model']._modules['encoder']._modules['layer']._modules['0']", "encoder.layer.0"),
        ("L['self'].encoder.layer[3].attention", "encoder.layer.3.attention"),
        ("encoder.layer.0", "encoder.layer.0"),
    ],
)
def test_module_paths(qualified: str, path: str) -> None:
    assert report._plain_path(qualified) == path


def test_source_of_a_dynamo_node() -> None:
    seen: list[str] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.ModuleList([nn.Linear(2, 2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer[0](x)

    def backend(gm: fx.GraphModule, inputs: object) -> object:
        seen.extend(report.source_of(node) for node in gm.graph.nodes if node.op == "call_function")
        return gm.forward

    torch.compile(Net(), backend=backend)(torch.ones(1, 2))
    assert len(seen) == 1
    assert seen[0].startswith("layer.0 (test_report.py:")
