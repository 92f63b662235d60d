"""What is declared matches what is there. The wheel itself is built by nobody here: that takes a package index."""

from __future__ import annotations

import importlib
import os
import re
import tomllib
from pathlib import Path

import varlen_inductor
from helpers import ROOT, run_python

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_is_listed() -> None:
    root = ROOT / "varlen_inductor"
    found = {
        ".".join(Path(folder).relative_to(ROOT).parts)
        for folder, _, files in os.walk(root, followlinks=True)
        if "__init__.py" in files
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_links_lead_to_the_top_level() -> None:
    for name in ("patterns", "lowering"):
        link = ROOT / "varlen_inductor" / name
        assert link.is_symlink()
        assert link.resolve() == ROOT / name
        module = importlib.import_module(f"varlen_inductor.{name}")
        assert module.__name__ == f"varlen_inductor.{name}"


def test_entry_points_lead_somewhere() -> None:
    project = PROJECT["project"]
    targets = [target for group in project["entry-points"].values() for target in group.values()]
    for target in (*targets, *project["scripts"].values()):
        module, _, name = target.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), target


def test_version() -> None:
    assert PROJECT["project"]["version"] == varlen_inductor.__version__


def test_torch_is_pinned_for_development_and_not_for_users() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.+!]+", line) for line in pins)
    assert pins[0].startswith("torch==")
    assert PROJECT["project"]["dependencies"] == ["torch>=2.11"]
    pinned = {re.sub(r"[-_.]+", "-", line.split("==")[0]).lower() for line in pins}
    needed = {
        re.split(r"[\[<>=;]", requirement)[0].lower()
        for extra in ("test", "dev", "demo", "bench")
        for requirement in PROJECT["project"]["optional-dependencies"][extra]
    }
    assert needed - pinned <= {"varlen-inductor"}


def test_import_is_light() -> None:
    """PyTorch imports the package at the end of `import torch` when TORCH_LOGS names it."""
    out = run_python(
        """
        import sys
        import varlen_inductor
        print("torch" in sys.modules, sorted(name for name in sys.modules if name.startswith("varlen_inductor.")))
        print(set(varlen_inductor.__all__) <= set(dir(varlen_inductor)))
        """,
        TORCH_DEVICE_BACKEND_AUTOLOAD="0",
    )
    assert out.splitlines() == ["False []", "True"]


def test_public_names_resolve() -> None:
    for name in varlen_inductor.__all__:
        assert getattr(varlen_inductor, name) is not None


def test_torch_logs() -> None:
    """The name resolves as a module, at a time when torch is not quite imported."""
    out = run_python(
        """
        import logging
        import torch
        print(logging.getLogger("varlen_inductor").getEffectiveLevel() == logging.DEBUG)
        import varlen_inductor
        for name in varlen_inductor.__all__:
            getattr(varlen_inductor, name)
        from varlen_inductor import report
        report.publish(report.Report())
        """,
        TORCH_LOGS="+varlen_inductor",
    )
    assert out == "True"


def test_commands() -> None:
    from varlen_inductor.__main__ import main

    assert main(["doctor"]) == 0
    assert main(["--help"]) == 0
    assert main(["no-such-command"]) == 2


def test_ci_calls_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\nset -euo pipefail\n")
    assert "make test" in text
