"""The knobs of varlen_inductor: a PyTorch config module, like ``torch._inductor.config``.

A knob can be set in four ways; the first that is set wins:

1. for one compile: ``torch.compile(model, backend="varlen_inductor", options={"varlen.packing": "attention"})``,
   or ``VarlenPass(packing="attention")`` for the pass form;
2. for a block of code: ``with varlen_inductor.config.patch(packing="attention"): ...``;
3. for the process: ``varlen_inductor.config.packing = "attention"``;
4. from outside: the environment variable named at the knob, read when this module is imported.

Knobs are read while a model is being compiled. From torch 2.13 on an assignment holds for the thread that made it
(PyTorch keeps these values in context variables), so code that runs in autograd's threads must be given the values it
needs when it is built and must not read this module.
"""

import sys
import typing
from typing import Any

# Every name in this module becomes a knob unless it is a function, a module or comes from `typing`: keep constants inside
# functions, and do not import `TYPE_CHECKING` (a bool, so a knob) or `annotations` (refused by PyTorch) by name.
from torch.utils._config_module import Config, install_config_module

if typing.TYPE_CHECKING:
    from torch.utils._config_typing import *  # noqa: F403

enabled: bool = True
"""Whether graphs are rewritten at all. When false the backend and ``enable()`` are plain Inductor."""

packing: str = Config(default="model", env_name_default="VARLEN_INDUCTOR_PACKING")
"""How much of the model is packed.

``"model"``: every operation that works row by row runs on valid tokens only.
``"attention"``: only the attention itself becomes a varlen call; no data-dependent size and no host synchronisation.
``"off"``: graphs are analysed and reported, and compiled as they are.
"""

padded_rows: str = Config(default="zero", env_name_default="VARLEN_INDUCTOR_PADDED_ROWS")
"""What an output holds at padded positions.

``"zero"``: such rows may be zero; everything else is what eager gives, up to rounding.
``"keep"``: the exact form: every row is what eager gives; only padded keys are skipped.
"""

strict: bool = Config(default=False, env_name_default="VARLEN_INDUCTOR_STRICT")
"""Raise when one of our passes fails. When false the failure is logged and the original graph is compiled."""

debug: bool = Config(default=False, env_name_default="VARLEN_INDUCTOR_DEBUG")
"""Check at run time, and at a cost, what is otherwise taken on trust: that ``cu_seqlens`` match their tensors, and that no
loss outside the compiled function reads padded rows of an output."""

kernels: str = Config(default="auto", env_name_default="VARLEN_INDUCTOR_KERNELS")
"""Which kernels may run the attention: ``"auto"``; ``"fastest"``, by the time of the kernel alone, whatever its call takes the
host, which is what ``"auto"`` means for attentions that are rewritten under ``mode="reduce-overhead"``; names of backends to
choose from, the preferred first (``"triton,math"``); or names of those to do without (``"-triton"``).
``python -m varlen_inductor doctor`` lists them."""

round_tokens: int = 128
"""The number of packed tokens is rounded up to a multiple of this, so that few sizes occur."""

max_density: float = 0.9
"""Above this share of valid tokens the padded graph runs: packing could not pay for itself."""

min_positions: int = -1
"""A batch of fewer positions than this, padded ones included, runs padded: so little work is over before packing has paid.
-1: as measured, by the size of the model's linears on a GPU (``patterns/worth.py``), and 0 on the CPU."""

inner_backend: str = "inductor"
"""The Dynamo backend that compiles what we have rewritten. Others than ``"inductor"`` (``"eager"``, ``"aot_eager"``) are for
tests and for ``explain``, which has no use for kernels."""


def problem_with(name: str, value: Any) -> str | None:
    """What is wrong with ``value`` for knob ``name``, in words for the user, or ``None``."""
    names = sorted(_knobs())
    if name not in names:
        return f"varlen_inductor has no knob {name!r}; it has {', '.join(names)}"
    expected = type(_knobs()[name])
    choices = {
        "packing": ("model", "attention", "off"),
        "padded_rows": ("zero", "keep"),
    }.get(name)
    if choices is not None:
        if value not in choices:
            return f"varlen.{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}"
    elif expected is bool:
        if not isinstance(value, bool):
            return f"varlen.{name} is {value!r}; it must be True or False (1 or 0 in the environment)"
    elif expected is str:
        if not isinstance(value, str) or not value:
            return f"varlen.{name} is {value!r}; it must be a name"
    elif isinstance(value, bool) or not isinstance(value, (int, expected)):
        return f"varlen.{name} is {value!r}; it must be of type {expected.__name__}"
    elif name == "round_tokens" and value < 1:
        return f"varlen.{name} is {value!r}; it must be at least 1"
    elif name == "min_positions" and value < -1:
        return f"varlen.{name} is {value!r}; it must be a number of positions, or -1 for what was measured"
    elif name == "max_density" and not 0.0 <= value <= 1.0:
        return f"varlen.{name} is {value!r}; it must lie between 0 and 1"
    return None


def check() -> None:
    """Raise ``ValueError`` if a knob holds a value it cannot have, e.g. from a mistyped environment variable."""
    for name, value in sys.modules[__name__].get_config_copy().items():
        problem = problem_with(name, value)
        if problem is not None:
            raise ValueError(problem)


def default_of(name: str) -> Any:
    """The value a knob has when nobody sets it."""
    return _knobs()[name]


def _knobs() -> dict[str, Any]:
    """Each knob with its default (whose type is the type of the knob)."""
    entries = sys.modules[__name__]._config  # type: ignore[attr-defined]
    return {name: entry.default for name, entry in entries.items()}


install_config_module(sys.modules[__name__])
