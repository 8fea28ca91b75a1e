"""Engines run in turn, medians are kept, and what is not installed is named with its remedy."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qserve.cli.engine_comparison import engine_chart, engine_table
from qserve.cli.row_table import read_rows


@pytest.fixture(scope="module")
def engines(load_script: Callable[[str], ModuleType]) -> ModuleType:
    return load_script("engines")


def answering(log: Path, name: str, values: list[float]) -> list[str]:
    """A command that writes its name to a log and prints the next of ``values`` at each run."""
    code = (
        "import json,sys,pathlib;log=pathlib.Path(sys.argv[1]);"
        "old=log.read_text().splitlines() if log.is_file() else [];"
        "log.write_text('\\n'.join([*old,sys.argv[2]])+'\\n');"
        "values=json.loads(sys.argv[3]);print('noise');"
        "value=values[old.count(sys.argv[2])];"
        "print(json.dumps({'engine':sys.argv[2],'load_s':value,'decode_b1_tok_s':value}))"
    )
    return [sys.executable, "-c", code, str(log), name, json.dumps(values)]


def test_engines_alternate_and_medians_are_compared(engines: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log"
    contestants = [
        engines.Engine("qserve", answering(log, "a", [30.0, 10.0, 20.0])),
        engines.Engine("rival", answering(log, "b", [5.0, 10.0, 1.0])),
    ]
    found = engines.alternate(contestants, 3)
    assert log.read_text().split() == ["a", "b"] * 3
    rows = {(row["figure"], row["engine"]): row for row in engines.summarize(found)}
    ours, theirs = (rows["decode_b1_tok_s", name] for name in ("qserve", "rival"))
    assert (ours["median"], ours["lowest"], ours["highest"], ours["rounds"]) == (20, 10, 30, 3)
    assert (ours["qserve_is_better_by"], theirs["qserve_is_better_by"]) == ("", 4.0)
    # Of seconds, fewer are better.
    assert rows["load_s", "rival"]["qserve_is_better_by"] == 0.25


def test_an_engine_that_fails_leaves_the_table_alone(
    engines: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engines, "TABLE", tmp_path / "engines.csv")
    monkeypatch.setattr(engines, "find_llama", lambda python, gguf: [])
    monkeypatch.setattr(engines, "find_vllm", lambda python, model: [])
    monkeypatch.setattr(
        engines, "QSERVE", [sys.executable, "-c", "raise SystemExit('out of luck')"]
    )
    monkeypatch.setattr(sys, "argv", ["engines.py", "model"])
    with pytest.raises(SystemExit, match="out of luck"):
        engines.main()
    assert not (tmp_path / "engines.csv").exists()


def test_a_rival_that_is_missing_is_left_out_with_its_remedy(
    engines: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert engines.find_python(None, "no_such_engine", "rival", "pip install rival") is None
    assert "rival is not installed here and left out: pip install rival" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="cannot import no_such_engine: pip install rival"):
        engines.find_python(sys.executable, "no_such_engine", "rival", "pip install rival")


def test_an_interpreter_that_has_the_rival_is_used(engines: ModuleType) -> None:
    assert engines.find_python(None, "json", "json", "") == sys.executable
    assert engines.find_python(sys.executable, "json", "json", "") == sys.executable


def test_rows_become_a_table_and_a_chart(
    engines: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engines, "TABLE", tmp_path / "engines.csv")
    rival = engines.Engine("rival", answering(tmp_path / "log", "b", [50.0]))
    monkeypatch.setattr(engines, "find_llama", lambda python, gguf: [rival])
    monkeypatch.setattr(engines, "find_vllm", lambda python, model: [])
    ours: dict[str, Any] = {"load_s": 0.5, "decode_b1_tok_s": 300.04, "threads": 2}
    command = f"print({json.dumps(json.dumps(ours))})"
    monkeypatch.setattr(engines, "QSERVE", [sys.executable, "-c", command])
    monkeypatch.setattr(sys, "argv", ["engines.py", "folder/model", "--rounds", "1"])
    engines.main()
    rows = read_rows(tmp_path / "engines.csv")
    assert {row["model"] for row in rows} == {"model"}
    table = engine_table(rows).splitlines()
    assert table[0] == "| tokens a second, medians | qserve | rival |"
    assert "| decode, 1 sequence | 300 | 50 (6.00 x) |" in table
    assert "| load, seconds | 0.5 | 50 (100.00 x) |" in table
    assert ">300<" in engine_chart(rows)
