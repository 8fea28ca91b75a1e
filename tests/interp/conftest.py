"""Tests of this folder run the Triton kernels in the interpreter, in a process of their own.

Triton reads TRITON_INTERPRET when it is imported, for the whole process. So `pytest` collects only
`test_interpreter.py` here, which starts the other files in processes that have the variable set:
`TRITON_INTERPRET=1 python -m pytest tests/interp` does the same by hand.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parent
LAUNCHER = "test_interpreter.py"

interpreting = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = [path.name for path in FOLDER.glob("test_*.py") if path.name != LAUNCHER]
collect_ignore = [LAUNCHER] if interpreting else interpreted

Evaluate = Callable[[str, int, Sequence[np.ndarray]], list[np.ndarray]]


def _load(name: str) -> ModuleType:
    # Test files are no packages, so a module beside this one has no name to import it by.
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if interpreting:
    _load("interpreter_repair").install(_load("ptx_evaluator").evaluate)


@pytest.fixture
def evaluate_ptx() -> Evaluate:
    """The evaluator that stands in for inline assembly."""
    evaluate: Evaluate = _load("ptx_evaluator").evaluate
    return evaluate
