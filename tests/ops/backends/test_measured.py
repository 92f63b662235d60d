"""The table of measured times: what is answered by which row."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from varlen_inductor.ops import backends
from varlen_inductor.ops.backends import measured
from varlen_inductor.ops.problem import Problem

PROBLEM = Problem(torch.device("cuda", 0), torch.bfloat16, 8, 8, 64, 64, length=512)
ROWS = [
    {"head_dim": 64, "length": 512, "forward_us": {"aten_flash": 120, "triton": 130}, "backward_us": {"aten_flash": 400}},
    {"head_dim": 64, "length": 4096, "forward_us": {"aten_flash": 9, "triton": 7}, "backward_us": {"aten_flash": 1, "triton": 9}},
    {"head_dim": 128, "length": 512, "forward_us": {"triton": 5, "aten_flash": 9}, "backward_us": {"triton": 5, "aten_flash": 9}},
    {
        "head_dim": 64,
        "length": 512,
        "dropout": True,
        "forward_us": {"aten_flash": 10, "cudnn": 1, "triton": 3},
        "backward_us": {"aten_flash": 10, "cudnn": 99, "triton": 30},
    },
]
DEFAULTS = {"causal": False, "dropout": False, "in_place": False}


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found: dict[str, Any] = {"rows": [DEFAULTS | row for row in ROWS], "host_us": {}}
    monkeypatch.setattr(measured, "table_for", lambda capability: found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    return found


def order(backward: bool = False, **changes: Any) -> list[str]:
    found = measured.by_time(PROBLEM._replace(**changes), backward, backends.BACKENDS)
    assert found is not None
    return [backend.name for backend in found]


def test_by_length_and_head_dim() -> None:
    assert order()[:2] == ["aten_flash", "triton"]
    assert order(length=2048)[:2] == ["triton", "aten_flash"]
    assert order(length=0)[0] == "aten_flash"  # a symbol
    assert order(head_dim=72)[0] == "triton"  # runs as 128
    assert order(head_dim=256, head_dim_v=256)[0] == "triton"  # the nearest that there is


def test_directions_are_apart_but_for_dropout() -> None:
    assert order(length=4096)[0] == "triton"
    assert order(length=4096, backward=True)[0] == "aten_flash"
    for backward in (False, True):
        assert order(dropout_p=0.1, backward=backward)[0] == "aten_flash"


def test_what_was_not_measured_comes_last_in_its_order() -> None:
    names = [backend.name for backend in backends.BACKENDS]
    assert order()[2:] == [name for name in names if name not in ("aten_flash", "triton")]
    assert order(backward=True)[0] == "aten_flash"


def test_the_host_counts(table: dict[str, Any]) -> None:
    table["host_us"] = {"aten_flash": {"forward": 100.0, "backward": 0.0}, "triton": {"forward": 0.0, "backward": 0.0}}
    assert order()[0] == "triton"


def test_the_host_counts_less_outside_of_packed_graphs(table: dict[str, Any]) -> None:
    table["host_us"] = {"aten_flash": {"forward": 20.0}, "triton": {"forward": 0.0}}  # kernels: 120 and 130
    assert order(tails_unread=True)[0] == "triton"
    assert order()[0] == "aten_flash"


def test_the_host_does_not_count_in_what_is_replayed(table: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    everything = tuple(dataclasses.replace(b, supports=lambda problem: None) for b in backends.BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", everything)
    table["host_us"] = {"aten_flash": {"forward": 100.0, "forward, tails": 500.0}, "triton": {"forward": 0.0}}
    backends.choose.cache_clear()
    try:
        for tails_unread in (False, True):
            problem = PROBLEM._replace(tails_unread=tails_unread)
            assert backends.choose(problem).backend.name == "triton"
            assert backends.choose(problem, "fastest").backend.name == "aten_flash"
    finally:
        backends.choose.cache_clear()


def test_what_rows_behind_the_end_cost(table: dict[str, Any]) -> None:
    table["host_us"] = {"aten_flash": {"forward": 5.0, "forward, tails": 50.0}, "triton": {"forward": 5.0}}
    assert order(tails_unread=True)[0] == "aten_flash"
    assert order()[0] == "triton"


@pytest.mark.parametrize(
    "changes", [{"device": torch.device("cpu")}, {"dtype": torch.float32}, {"window_right": 0}, {"seqused_k": True}], ids=str
)
def test_nothing_alike(changes: dict[str, Any]) -> None:
    assert measured.by_time(PROBLEM._replace(**changes), False, backends.BACKENDS) is None


def test_choice_follows_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = tuple(dataclasses.replace(b, supports=lambda problem: None) for b in backends.BACKENDS)
    monkeypatch.setattr(backends, "BACKENDS", everything)
    backends.choose.cache_clear()
    try:
        chosen = backends.choose(PROBLEM._replace(length=4096))
        assert chosen.backend.name == "triton"
        assert chosen.refused["aten_flash"] == "triton comes first"
        assert backends.choose(PROBLEM._replace(length=4096), "cpu").backend.name == "cpu"
    finally:
        backends.choose.cache_clear()


def test_the_packages_table_is_well_formed() -> None:
    devices = json.loads(measured.TABLE.read_text())["devices"]
    names = {backend.name for backend in backends.BACKENDS}
    for found in devices.values():
        assert {"measured", "host_us", "rows"} <= found.keys()
        assert found["measured"].keys() >= {"device", "torch", "command"}
        for row in found["rows"]:
            assert row.keys() >= {"head_dim", "length", *DEFAULTS}
            assert names >= row["forward_us"].keys() | row["backward_us"].keys() and row["forward_us"]
