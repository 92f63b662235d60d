"""What all tests share: a clean Dynamo, a fixed seed, and the backend by name even where the package is not installed."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
    # Inductor's keys know nothing of ours in a graph that is compiled without our passes: it would answer with code of another day.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="varlen_inductor_tests_")
    atexit.register(shutil.rmtree, os.environ["TORCHINDUCTOR_CACHE_DIR"], ignore_errors=True)

import pytest
import torch

if os.environ.get("PYTEST_XDIST_WORKER"):
    # Each worker would start as many threads as there are cores, and they would wait for one another.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def backend_by_name() -> None:
    """In a checkout that is not installed there is no entry point; everything else works, so the tests should too."""
    from varlen_inductor.backend import register_by_name

    register_by_name()


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    """No test sees what another has compiled or counted."""
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What lives under tests/gpu, or is marked so, needs a CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords or "gpu" in item.path.parts:
            item.add_marker(skip)
