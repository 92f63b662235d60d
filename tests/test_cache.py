"""Inductor's caches across processes: an unchanged compile is a hit, a changed source or knob of ours is a miss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import run_python

# Products of matrices only: Inductor calls a library for them, so no process has to compile kernels.
PROGRAM = """
    import json
    import torch
    from torch._dynamo.utils import counters
    import varlen_inductor
    from varlen_inductor import inductor_pass
    from varlen_inductor.backend import varlen_inductor as backend

    {change}

    def counted(**how):
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4, bias=False)
        y = torch.compile(model, **how)(torch.randn(3, 4, requires_grad=True))
        y.backward(torch.ones(3, 4))
        page = counters["aot_autograd"]
        graphs = counters["inductor"]
        return [page["autograd_cache_" + kind] for kind in ("hit", "miss", "bypass")] + [graphs["fxgraph_cache_bypass"]]

    print(json.dumps({{
        "backend": counted(backend=backend),
        "pass": counted(options={{"pre_grad_custom_pass": varlen_inductor.VarlenPass()}}),
        "plain": counted(),
    }}))
"""
# All of them read the cache that the first has filled.
pytestmark = pytest.mark.xdist_group("cache")
HIT, MISS = [1, 0, 0, 0], [0, 1, 0, 0]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that one run has filled."""
    folder = tmp_path_factory.mktemp("inductor_cache")
    assert compile_counts(folder) == {"backend": MISS, "pass": MISS, "plain": MISS}
    return folder


def compile_counts(folder: Path, change: str = "", **env: str) -> dict[str, list[int]]:
    """Hits, misses and bypasses of three compiles in a fresh process: by the backend, by the pass, and without us."""
    return json.loads(run_python(PROGRAM.format(change=change), TORCHINDUCTOR_CACHE_DIR=str(folder), **env))


def test_unchanged_is_a_hit(cache: Path) -> None:
    assert compile_counts(cache) == {"backend": HIT, "pass": HIT, "plain": HIT}


def test_a_changed_knob_is_a_miss(cache: Path) -> None:
    counts = compile_counts(cache, VARLEN_INDUCTOR_PADDED_ROWS="keep")
    assert counts == {"backend": MISS, "pass": MISS, "plain": HIT}


def test_a_changed_source_is_a_miss(cache: Path) -> None:
    counts = compile_counts(cache, change='inductor_pass.source_hash = lambda: "another"')
    assert counts == {"backend": MISS, "pass": MISS, "plain": HIT}
