"""Small batches are packed here, too: what is tested is that they are right, not that they are fast."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from varlen_inductor import config


@pytest.fixture(autouse=True)
def small_batches_are_packed() -> Iterator[None]:
    with config.patch(min_positions=0):
        yield
