"""Generated code of packed graphs launches its kernels without what Inductor does before each launch.

Up to version 2.11 of PyTorch (2.13 does this itself) every launch of a generated kernel asks again what its first one has settled:
whether there is more than one configuration left, whether something is to be dumped or tuned. A packed training step launches some
hundred of them, and where the host is slow it waits for the host. (On one H100, B 32, S 512 of benchmarks/model.py: forward and
backward were launched in 9.2 instead of 10.5 ms, by a script that is not kept.)
"""

from __future__ import annotations

import logging

from varlen_inductor import _compat_inductor

_log = logging.getLogger("varlen_inductor")

FIRST = 4
"""By this call forward and backward have run, as a rule, and their kernels are tuned."""


class QuickLaunches:
    """For one function that is compiled when it is first called: counts its calls and sees to the code that was loaded since."""

    def __init__(self) -> None:
        self._calls = 0
        self._failed = False
        self._loaded_before = len(_compat_inductor.generated_modules())

    def called(self) -> None:
        """To be called after each call of the function.

        More code may be loaded at any time (a first backward, another grad mode), so this looks again, ever more rarely.
        """
        self._calls += 1
        if self._calls >= FIRST and self._calls & (self._calls - 1) == 0 and not self._failed:
            try:
                for module in _compat_inductor.generated_modules()[self._loaded_before :]:
                    _compat_inductor.launch_quickly(module)
            except Exception:  # names of Inductor's that have moved: launches are then as they were
                self._failed = True
                _log.warning("kernels of generated code cannot be launched more quickly", exc_info=True)
