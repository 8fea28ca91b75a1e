"""Calibration text from a data set of the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import cast

import huggingface_hub
from huggingface_hub import errors as hub_errors

from qserve.quant.errors import CalibrationError, OptionError

PREFIX = "hub:"
DEFAULT_SPLIT = "train"

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", ".txt")
"""Of files that can be read."""

NOT_DATA = re.compile(r"(^|/)(\.|readme|license|dataset_infos?\.|requirements)", re.IGNORECASE)
"""Files that lie beside the data."""

FORM = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/(?P<folder>[\w./-]+))?"
    r"(?:@(?P<revision>[\w./-]+))?(?::(?P<split>[\w.-]+))?(?::(?P<column>[^:]+))?"
)

PART = re.compile(r"(?:^|[-_.])\d+(?:[-_]of[-_]\d+)?(?:-[0-9a-f]{8,})?$")
"""The end of a name that tells the parts of one split apart: ``-00000-of-00002-1a2b3c4d5e``."""

UNREACHABLE = cast("tuple[type[Exception], ...]", hub_errors.HfHubHTTPError.__bases__)
"""What is raised without a network: errors of the HTTP client, whichever it is, and of the system,
an empty cache among them."""


@dataclass(frozen=True, slots=True)
class HubDataset:
    """A data set, or a part of one.

    repository: ``owner/name``. folder: of its files; None for all. revision: None for the newest.
    split: None for ``train``, or for the only one. column: the field of an entry that holds its
    text or its messages; None for ``text`` or ``messages``.
    """

    repository: str
    folder: str | None = None
    revision: str | None = None
    split: str | None = None
    column: str | None = None

    def __str__(self) -> str:
        marked = (
            ("/", self.folder),
            ("@", self.revision),
            (":", self.split),
            (":", self.column),
        )
        return PREFIX + self.repository + "".join(mark + part for mark, part in marked if part)

    def fetch(self) -> Iterator[Path]:
        """The data files of the split in order, each downloaded when it is asked for.

        What is in the hub's cache is not downloaded again, and does without a network.
        Raises ``CalibrationError`` when the hub gives nothing away, when there is no such split,
        and when there is nothing that can be read.
        """
        for name in self._choose(self._list()):
            with self._explained():
                path = huggingface_hub.hf_hub_download(
                    self.repository, name, repo_type="dataset", revision=self.revision
                )
            yield Path(path)

    def _list(self) -> list[str]:
        """The names of all files; of those in the hub's cache when it cannot be reached."""
        with self._explained():
            try:
                return huggingface_hub.HfApi().list_repo_files(
                    self.repository, revision=self.revision, repo_type="dataset"
                )
            except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError):
                raise
            except UNREACHABLE:
                folder = self._cached()
                if folder is None:
                    raise
        found = [path for path in folder.rglob("*") if path.is_file()]
        return [path.relative_to(folder).as_posix() for path in found]

    def _cached(self) -> Path | None:
        """The folder with what was downloaded before."""
        try:
            folder = huggingface_hub.snapshot_download(
                self.repository, revision=self.revision, repo_type="dataset", local_files_only=True
            )
        except hub_errors.LocalEntryNotFoundError:
            return None
        return Path(folder)

    def _choose(self, names: list[str]) -> list[str]:
        """The files of the split."""
        within = f"{self.folder}/" if self.folder else ""
        files = sorted(
            name
            for name in names
            if name.startswith(within)
            and name.lower().endswith(SUFFIXES)
            and not NOT_DATA.search(name)
        )
        if not files:
            raise CalibrationError(
                f"{self} has no file that can be read: expected {', '.join(SUFFIXES)}"
            )
        splits = sorted({_split_of(name) for name in files})
        wanted = self.split or DEFAULT_SPLIT
        chosen = [name for name in files if _is_of(name, wanted)]
        if not chosen and self.split is None and len(splits) == 1:
            chosen = files
        if not chosen:
            raise CalibrationError(
                f"{self} has no split {wanted}: give one of {', '.join(splits)}, as in "
                f"{PREFIX}{self.repository}:{splits[0]}"
            )
        folders = sorted({str(PurePosixPath(name).parent) for name in chosen})
        if len(folders) > 1:
            raise CalibrationError(
                f"{self} has this split in {len(folders)} folders ({', '.join(folders[:5])}): name "
                f"one, as in {PREFIX}{self.repository}/{folders[0]}"
            )
        return chosen

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of the hub in plain words."""
        try:
            yield
        except hub_errors.GatedRepoError:
            raise CalibrationError(
                f"{self} asks for a consent that this machine's hub account has not given: accept "
                "its terms on the hub and log in with `hf auth login`"
            ) from None
        except (hub_errors.RepositoryNotFoundError, hub_errors.RevisionNotFoundError):
            raise CalibrationError(
                f"{self} is not a data set on the hub: check owner, name and revision, or log in "
                "with `hf auth login` if it is private"
            ) from None
        except UNREACHABLE as error:
            raise CalibrationError(
                f"{self} is not in the hub's cache, and the hub cannot be reached ({error}): fetch "
                "a file of it on a machine that can, and give that"
            ) from None


def parse_dataset(text: str) -> HubDataset:
    """The data set that ``OWNER/NAME[/FOLDER][@REVISION][:SPLIT[:COLUMN]]`` names, after ``hub:``.

    Raises ``OptionError`` for another form.
    """
    match = FORM.fullmatch(text.removeprefix(PREFIX))
    if match is None:
        raise OptionError(
            f"{text!r} names no data set: expected {PREFIX}OWNER/NAME[/FOLDER][@REVISION]"
            "[:SPLIT[:COLUMN]]"
        )
    return HubDataset(**match.groupdict())


def _split_of(name: str) -> str:
    """What the name of a file says of its split: of ``data/train-00000-of-00002.parquet`` train."""
    path = PurePosixPath(name)
    stem = path.name.lower()
    for suffix in SUFFIXES:
        stem = stem.removesuffix(suffix)
    return PART.sub("", stem) or path.parent.name


def _is_of(name: str, split: str) -> bool:
    found = _split_of(name)
    return found == split.lower() or found.endswith(
        tuple(f"{mark}{split.lower()}" for mark in "-_.")
    )
