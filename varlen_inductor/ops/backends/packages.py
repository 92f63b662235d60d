"""Optional packages that hold kernels: found without being imported, imported once, when first needed."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable
from functools import cache
from importlib.machinery import PathFinder
from types import ModuleType


def installed(module: str) -> bool:
    """Whether ``module`` (dotted) is there; neither it nor the packages around it are imported."""
    if module in sys.modules:
        return True
    where: Iterable[str] | None = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        try:
            spec = importlib.util.find_spec(name) if where is None else PathFinder.find_spec(name, list(where))
        except (ImportError, ValueError):
            return False
        if spec is None:
            return False
        where = spec.submodule_search_locations or ()
    return True


@cache
def load(module: str) -> ModuleType | str:
    """The module, or the reason why it cannot be had."""
    if not installed(module):
        return f"{module} is not installed"
    try:
        return importlib.import_module(module)
    except Exception as error:  # a package of compiled code fails in its own ways
        return f"import failed: {type(error).__name__}: {error}"
