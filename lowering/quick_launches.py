"""Generated code of packed graphs runs without what Inductor asks before each launch and at the start of each call.

Up to version 2.11 of PyTorch (2.13 does this itself) every launch of a generated kernel asks again what its first one has settled:
whether there is more than one configuration left, whether something is to be dumped or tuned. It also hands over tensors, about
whose addresses CUDA is then asked one by one; here it hands over the addresses. A packed training step launches some hundred
kernels, and where the host is slow it waits for the host. (Before addresses were handed over, on one H100, B 32, S 512 of
benchmarks/model.py: forward and backward were launched in 9.2 instead of 10.5 ms, by a script that is not kept.)

And every call compares the sizes and strides of all its inputs, some hundred parameters among them, with those it was compiled for
(up to 2.11 before the first kernel is launched). The guards of the compile around a packed graph have just done that for a forward.
A backward goes on comparing: what was saved for it may have passed through hooks, of which no guard knows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from varlen_inductor import _compat_inductor
from varlen_inductor.nested import Nested

_log = logging.getLogger("varlen_inductor")

FIRST = 4
"""By this call forward and backward have run, as a rule: their kernels are tuned, and their inputs were checked."""


class QuickLaunches:
    """For functions that are compiled when they are first called: counts calls and sees to the code that was loaded since.

    Args:
        functions: what the calls go to.
    """

    def __init__(self, functions: Sequence[Nested] = ()) -> None:
        self._functions = functions
        self._calls = 0
        self._failed = False
        self._loaded_before = len(_compat_inductor.generated_modules())

    def called(self) -> None:
        """To be called after each call of one of the functions.

        More code may be loaded at any time (a first backward, another grad mode), so this looks again, ever more rarely.
        """
        self._calls += 1
        if self._calls >= FIRST and self._calls & (self._calls - 1) == 0 and not self._failed:
            try:
                for module in _compat_inductor.generated_modules()[self._loaded_before :]:
                    _compat_inductor.launch_quickly(module)
                    if any(module in f.modules for f in self._functions) and not _compat_inductor.is_backward(module):
                        _compat_inductor.trust_inputs(module)
            except Exception:  # names of Inductor's that have moved: code then runs as it is
                self._failed = True
                _log.warning("generated code cannot be launched more quickly", exc_info=True)
