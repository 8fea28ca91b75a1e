"""The command line as the tests of its commands use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qserve.cli.main import run

Qserve = Callable[..., "Outcome"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command left behind: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The message of a command that failed as it should: one line, the last on stderr."""
        assert self.code != 0
        assert self.out == ""
        assert "Traceback" not in self.err
        line = self.err.rstrip("\n").rpartition("\n")[2]
        assert line.startswith("error: "), self.err
        assert "this is a bug" not in line
        return line.removeprefix("error: ")


@pytest.fixture
def qserve(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Qserve:
    """Runs a command line in this process, with an empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = int(run([str(argument) for argument in arguments]))
        return Outcome(code, *capsys.readouterr())

    return call
