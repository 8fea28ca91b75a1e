"""What other tools say, as the table of docs/conformance.md has it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

LoadScript = Callable[[str], ModuleType]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("ValueError: It has no kernel. Only types = [a | b]", "It has no kernel"),
        (
            "ValidationError: 1 validation error for VllmConfig\n"
            "  Value error, Unsupported: bits=3, sym=True [type=value_error, input_value=...]",
            "Unsupported: bits=3, sym=True",
        ),
        ("its process ended before this", "its process ended before this"),
        ("x" * 200, "x" * 140 + "..."),
        ("a | b", "a / b"),
    ],
)
def test_a_tool_is_quoted_with_its_first_sentence(
    load_script: LoadScript, monkeypatch: pytest.MonkeyPatch, message: str, expected: str
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    assert load_script("conformance").shorten(message) == expected


def test_weights_of_a_tool_that_computes_in_float32_are_equal(
    load_script: LoadScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    cell = load_script("conformance").Cell
    assert cell("auto-gptq", "loads ours", "gptq, 4 bits", 0.0, 1e-6).is_green
    assert not cell("auto-gptq", "loads ours", "gptq, 4 bits", 1e-4, 1e-6).is_green
    assert cell("gptqmodel", "loads ours", "gptq, 4 bits", 1e-4, 1e-6).is_green
