"""Triton kernels without a GPU: a process of its own in which Triton interprets them."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

import pytest

from helpers import run_python


def _release(package: str) -> tuple[int, int]:
    major, minor = version(package).split(".")[:2]
    return int(major), int(minor)


def _problem() -> str | None:
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("numpy") is None:
        return "needs Triton and NumPy"
    if _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        return "this Triton's interpreter cannot loop up to a value it has loaded with NumPy 2.4 and later"
    return None


needs_interpreter = pytest.mark.skipif(_problem() is not None, reason=_problem() or "")


def interpret(module: str, function: str) -> None:
    """Call ``function`` of test module ``module`` (a path below tests, without .py) where Triton interprets."""
    folder, _, name = module.rpartition("/")
    run_python(
        f"""
        import sys
        sys.path[:0] = ["tests", "tests/{folder}"]
        import {name}
        {name}.{function}()
        """,
        TRITON_INTERPRET="1",
    )
