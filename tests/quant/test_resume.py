"""Runs that end before their end: what is kept, and what the same run makes of it afterwards."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qserve.cli.resumption import telling_what_is_kept
from qserve.quant import run_state
from qserve.quant.errors import CheckpointError, OutputError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.options import Method, QuantizeOptions
from qserve.quant.output import Discarded, has_other_work, kept_work, publish_resumable
from qserve.quant.pipeline import quantize
from qserve.quant.progress import Progress
from qserve.quant.report import FILE_NAME
from qserve.quant.run_state import RunState, run_key

MakeLlama = Callable[..., Path]
TIMINGS = ("seconds", "peak_memory_bytes")
NUM_KILLS = 5


@pytest.fixture(scope="module")
def deep_llama(make_tiny_llama: MakeLlama) -> Path:
    """The tiny model with three blocks."""
    return make_tiny_llama(num_hidden_layers=3)


def run(
    model: Path,
    out: Path,
    options: QuantizeOptions,
    stop: tuple[int, BaseException] | None = None,
    restart: bool = False,
) -> list[int]:
    """Quantize and publish; the blocks that were done. stop: raise this after so many blocks."""
    source, seen = Checkpoint(model), []

    def watch(step: Progress) -> None:
        seen.append(step.done)
        if stop is not None and step.done == stop[0]:
            raise stop[1]

    key = run_key(source, options)
    with publish_resumable(out, key, restart=restart) as draft:
        quantize(source, draft.result, options, watch, draft.work)
    return seen


def content(folder: Path) -> dict[str, bytes]:
    """Every file, the report without what depends on the clock."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(files[FILE_NAME])
    for name in TIMINGS:
        del report[name]
    return files | {FILE_NAME: json.dumps(report).encode()}


