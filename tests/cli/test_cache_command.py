"""`qserve cache` lists what is kept of packed weights, and clears it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qserve.cli.errors import ExitCode
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.serve.config import EngineConfig
from qserve.serve.model_runner import ModelRunner


@pytest.fixture
def kept(tiny_llama: Path, tmp_path: Path) -> Path:
    """A folder with the packed weights of one model, where the commands look for them."""
    folder = tmp_path / "cache" / "qserve" / "weights"
    ModelRunner(Checkpoint(tiny_llama), EngineConfig(max_model_len=64, weight_cache=folder))
    return folder


def test_an_empty_cache_is_no_error(qserve: Callable[..., Any], tmp_path: Path) -> None:
    done = qserve("cache")
    assert (done.code, done.err) == (ExitCode.OK, "")
    assert f"0 files in {tmp_path / 'cache' / 'qserve' / 'weights'}, 0 B" in done.out


def test_packed_weights_are_listed_and_cleared(
    qserve: Callable[..., Any], kept: Path, tiny_llama: Path
) -> None:
    (path,) = kept.iterdir()
    (entry,) = json.loads(qserve("cache", "list", "--json").out)["list"]
    assert entry["file"] == path.name
    assert (entry["model"], entry["bytes"]) == (str(tiny_llama.resolve()), path.stat().st_size)
    table = qserve("cache").out
    assert "1 file in" in table and "last used" in table
    done = qserve("cache", "clear")
    assert done.code == ExitCode.OK and "1 file removed" in done.out
    assert list(kept.iterdir()) == []


def test_a_file_that_is_no_cache_is_said_to_be_damaged(
    qserve: Callable[..., Any], kept: Path
) -> None:
    (path,) = kept.iterdir()
    path.write_text("nonsense")
    assert "damaged or unfinished" in qserve("cache").out


def test_another_folder_can_be_named_and_off_cannot(
    qserve: Callable[..., Any], kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    assert "0 files in" in qserve("cache", "--weight-cache", other).out
    kept.rename(other)
    monkeypatch.setenv("QSERVE_WEIGHT_CACHE", str(other))
    assert "1 file in" in qserve("cache").out
    refused = qserve("cache", "--weight-cache", "off")
    assert refused.code == ExitCode.USAGE and "the cache is off" in refused.err
