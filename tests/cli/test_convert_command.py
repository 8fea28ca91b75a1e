"""`qserve convert`: what it says first, what it writes, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qserve.cli import convert
from qserve.cli.errors import ExitCode
from qserve.quant.conversion import TARGETS
from qserve.quant.formats.checkpoint import Checkpoint


def test_a_lossless_conversion_is_said_and_written(
    rtn_llama: Path, tmp_path: Path, qserve: Callable[..., Any]
) -> None:
    done = qserve("convert", rtn_llama, "--to", "compressed-tensors", "-o", tmp_path / "out")
    assert done.code == ExitCode.OK
    assert "lossless: every weight stays what it is" in " ".join(done.out.split())
    assert Checkpoint(tmp_path / "out").method == "compressed-tensors"
    assert qserve("inspect", tmp_path / "out").code == ExitCode.OK


def test_a_dry_run_measures_and_writes_nothing(
    rtn_llama: Path, tmp_path: Path, qserve: Callable[..., Any]
) -> None:
    done = qserve("convert", rtn_llama, "--to", "gptq", "--dry-run", "--json")
    found = json.loads(done.out)
    assert found["output"] is None
    assert not found["lossless"]
    assert 0.01 < found["relative_error"] < 0.2
    assert found["num_changed_layers"] == found["num_layers"] == len(found["layers"])
    text = qserve("convert", rtn_llama, "--to", "gptq", "--dry-run").out
    assert "lossy: 14 of 14 layers change" in " ".join(text.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--to", "awq"), ExitCode.USAGE, "give --output, or --dry-run"),
        (("--to", "awq", "--dry-run", "-o", "x"), ExitCode.USAGE, "give --output, or --dry-run"),
        (("--to", "marlin", "-o", "x"), ExitCode.USAGE, "'marlin' is not one of"),
        (("--to", "awq", "-o", "x"), ExitCode.MODEL, "is a float checkpoint"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tiny_llama: Path,
    qserve: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: tuple[str, ...],
    code: ExitCode,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = qserve("convert", tiny_llama, *arguments)
    assert done.code == code
    assert message in done.error
    assert not (tmp_path / "x").exists()


def test_threads_are_set(
    rtn_llama: Path, monkeypatch: pytest.MonkeyPatch, qserve: Callable[..., Any]
) -> None:
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    done = qserve("convert", rtn_llama, "--to", "bf16", "--dry-run", "--threads", "3")
    assert done.code == ExitCode.OK
    assert found == [3]


def test_the_model_is_not_overwritten(rtn_llama: Path, qserve: Callable[..., Any]) -> None:
    done = qserve("convert", rtn_llama, "--to", "bf16", "-o", rtn_llama, "--force")
    assert done.code == ExitCode.OUTPUT
    assert "is what is being read" in done.error


def test_the_help_names_every_target() -> None:
    assert convert.TARGETS == TARGETS