@pytest.fixture(scope="module")
def whole(
    deep_llama: Path, tiny_options: QuantizeOptions, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What a run writes that nothing stops."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(deep_llama, out, tiny_options) == [1, 2, 3]
    return content(out)


@pytest.fixture(scope="module")
def stopped(
    deep_llama: Path, tiny_options: QuantizeOptions, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder in which a run was stopped after its second block. Do not write to it."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(KeyboardInterrupt):
        run(deep_llama, folder / "out", tiny_options, stop=(2, KeyboardInterrupt()))
    assert [path.name for path in folder.iterdir() if path.suffix != ".partial"] == []
    return folder


def test_a_stopped_run_goes_on_after_its_last_block_and_writes_the_same_bytes(
    deep_llama: Path,
    tiny_options: QuantizeOptions,
    whole: dict[str, bytes],
    stopped: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    assert run(deep_llama, tmp_path / "out", tiny_options) == [3]
    assert content(tmp_path / "out") == whole
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("damaged", ["hidden", "tensors", "json"])
@pytest.mark.parametrize("how", ["truncated", "changed", "missing"])
def test_a_block_with_a_damaged_file_does_not_count_as_finished(
    stopped: Path, tmp_path: Path, damaged: str, how: str
) -> None:
    shutil.copytree(stopped, tmp_path / "kept")
    (path,) = tmp_path.rglob(f"block-00001.{damaged}")
    state = RunState(path.parent)
    assert len(state.finished(with_hidden=True)) == 2
    good = path.read_bytes()
    path.write_bytes(good[:-5] if how == "truncated" else b"\xff" + good[1:])
    if how == "missing":
        path.unlink()
    assert len(state.finished(with_hidden=True)) == 1
    assert len(state.finished(with_hidden=False)) == (2 if damaged == "hidden" else 1)


def test_a_run_with_damaged_state_goes_back_to_the_last_good_block(
    deep_llama: Path,
    tiny_options: QuantizeOptions,
    whole: dict[str, bytes],
    stopped: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.rglob("block-00001.hidden")
    path.write_bytes(path.read_bytes()[:-5])
    assert run(deep_llama, tmp_path / "out", tiny_options) == [2, 3]
    assert content(tmp_path / "out") == whole


def test_a_method_that_reads_no_text_goes_on_too(
    deep_llama: Path, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    options = replace(tiny_options, method=Method.RTN)
    run(deep_llama, tmp_path / "whole", options)
    with pytest.raises(MemoryError):
        run(deep_llama, tmp_path / "out", options, stop=(1, MemoryError()))
    assert run(deep_llama, tmp_path / "out", options) == [2, 3]
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_another_run_begins_anew_and_removes_what_was_kept(
    deep_llama: Path, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", replace(tiny_options, method=Method.RTN)
    for other in (options, replace(options, ignore=("down_proj",))):
        with pytest.raises(KeyboardInterrupt):
            run(deep_llama, out, other, stop=(1, KeyboardInterrupt()))
        assert len(os.listdir(tmp_path)) == 1
    with pytest.raises(KeyboardInterrupt):
        run(deep_llama, out, options, stop=(1, KeyboardInterrupt()))
    assert run(deep_llama, out, options, restart=True) == [1, 2, 3]


def test_the_key_changes_with_model_options_calibration_text_and_threads(
    tiny_llama: Path, make_tiny_llama: MakeLlama, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one")
    options = replace(tiny_options, calibration=text)
    keys = [run_key(Checkpoint(tiny_llama), options)]
    keys.append(run_key(Checkpoint(tiny_llama), replace(options, seed=1)))
    keys.append(run_key(Checkpoint(make_tiny_llama(seed=1)), options))
    text.write_text("two")
    keys.append(run_key(Checkpoint(tiny_llama), options))
    torch.set_num_threads(2)
    keys.append(run_key(Checkpoint(tiny_llama), options))
    torch.set_num_threads(1)
    assert len(set(keys)) == len(keys)
    assert run_key(Checkpoint(tiny_llama), options) == keys[3]


def test_what_another_build_has_left_is_not_gone_on_with_and_that_is_said(
    deep_llama: Path,
    tiny_options: QuantizeOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(deep_llama, out, tiny_options, stop=(2, KeyboardInterrupt()))
    (kept,) = tmp_path.rglob("calibration.json")
    kept.write_text(json.dumps({"token_ids": [[1, 2]], "form": "of another build"}))
    same = run_key(Checkpoint(deep_llama), tiny_options)
    assert kept_work(out, same) is not None and not has_other_work(out, same)
    monkeypatch.setattr(run_state, "_code_hash", lambda: "of this build")
    key = run_key(Checkpoint(deep_llama), tiny_options)
    assert has_other_work(out, key)
    with telling_what_is_kept(out, key, restart=False):
        assert run(deep_llama, out, tiny_options) == [1, 2, 3]
    assert "beginning anew" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [CheckpointError("damaged"), Discarded()])
def test_nothing_is_kept_of_a_run_that_would_end_the_same_way_again(
    deep_llama: Path, tiny_options: QuantizeOptions, tmp_path: Path, error: Exception
) -> None:
    options = replace(tiny_options, method=Method.RTN)
    with pytest.raises(type(error)):
        run(deep_llama, tmp_path / "out", options, stop=(1, error))
    assert os.listdir(tmp_path) == []


def test_a_full_disk_keeps_what_is_finished_and_says_so(
    deep_llama: Path,
    tiny_options: QuantizeOptions,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, options = tmp_path / "out", replace(tiny_options, method=Method.RTN)
    full = OSError(errno.ENOSPC, "No space left on device")
    key = run_key(Checkpoint(deep_llama), options)
    with (
        pytest.raises(OutputError, match=r"what is finished is kept in .*\.partial"),
        telling_what_is_kept(out, key, restart=False),
    ):
        run(deep_llama, out, options, stop=(2, full))
    assert capsys.readouterr().err == "", "the error says it"
    assert kept_work(out, key) is not None
    assert run(deep_llama, out, options) == [3]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_killed_at_random_moments_writes_the_same_bytes_in_the_end(
    make_tiny_llama: MakeLlama, tmp_path: Path, text_file: Path
) -> None:
    model, out = make_tiny_llama(num_hidden_layers=12), tmp_path / "out"
    arguments = ["quantize", str(model), "--calibration", str(text_file), "--threads", "1"]
    arguments += ["--samples", "12", "--seq-len", "48", "-o"]
    command = [sys.executable, "-m", "qserve.cli.main", *arguments]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    seed = random.randrange(1 << 32)
    moments = random.Random(seed)
    kills = 0
    while kills < NUM_KILLS:
        process = subprocess.Popen([*command, str(out)], stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.rglob(f"block-{2 * kills:05d}.json")):
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"it had ended before it was killed, seed {seed}"
        kills += 1
        assert not out.exists()
    done = subprocess.run([*command, str(out)], check=True, capture_output=True, text=True)
    assert "going on with a run that was stopped" in done.stderr
    assert content(out) == content(tmp_path / "whole"), f"seed {seed}"
