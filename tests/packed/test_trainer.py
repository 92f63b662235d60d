"""The Trainer of transformers, which knows no backend of ours: ``torch_compile=True`` and an environment variable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import ROOT

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


def start(kind: str, *, ours: bool) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if name != "VARLEN_INDUCTOR"}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "VARLEN_INDUCTOR_STRICT": "1"}
    env |= {"VARLEN_INDUCTOR": "1"} if ours else {}
    script = str(Path(__file__).with_name("fine_tune.py"))
    return subprocess.Popen(
        [sys.executable, script, kind], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    said, errors = process.communicate()
    assert process.returncode == 0, errors[-4000:]
    return json.loads(said.strip().splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", pytest.param("llama", marks=pytest.mark.thorough)])
def test_fine_tuning_follows_plain_inductor(kind: str) -> None:
    """Same data, same weights, no dropout: the losses differ by rounding alone, and every step ran on valid tokens only."""
    ours, plain = (result_of(process) for process in [start(kind, ours=True), start(kind, ours=False)])
    assert plain["losses"] == pytest.approx(ours["losses"], rel=2e-4)
    assert plain["evaluation"] == pytest.approx(ours["evaluation"], rel=1e-3)
    assert ours["losses"][-1] < ours["losses"][0] - 0.1
    assert ours["compiled"] >= 1
    assert plain["ours"] == {}
    assert (ours["ours"]["packed_steps"], ours["ours"].get("padded_steps", 0)) == (len(ours["losses"]), 0)
    assert ours["ours"]["failures"] == 0
