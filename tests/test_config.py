import os

import pytest

from helpers import run_python
from varlen_inductor import config


def test_defaults() -> None:
    assert config.get_config_copy() == {
        "enabled": True,
        "packing": "model",
        "padded_rows": "zero",
        "strict": False,
        "debug": False,
        "kernels": "auto",
        "round_tokens": 128,
        "max_density": 0.9,
        "min_positions": -1,
        "inner_backend": "inductor",
    } or any(name.startswith("VARLEN_INDUCTOR_") for name in os.environ)


def test_patch_restores() -> None:
    before = config.packing
    with config.patch(packing="off"):
        assert config.packing == "off"
    assert config.packing == before


def test_unknown_knob_is_an_error() -> None:
    with pytest.raises(AttributeError, match="packings"):
        config.packings = "model"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("packing", "models", "one of 'model', 'attention', 'off'"),
        ("padded_rows", None, "one of 'zero', 'keep'"),
        ("strict", "true", "True or False"),
        ("kernels", True, "a name"),
        ("round_tokens", 0, "at least 1"),
        ("round_tokens", 1.5, "of type int"),
        ("round_tokens", True, "of type int"),
        ("max_density", 2, "between 0 and 1"),
        ("min_positions", -2, "a number of positions, or -1"),
        ("nothing", 1, "no knob 'nothing'; it has debug, enabled"),
    ],
)
def test_wrong_values_are_named(name: str, value: object, words: str) -> None:
    problem = config.problem_with(name, value)
    assert problem is not None
    assert words in problem


def test_right_values() -> None:
    for name, value in config.get_config_copy().items():
        assert config.problem_with(name, value) is None
    assert config.problem_with("max_density", 1) is None
    config.check()


def test_check_names_the_knob() -> None:
    with config.patch(packing="modle"), pytest.raises(ValueError, match=r"varlen\.packing is 'modle'"):
        config.check()


def test_environment() -> None:
    out = run_python(
        "from varlen_inductor import config as c; print(c.packing, c.padded_rows, c.strict, c.debug, c.kernels)",
        VARLEN_INDUCTOR_PACKING="attention",
        VARLEN_INDUCTOR_PADDED_ROWS="keep",
        VARLEN_INDUCTOR_STRICT="1",
        VARLEN_INDUCTOR_DEBUG="0",
        VARLEN_INDUCTOR_KERNELS="math",
    )
    assert out == "attention keep True False math"
