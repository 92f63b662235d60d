"""The private PyTorch names that operators and kernels use when they run: dispatcher, autograd, autocast, knobs, streams, memory.

Kept as ``_compat`` is: each entry says in which versions of PyTorch it was read, and ``tests/test_compat.py`` calls it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch


def below_autograd() -> Any:
    """Context in which operators skip autograd: what a kernel registered for autograd calls its operator in.

    Read in 2.11, 2.13; PyTorch's own ``torch.library.register_autograd`` uses it.
    """
    return torch._C._AutoDispatchBelowAutograd()


def keys_after_autograd(keyset: Any) -> Any:
    """The dispatch keys of ``keyset`` that come after autograd, for ``OpOverload.redispatch``. Read in 2.11, 2.13."""
    return keyset & torch._C._after_autograd_keyset


def reaches_the_kernel(keyset: Any) -> bool:
    """Whether an operator called with this keyset goes straight to the kernel of a device: nobody records, wraps or traces.

    ``DispatchKeySet.highestPriorityTypeId`` was read in 2.11, 2.13.
    """
    return keyset.highestPriorityTypeId() in _DEVICE_KEYS  # type: ignore[no-any-return]


def nothing_intercepts(*tensors: torch.Tensor | None) -> bool:
    """Whether operators on these tensors just compute: no mode, no transform, no subclass and no gradient is in the way.

    Read in 2.11, 2.13.
    """
    return (
        not torch.is_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(x is None or type(x) is torch.Tensor or type(x) is torch.nn.Parameter for x in tensors)
    )


def goes_straight(*tensors: torch.Tensor) -> bool:
    """Whether an operator called on these would go straight to autograd, or to the kernel if no gradient is asked for.

    No mode, transform, tracer, autocast or profiler is active, autograd is not switched off underneath (as within an operator), and
    the tensors are what they seem: no subclass, no pending negation, not on the meta device. Read in 2.11, 2.13.
    """
    return (
        (
            torch._C._dispatch_tls_local_include_set().raw_repr(),
            torch._C._dispatch_tls_local_exclude_set().raw_repr(),
        )
        in _PLAIN_DISPATCH
        and torch._C._len_torch_function_stack() == 0
        and not torch.autograd._profiler_enabled()
        and all(type(x) in _PLAIN_TYPES and not x.is_neg() and not x.is_meta for x in tensors)
    )


def _plain_dispatch() -> frozenset[tuple[int, int]]:
    """The dispatch keys that a thread of which nothing is known includes and excludes, in and out of inference mode."""
    found = set()

    def look() -> None:
        for inference in (False, True):
            with torch.inference_mode(inference):
                included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
                found.add((included.raw_repr(), excluded.raw_repr()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return frozenset(found)


_PLAIN_DISPATCH = _plain_dispatch()
_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})

_DEVICE_KEYS = frozenset({torch._C.DispatchKey.CPU, torch._C.DispatchKey.CUDA})


def knob_reader(module: Any, name: str) -> Callable[[], Any]:
    """A function that reads knob ``name`` of a config module, without the module's own look-up.

    A knob's value is in the ContextVar ``user_override`` (2.13) or in the attribute (2.11) of its entry. Read in 2.11, 2.13.
    """
    from torch.utils import _config_module

    try:
        entry, unset = module._config[name], _config_module._UNSET_SENTINEL
        override, otherwise = entry.user_override, entry.env_value_default
        if entry.env_value_force is not unset or entry.alias is not None or entry.justknob is not None:
            return lambda: getattr(module, name)
    except AttributeError:
        return lambda: getattr(module, name)
    if otherwise is unset:
        otherwise = entry.default
    if isinstance(override, ContextVar):
        return lambda: otherwise if (value := override.get()) is unset else value
    return lambda: otherwise if (value := entry.user_override) is unset else value


def any_requires_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether a gradient is asked for one of them, in one C++ call. Read in 2.11, 2.13."""
    return bool(torch._C._any_requires_grad(*tensors))


def current_stream_pointer(index: int) -> int:
    """The current CUDA stream of device ``index`` as the number that other libraries know it by. Read in 2.11, 2.13.

    The public ``torch.cuda.current_stream`` makes an object of it, which takes longer than many a call.
    """
    return torch._C._cuda_getCurrentRawStream(index)  # type: ignore[attr-defined,no-any-return,unused-ignore]


current_device_index: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)
"""The index of the current CUDA device, where CUDA is initialized. Read in 2.11, 2.13.

The public ``torch.cuda.current_device`` first asks whether it is, which takes longer than the answer.
Builds without CUDA have nothing else.
"""


def cuda_allocator() -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor] | None:
    """What makes a tensor of a size, strides and a dtype on the current CUDA device, past the dispatcher. Read in 2.11, 2.13.

    Code that Inductor generates calls it, too. In a profile (cProfile) of a packed forward on one H100 a call took 4 us, and one of
    ``Tensor.new_empty`` 9, by a script that is not kept. ``None`` if missing.
    """
    return getattr(torch._C._dynamo.guards, "_empty_strided_cuda", None)


def _as_strided(x: torch.Tensor, size: tuple[int, ...], strides: tuple[int, ...], offset: int) -> torch.Tensor:
    return x.as_strided(size, strides, x.storage_offset() + offset)


reinterpret: Callable[[torch.Tensor, tuple[int, ...], tuple[int, ...], int], torch.Tensor] = getattr(
    torch._C._dynamo.guards, "_reinterpret_tensor", _as_strided
)
"""``x.as_strided(size, strides, x.storage_offset() + offset)`` past the dispatcher; autograd knows nothing of it.

Code that Inductor generates calls it, too. Read in 2.11, 2.13.
"""


def below_autocast(device_type: str) -> Any:
    """Context in which operators skip autocast on this kind of device. Read in 2.11, 2.13.

    The public ``torch.autocast(device_type, enabled=False)`` also drops the cache of cast weights when it is the outermost.
    """
    key = torch._C._dispatch_key_parse(f"Autocast{device_type.upper()}")
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key))
