"""The result folder: whole or absent, whatever happens while it is written."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from qserve.quant.errors import OutputError
from qserve.quant.output import check_output, publish

WRITER = """
import os, resource, signal, sys
from pathlib import Path
from qserve.quant.errors import OutputError
from qserve.quant.output import publish
"""


def run_writer(body: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run a few lines in a process of their own, with the imports they need."""
    command = [sys.executable, "-c", WRITER + body, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def hidden(folder: Path) -> list[str]:
    """What lies in a folder beside the results."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def make_model(folder: Path, content: str = "{}") -> Path:
    """A folder that looks like a model, with one file more."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(content)
    (folder / "old.bin").write_text("old")
    return folder


def test_folder_appears_only_after_the_block(tmp_path: Path) -> None:
    out = tmp_path / "new" / "model"
    with publish(out) as folder:
        (folder / "a.txt").write_text("whole")
        assert not out.exists()
        assert folder.parent.parent == out.parent  # a rename works within one file system only
    assert (out / "a.txt").read_text() == "whole"
    assert hidden(out.parent) == []


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
def test_nothing_is_left_when_the_block_fails(tmp_path: Path, error: BaseException) -> None:
    with (
        pytest.raises(type(error)),
        publish(tmp_path / "made" / "for" / "this") as folder,
    ):
        (folder / "a.txt").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_empty_folder_is_filled_without_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with publish(out) as folder:
        (folder / "a.txt").touch()
    assert os.listdir(out) == ["a.txt"]


def test_full_folder_is_refused_before_the_block_runs(tmp_path: Path) -> None:
    out = make_model(tmp_path / "out")
    with pytest.raises(OutputError, match="--force"), publish(out):
        pytest.fail("the block ran")
    assert (out / "old.bin").read_text() == "old"


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    out = make_model(tmp_path / "out")
    with publish(out, force=True) as folder:
        (folder / "new.bin").touch()
        assert (out / "old.bin").exists()
    assert os.listdir(out) == ["new.bin"]
    assert hidden(tmp_path) == []


def test_force_keeps_the_old_folder_when_the_block_fails(tmp_path: Path) -> None:
    out = make_model(tmp_path / "out")
    with pytest.raises(RuntimeError), publish(out, force=True):
        raise RuntimeError
    assert sorted(os.listdir(out)) == ["config.json", "old.bin"]
    assert hidden(tmp_path) == []


def test_force_never_deletes_what_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(OutputError, match="not a model folder"):
        check_output(tmp_path / "home", force=True)


def test_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make_model(tmp_path / "out")
    rename = Path.rename

    def refuse_partial(self: Path, target: Path) -> Path:
        if self.name == "result":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_partial)
    with pytest.raises(OutputError, match="the disk reports an error"), publish(out, force=True):
        pass
    assert sorted(os.listdir(out)) == ["config.json", "old.bin"]
    assert hidden(tmp_path) == []


def test_folder_that_was_filled_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OutputError, match="not empty"), publish(out):
        make_model(out)
    assert (out / "old.bin").exists()
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("model", "is what is being read"),
        ("model/../model", "is what is being read"),
        ("link", "is what is being read"),
        ("model/quantized", "is inside"),
        ("link/deep/er", "is inside"),
        (".", "contains"),
    ],
)
def test_output_that_touches_the_model_is_refused(tmp_path: Path, out: str, reason: str) -> None:
    model = make_model(tmp_path / "model")
    (tmp_path / "config.json").touch()
    (tmp_path / "link").symlink_to(model)
    with pytest.raises(OutputError, match=reason):
        check_output(tmp_path / out, force=True, protect=[model])


def test_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        check_output(tmp_path / "file", force=True)
    with pytest.raises(OutputError, match="leads through a file"):
        check_output(tmp_path / "file" / "out")


def test_mount_point_is_refused_before_the_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path)
    with pytest.raises(OutputError, match=f"such as {tmp_path}/model"), publish(tmp_path):
        pytest.fail("the block ran")


def test_file_system_without_locks_and_permissions_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(Path, "chmod", refuse)
    other = tmp_path / ".out.01234567.partial"  # perhaps of a run that is under way
    other.mkdir()
    with publish(tmp_path / "out") as folder:
        (folder / "a.txt").touch()
    assert os.listdir(tmp_path / "out") == ["a.txt"]
    assert other.exists()


def test_place_that_takes_no_folder_is_refused() -> None:
    with pytest.raises(OutputError, match="/proc takes no new folder"), publish(Path("/proc/out")):
        pytest.fail("the block ran")


def test_files_are_as_readable_as_the_folder(tmp_path: Path) -> None:
    with publish(tmp_path / "out") as folder:
        (folder / "private").touch(mode=0o600)
    out = tmp_path / "out"
    assert (out / "private").stat().st_mode & 0o777 == out.stat().st_mode & 0o666


def test_full_disk_is_an_output_error(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="no space is left on the disk"),
        publish(tmp_path / "out"),
        open("/dev/full", "wb", buffering=0) as device,
    ):
        device.write(b"weights")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_recognized_in_the_errors_of_safetensors(tmp_path: Path) -> None:
    body = """
from safetensors.numpy import save_file
import numpy
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with publish(Path(sys.argv[1])) as folder:
        save_file({"weight": numpy.zeros(1000)}, folder / "model.safetensors")
except OutputError as error:
    sys.exit(str(error))
"""
    done = run_writer(body, tmp_path / "out")
    assert done.returncode == 1
    assert "the file would exceed the size limit" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOENT, "no such file"), SafetensorError("header too small")]
)
def test_errors_that_are_not_about_writing_pass_unchanged(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, publish(tmp_path / "out"):
        raise error
    assert caught.value is error


def test_killed_run_leaves_a_hidden_folder_that_the_next_run_removes(tmp_path: Path) -> None:
    body = """
with publish(Path(sys.argv[1])) as folder:
    (folder / "half.bin").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    out = tmp_path / "out"
    assert run_writer(body, out).returncode == -signal.SIGKILL
    assert not out.exists()
    assert [name.endswith(".partial") for name in hidden(tmp_path)] == [True]
    with publish(out) as folder:
        assert hidden(tmp_path) == [folder.parent.name]


def test_run_killed_between_the_renames_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_model(tmp_path / ".out.01234567.replaced")
    make_model(tmp_path / ".other.01234567.replaced")
    with pytest.raises(OutputError, match="not empty"), publish(out):
        pytest.fail("the block ran")
    assert (out / "old.bin").read_text() == "old"
    assert hidden(tmp_path) == [".other.01234567.replaced"]


def test_folder_renamed_aside_is_removed_when_its_successor_is_there(tmp_path: Path) -> None:
    make_model(tmp_path / ".out.01234567.replaced")
    make_model(tmp_path / "out")
    with publish(tmp_path / "out", force=True):
        pass
    assert hidden(tmp_path) == []


def test_second_run_to_the_same_folder_is_refused_and_does_no_harm(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with publish(out) as folder:
        (folder / "a.txt").touch()
        with pytest.raises(OutputError, match="another run"), publish(out):
            pytest.fail("the block ran")
    assert os.listdir(out) == ["a.txt"]
