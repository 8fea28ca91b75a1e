"""The folder of packed weights: what lies there, room for more, and files that appear whole."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from qserve.serve.weight_file import UnusableFile, read_index

SUFFIX = ".weights"
PARTIAL = ".partial"
SHARE_OF_DISK = 0.25
"""Of the space that is free or holds packed weights: the files used least make room beyond it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of the folder. used: when a server last read it, seconds since 1970. model: the
    checkpoint it was made from; None for a file that is damaged or was never finished."""

    path: Path
    nbytes: int
    used: float
    model: str | None


def list_entries(folder: Path) -> list[Entry]:
    """The files of packed weights, those used last first; nothing else in ``folder`` counts."""
    entries = []
    for path in folder.glob(f"*{SUFFIX}*"):
        if path.name.endswith((SUFFIX, SUFFIX + PARTIAL)):
            with suppress(OSError):  # it has gone meanwhile
                status = path.stat()
                entries.append(Entry(path, status.st_size, status.st_mtime, _model_of(path)))
    return sorted(entries, key=lambda entry: entry.used, reverse=True)


def clear(folder: Path) -> list[Entry]:
    """Remove the files of packed weights, those being written aside, and return them.

    A server that has mapped one keeps its memory. Raises ``OSError`` when one cannot be removed.
    """
    return [entry for entry in list_entries(folder) if _remove(entry.path)]


def make_room(path: Path, nbytes: int) -> None:
    """Make the folder of ``path``, and remove what is used least until ``nbytes`` may be written.

    Raises ``OSError`` when they are more than the cache may hold, or the folder cannot be made.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    others = [entry for entry in list_entries(path.parent) if entry.path.name != path.name]
    held = sum(entry.nbytes for entry in others)
    limit = int((shutil.disk_usage(path.parent).free + held) * SHARE_OF_DISK)
    if nbytes > limit:
        raise OSError(
            errno.ENOSPC,
            f"{nbytes >> 20} MiB are needed, a quarter of the free space is {limit >> 20} MiB",
        )
    for entry in reversed(others):
        is_finished = entry.path.name.endswith(SUFFIX)
        if (not is_finished or held + nbytes > limit) and _remove(entry.path):
            held -= entry.nbytes


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """An empty file that becomes ``path`` when the block succeeds, and is removed when it raises.

    Raises ``BlockingIOError`` while another process writes the same one, ``OSError`` for a folder
    that cannot be written or has no locks.
    """
    partial = path.with_name(path.name + PARTIAL)
    with _locked(partial, os.O_CREAT) as file:
        try:
            file.truncate(0)  # a killed process may have left something
            yield file
            file.flush()
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@contextmanager
def _locked(path: Path, flags: int = 0) -> Iterator[BinaryIO]:
    """An open file that no other process has locked; raises ``BlockingIOError`` for one that has
    been, also when its owner has renamed it meanwhile."""
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CLOEXEC | flags, 0o600), "r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise BlockingIOError(errno.EWOULDBLOCK, f"{path} has just been finished")
        yield file


def _remove(path: Path) -> bool:
    """Remove a file unless it is being written."""
    if path.name.endswith(SUFFIX):
        path.unlink(missing_ok=True)
        return True
    try:
        with _locked(path):
            path.unlink()
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


def _model_of(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return str(read_index(file).facts["model"])
    except (UnusableFile, KeyError):
        return None
