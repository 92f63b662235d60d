"""Memory past the dispatcher: the same as ``new_empty`` gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from varlen_inductor import _compat_operators
from varlen_inductor.ops.backends import memory


class OnDevice:
    """A tensor of CUDA device 1, as far as it is looked at."""

    dtype = torch.bfloat16

    def get_device(self) -> int:
        return 1

    def new_empty(self, size: tuple[int, ...], dtype: torch.dtype | None) -> tuple[Any, ...]:
        return "by PyTorch", size, dtype


@pytest.fixture(params=[(4, 3, 2), (5,), (0, 3), (3, 0), (2, 0, 3), (0,), ()], ids=str)
def size(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.uint64], ids=str)
def test_size_strides_and_dtype(size: tuple[int, ...], dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the allocator of CPU memory, which generated code calls in the same way."""
    monkeypatch.setattr(memory, "_allocate", torch._C._dynamo.guards._empty_strided_cpu)
    monkeypatch.setattr(_compat_operators, "current_device_index", lambda: 1)
    found = memory.empty(OnDevice(), *size, dtype=dtype)  # type: ignore[arg-type]
    expected = torch.empty(size, dtype=dtype or torch.bfloat16)
    assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), expected.dtype)


@pytest.mark.parametrize(("current", "there_is_one"), [(0, True), (1, False)])
def test_by_pytorch_on_another_device_or_without_the_allocator(
    current: int, there_is_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_allocate", torch._C._dynamo.guards._empty_strided_cpu if there_is_one else None)
    monkeypatch.setattr(_compat_operators, "current_device_index", lambda: current)
    assert memory.empty(OnDevice(), 2, 3, dtype=torch.int8) == ("by PyTorch", (2, 3), torch.int8)  # type: ignore[arg-type, comparison-overlap]


@pytest.mark.parametrize("lse_size", [(3, 4), (4, 3), None], ids=str)
@pytest.mark.parametrize(("allocator", "known"), [(True, False), (True, True), (False, False), (False, True)])
def test_results(allocator: bool, known: bool, lse_size: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_allocate", torch._C._dynamo.guards._empty_strided_cpu if allocator else None)
    monkeypatch.setattr(_compat_operators, "current_device_index", lambda: 1)
    like: Any = OnDevice() if allocator else torch.ones(2, dtype=torch.bfloat16)
    out, lse = memory.empty_results(like, (4, 3, 8), lse_size, *[like.get_device()] * known)
    assert (out.shape, out.dtype, out.is_contiguous()) == ((4, 3, 8), torch.bfloat16, True)
    if lse_size is None:
        assert lse is None
    else:
        assert lse is not None
        assert (lse.shape, lse.dtype, lse.is_contiguous()) == (lse_size, torch.float32, True)


def test_on_the_cpu() -> None:
    found = memory.empty(torch.ones(2, dtype=torch.float16), 2, 3)
    assert (found.shape, found.dtype, found.device.type) == ((2, 3), torch.float16, "cpu")
