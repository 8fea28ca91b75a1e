"""`qserve doctor` tells what runs where, and says so when something is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qserve.cli.errors import ExitCode
from qserve.cli.main import run
from qserve.kernels import backend, native


def report(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run(["doctor", "--json"]) == ExitCode.OK
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_it_names_the_backend_and_the_reasons_of_every_op(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [row for row in report(capsys)["ops"] if row["device"] == "cpu"]
    assert [row["op"] for row in rows] == list(backend.OPS)
    for row in rows:
        assert row["backend"] in {kind.value for kind in backend.Backend}
        assert row["reason"]
        assert "triton" in row["rejected"]


def test_the_tables_hold_what_the_json_holds(capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys)
    assert run(["doctor"]) == ExitCode.OK
    text = capsys.readouterr().out
    for name, version in found["versions"].items():
        assert name in text and (version or "not there") in text
    for name in backend.OPS:
        assert name in text


def test_missing_native_kernels_are_a_problem_with_a_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "failure", lambda: "no compiler was there")
    found = report(capsys)
    assert found["native_kernels"] == {"available": False, "problem": "no compiler was there"}
    assert any("no compiler was there" in problem for problem in found["problems"])


def test_an_unknown_instruction_set_is_a_problem_not_a_crash() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qserve.cli.main", "doctor", "--json"],
        env=os.environ | {"QSERVE_ISA": "abacus"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert not found["native_kernels"]["available"]
    assert len(found["problems"]) == 1


def test_the_cache_folder_is_the_one_of_the_user(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "qserve").mkdir()
    (tmp_path / "qserve" / "held").write_bytes(b"x" * 1000)
    cache = report(capsys)["cache"]
    assert cache["folder"] == str(tmp_path / "qserve")
    assert cache["held_bytes"] == 1000
    assert cache["free_bytes"] > 0
