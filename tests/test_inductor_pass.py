from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass

from helpers import stub_driver
from varlen_inductor import VarlenPass, _compat_inductor, config, inductor_pass, report


class Named(CustomGraphPass):
    def __init__(self, name: str | None = "theirs") -> None:
        self.name = name
        self.calls = 0

    def __call__(self, graph: fx.Graph) -> None:
        self.calls += 1

    def uuid(self) -> str | None:
        return self.name


def test_key_follows_knobs_and_is_stable() -> None:
    key = inductor_pass.cache_key()
    assert key == inductor_pass.cache_key()
    with config.patch(padded_rows="keep"):
        assert inductor_pass.cache_key() != key
    with config.patch(strict=True):
        assert inductor_pass.cache_key() == key


def test_key_follows_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "inductor_pass.py").write_text("# one")
    (tmp_path / "patterns").mkdir()
    (tmp_path / "patterns" / "a.py").write_text("# two")
    monkeypatch.setattr(inductor_pass, "__file__", str(tmp_path / "inductor_pass.py"))
    hashes = []
    for text in ("# two", "# three", "# two"):
        (tmp_path / "patterns" / "a.py").write_text(text)
        hashes.append(inductor_pass.source_hash.__wrapped__())
    assert hashes[0] == hashes[2] != hashes[1]


def test_pass_is_called_by_inductor_and_changes_the_graph() -> None:
    def square(gm: fx.GraphModule) -> report.Report:
        # A product of matrices: Inductor calls a library for it, so no kernel has to be compiled.
        (output,) = gm.graph.find_nodes(op="output")
        value = output.args[0][0]
        with gm.graph.inserting_before(output):
            squared = gm.graph.call_function(torch.ops.aten.mm.default, (value, value))
        output.args = ((squared,),)
        return report.Report()

    linear, x = nn.Linear(3, 3), torch.randn(3, 3)
    with stub_driver(rewrite_in_place=square), torch.no_grad(), torch._inductor.config.patch(fx_graph_cache=False):
        compiled = torch.compile(linear, options={"pre_grad_custom_pass": VarlenPass()})
        torch.testing.assert_close(compiled(x), linear(x) @ linear(x))


def test_failure_is_reported_and_strict_raises() -> None:
    def stumble(gm: fx.GraphModule) -> report.Report:
        raise RuntimeError("a pass stumbled")

    gm = fx.symbolic_trace(nn.Linear(2, 2))
    before = str(gm.graph)
    with stub_driver(rewrite_in_place=stumble):
        with report.collect() as reports:
            VarlenPass()(gm.graph)
        assert "a pass stumbled" in reports[0].error
        assert str(gm.graph) == before
        with pytest.raises(RuntimeError, match="stumbled"):
            VarlenPass(strict=True)(gm.graph)


def test_knobs() -> None:
    seen: list[str] = []

    def look(gm: fx.GraphModule) -> report.Report:
        seen.append(config.padded_rows)
        return report.Report()

    gm = fx.symbolic_trace(nn.Linear(2, 2))
    with stub_driver(rewrite_in_place=look):
        VarlenPass(padded_rows="keep")(gm.graph)
        VarlenPass(enabled=False)(gm.graph)
    assert seen == ["keep"]
    with pytest.raises(ValueError, match="no knob 'padding'"):
        VarlenPass(padding="keep")


def test_uuid_pickle_and_copy() -> None:
    one, other = VarlenPass(), VarlenPass(padded_rows="keep")
    assert one.uuid() != other.uuid()
    assert one == VarlenPass() != other
    assert copy.deepcopy(other) == pickle.loads(pickle.dumps(other)) == other
    assert pickle.dumps(one) == pickle.dumps(VarlenPass())
    # torch 2.11 makes its key of this pickle: the sources must be in it.
    buffer = io.BytesIO()
    pickle.Pickler(buffer).dump(one)
    assert inductor_pass.source_hash().encode() in buffer.getvalue()


@pytest.mark.parametrize("slot", inductor_pass._SLOTS)
def test_mark_joins_a_pass_that_is_there(slot: str) -> None:
    theirs = Named()
    options = inductor_pass.marked({slot: theirs, "max_autotune": True})
    assert inductor_pass.is_marked(options)
    assert options["max_autotune"] is True
    if _compat_inductor.passes_may_be_lists():
        assert options[slot][0] is theirs
    else:
        options[slot](fx.Graph())
        assert theirs.calls == 1
        assert "theirs" in options[slot].uuid()
    with torch._inductor.config.patch({slot: theirs}):
        assert "theirs" in str(options[slot].uuid()) if not _compat_inductor.passes_may_be_lists() else True
        inherited = inductor_pass.marked({})[slot]
    assert inherited == options[slot]


@pytest.mark.parametrize("kind", inductor_pass._SLOTS.values())
def test_mark_keeps_an_unnamed_pass_unnamed(kind: Any) -> None:
    assert kind("key", Named(None)).uuid() is None
    assert kind("key", lambda graph: None).uuid() is None
    assert kind("key").uuid() == "key"


def test_passes_are_there_with_both_marks() -> None:
    marks = inductor_pass.marked({})
    assert not inductor_pass.has_passes()
    with torch._inductor.config.patch(marks):
        assert inductor_pass.has_passes()
    for slot in marks:
        with torch._inductor.config.patch({**marks, slot: None}):
            assert not inductor_pass.has_passes()
    one, other = (kind("key") for kind in inductor_pass._SLOTS.values())
    assert one != other


def test_unmarked() -> None:
    assert not inductor_pass.is_marked({})
    assert not inductor_pass.is_marked({inductor_pass._MARK_SLOT: Named()})


def test_inductor_accepts_the_mark() -> None:
    linear, x = nn.Linear(3, 3), torch.randn(2, 3)
    with stub_driver(), torch.no_grad():
        torch.testing.assert_close(torch.compile(linear, backend="varlen_inductor")(x), linear(x))
    assert torch._dynamo.utils.counters["inductor"]["fxgraph_cache_bypass"] == 0
    assert torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_bypass"] == 0
