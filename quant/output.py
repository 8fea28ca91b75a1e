"""A result folder that appears whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from qserve.quant.errors import OutputError, QuantError

PARTIAL = ".partial"
REPLACED = ".replaced"
RESULT, WORK = "result", "work"
TOKEN_BYTES = 4

# What the system answers when a file cannot grow or be made; anything else is not about the output.
CANNOT_WRITE = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the size limit",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk reports an error",
    errno.EACCES: "permission denied",
    errno.EPERM: "operation not permitted",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ENOTDIR: "a part of the path is a file",
    errno.EBUSY: "it is in use, perhaps as a mount point",
}
# safetensors writes in Rust and keeps the number only in the text of its error.
SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


@dataclass(frozen=True, slots=True)
class Draft:
    """A result that is being made. Both folders are hidden beside the place where it will be.

    result: becomes the output. work: what a killed run had finished, empty at first; what is
    written there is there again when the same run is begun anew.
    """

    result: Path
    work: Path


class Discarded(Exception):
    """Leaves the block of ``publish`` or ``publish_resumable`` without a result."""


@contextmanager
def publish(out: Path, force: bool = False, *, protect: Sequence[Path] = ()) -> Iterator[Path]:
    """A hidden folder beside ``out`` to write to, which becomes ``out`` when the block succeeds.

    Before the block runs, ``out`` is checked (see ``check_output``), the folder is made in the
    same file system, and what killed runs left there is removed. After the block all files are
    flushed to the disk and the folder is renamed to ``out``; a folder that was there (``force``)
    is renamed aside first and removed last, so that one of the two always exists in full. When the
    block raises, the hidden folder is removed and ``out`` is as it was.

    protect: files and folders that are being read, such as the model; ``out`` may not hold them.
    Raises ``OutputError``, also in place of what the system raises for a full disk.
    """
    with _publish(out, force, protect, secrets.token_hex(TOKEN_BYTES)) as draft:
        yield draft.result


@contextmanager
def publish_resumable(
    out: Path,
    key: str,
    force: bool = False,
    *,
    protect: Sequence[Path] = (),
    restart: bool = False,
) -> Iterator[Draft]:
    """Like ``publish``, for work that a later run with the same ``key`` can go on with.

    The work is kept when the run is killed or interrupted, and when the block raises something that
    another try may not meet again, such as a full disk. It is removed with the result of a run of
    another key, when the block succeeds, and when it raises ``QuantError`` or ``Discarded``.

    key: a hexadecimal digest of all that the result follows from. restart: remove what there is of
    this key too.
    """
    with _publish(out, force, protect, _token(key), keep=True, restart=restart) as draft:
        yield draft


def kept_work(out: Path, key: str) -> Path | None:
    """The folder of what an unfinished run with this key has left; None when there is nothing."""
    folder = _hidden(Path(os.path.realpath(out)), _token(key))
    return folder if _holds_files(folder / WORK) else None


def has_other_work(out: Path, key: str) -> bool:
    """Whether an unfinished run with another key has left something, which will be removed."""
    target = Path(os.path.realpath(out))
    if not target.parent.is_dir():
        return False
    mine = _hidden(target, _token(key))
    return any(path != mine and _holds_files(path / WORK) for path in _leftovers(target, PARTIAL))


@contextmanager
def _publish(
    out: Path,
    force: bool,
    protect: Sequence[Path],
    token: str,
    keep: bool = False,
    restart: bool = False,
) -> Iterator[Draft]:
    target = Path(os.path.realpath(out))
    folder = _hidden(target, token)
    check_output(out, force, protect=protect)
    try:
        with _parent_of(target), _claimed(target, folder, keep, restart) as draft:
            check_output(out, force, protect=protect)  # an old ``out`` may have been put back
            yield draft
            _flush(draft.result)
            with _alone_in(target.parent):
                check_output(out, force, protect=protect)  # hours may have passed
                _replace(target, draft.result, token)
    except (OSError, SafetensorError) as error:
        if (reason := _reason_against_writing(error)) is None:
            raise
        left = f"what is finished is kept in {folder}" if folder.exists() else "nothing is left"
        raise OutputError(
            f"{out} cannot be written: {reason}; {left}: free some space or choose another folder"
        ) from error


def _token(key: str) -> str:
    return key[: 2 * TOKEN_BYTES]


def _hidden(target: Path, token: str) -> Path:
    return target.with_name(f".{target.name}.{token}{PARTIAL}")


def _holds_files(folder: Path) -> bool:
    return any(path.is_file() for path in folder.rglob("*"))


def check_output(out: Path, force: bool = False, *, protect: Sequence[Path] = ()) -> None:
    """Raise ``OutputError`` unless ``out`` may be written: absent or an empty folder.

    With ``force`` a model folder may be replaced, but nothing else: a slip of the keyboard must not
    delete a home folder.
    """
    target = Path(os.path.realpath(out))
    for path in map(Path, map(os.path.realpath, protect)):
        if target == path:
            raise OutputError(f"{out} is what is being read: choose another output folder")
        if target.is_relative_to(path):
            raise OutputError(f"{out} is inside {path}, which is being read: choose another folder")
        if path.is_relative_to(target):
            raise OutputError(f"{out} contains {path}, which is being read: choose another folder")
    if target.is_mount():
        raise OutputError(
            f"{out} is a mount point, which no folder can replace: give a folder inside it, such "
            f"as {out / 'model'}"
        )
    try:
        content = sorted(os.listdir(target))
    except FileNotFoundError:
        return
    except NotADirectoryError:
        where = "is a file" if target.is_file() else "leads through a file"
        raise OutputError(f"{out} {where}: choose another output folder") from None
    except OSError as error:
        raise OutputError(f"{out} cannot be read: {error.strerror}") from None
    if not content:
        return
    if not force:
        raise OutputError(f"{out} exists and is not empty: choose another folder or add --force")
    if "config.json" not in content:
        raise OutputError(
            f"{out} holds {content[0]} and no config.json: it is not a model folder, and --force "
            "replaces nothing else; choose another folder"
        )


def _reason_against_writing(error: OSError | SafetensorError) -> str | None:
    if isinstance(error, OSError):
        return CANNOT_WRITE.get(error.errno or 0)
    found = SYSTEM_ERROR.search(str(error))
    return CANNOT_WRITE.get(int(found[1])) if found else None


@contextmanager
def _parent_of(target: Path) -> Iterator[None]:
    """The parent folders of ``target`` exist; those made here are removed when the block raises."""
    missing = [path for path in target.parents if not path.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):  # somebody else may have put something there meanwhile
                path.rmdir()
        raise


@contextmanager
def _claimed(target: Path, folder: Path, keep: bool, restart: bool) -> Iterator[Draft]:
    """``folder`` beside ``target``, locked while in use, with an empty result in it.

    The lock is how the next run tells a killed run's folder from one that is being written. keep:
    the work in it stays when the block is left by something that may not happen again. restart:
    work that is there already is removed.
    """
    draft = Draft(folder / RESULT, folder / WORK)
    with ExitStack() as held:
        with _alone_in(target.parent):
            _clean(target, spare=folder if keep and not restart else None)
            try:
                folder.mkdir(exist_ok=keep)
            except OSError as error:
                raise OutputError(
                    f"{target.parent} takes no new folder ({error.strerror}): choose another place"
                ) from None
            held.enter_context(_claim(target, folder))
            shutil.rmtree(draft.result, ignore_errors=True)
            draft.result.mkdir()
            draft.work.mkdir(exist_ok=True)
        is_worth_keeping = False
        try:
            yield draft
        except (QuantError, Discarded):
            raise
        except BaseException:
            is_worth_keeping = keep and _holds_files(draft.work)
            raise
        finally:
            if not is_worth_keeping:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _claim(target: Path, folder: Path) -> Iterator[bool]:
    """Hold the lock of a hidden folder beside ``target``. Raises ``OutputError`` if another has it.

    Gives False on a file system without locks.
    """
    with ExitStack() as held:
        try:
            is_mine = held.enter_context(_locked(folder))
        except BlockingIOError:
            raise OutputError(
                f"{target} is being written by another run at this moment: wait for it, or choose "
                "another folder"
            ) from None
        yield is_mine


@contextmanager
def _locked(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Hold the lock of a folder, which ends with the process at the latest.

    Gives False on a file system without locks. Raises ``BlockingIOError`` when another process has
    it, unless told to wait.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)


def _alone_in(folder: Path) -> AbstractContextManager[bool]:
    """For the moments in which two runs that write to the same folder must not see each other."""
    return _locked(folder, wait=True)


def _clean(target: Path, spare: Path | None) -> None:
    """Remove what killed runs left; put an old ``target`` back that one had renamed aside.

    spare: the folder to go on with.
    """
    for path in _leftovers(target, REPLACED):
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(target)
    for path in _leftovers(target, PARTIAL):
        with _claim(target, path) as is_mine:
            if is_mine and path != spare:
                shutil.rmtree(path, ignore_errors=True)


def _leftovers(target: Path, kind: str) -> list[Path]:
    token = f"[0-9a-f]{{{2 * TOKEN_BYTES}}}"
    name = re.compile(re.escape(f".{target.name}.") + token + re.escape(kind))
    return [path for path in target.parent.iterdir() if name.fullmatch(path.name)]


def _flush(folder: Path) -> None:
    """Write every file and folder through to the disk, so that a power cut cannot empty them.

    Files get the permissions of the folder: safetensors makes them readable by the owner only.
    """
    readable = folder.stat().st_mode & 0o666
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            with suppress(OSError):  # some file systems have no permissions
                (Path(place) / name).chmod(readable)
            _sync(Path(place) / name)
        _sync(Path(place))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot flush a folder
            raise
    finally:
        os.close(handle)


def _replace(target: Path, folder: Path, token: str) -> None:
    """Rename ``folder`` to ``target``; a full ``target`` steps aside and is removed at the end."""
    aside = target.with_name(f".{target.name}.{token}{REPLACED}")
    occupied = target.exists() and any(target.iterdir())
    if occupied:
        target.rename(aside)
    try:
        folder.rename(target)  # over an empty folder too
    except BaseException:
        if occupied:
            aside.rename(target)
        raise
    _sync(target.parent)
    if occupied:
        shutil.rmtree(aside, ignore_errors=True)
