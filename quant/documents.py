"""The documents of calibration text: plain texts and conversations, in files of several kinds."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from qserve.quant.calibration_text import KINDS, texts
from qserve.quant.errors import CalibrationError
from qserve.quant.hub_data import HubDataset
from qserve.quant.options import CalibrationSource
from qserve.quant.windows import read_text

LINES = (".jsonl", ".json")
ZIPPED = ".gz"
TABLE = ".parquet"

FIELDS = ("messages", "text")
"""Where an entry has its conversation or its text, unless the user names the field."""

MAX_HUB_CHARACTERS = 8_000_000
"""Of a data set so much is read: two million tokens, more than any calibration or tuning takes."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or the messages of a conversation. where: its place, for messages to the user."""

    where: str
    content: str | list[Any]

    @property
    def num_characters(self) -> int:
        """Of the text, about as many of a conversation."""
        return len(self.content if isinstance(self.content, str) else str(self.content))


def read_documents(source: Path | HubDataset | CalibrationSource) -> list[Document]:
    """The documents of a file, of a data set of the hub, or those that come with the package.

    A ``.jsonl`` or ``.json`` file (also zipped, ``.gz``) has an object on each line, or a list of
    them: with ``text``, or with ``messages``. A ``.parquet`` file has such columns. Any other file
    is one document.
    Raises ``CalibrationError`` for a file that cannot be read, with the line.
    """
    if isinstance(source, Path):
        return list(_read_file(source, str(source), None))
    if isinstance(source, CalibrationSource):
        return [Document(kind, text) for kind, text in zip(KINDS, texts(), strict=True)]
    documents, num_characters = [], 0
    for path in source.fetch():
        for document in _read_file(path, f"{source}: {path.name}", source.column):
            documents.append(document)
            num_characters += document.num_characters
            if num_characters >= MAX_HUB_CHARACTERS:
                return documents
    return documents


def _read_file(path: Path, name: str, column: str | None) -> Iterator[Document]:
    """The documents of a file. name: what it is called in messages."""
    kinds = [suffix.lower() for suffix in path.suffixes]
    kind = next((kind for kind in reversed(kinds) if kind != ZIPPED), "")
    if kind == TABLE:
        entries = _rows(path, name, column)
    elif kind in LINES:
        entries = _entries(path, name)
    else:
        yield Document(name, read_text(path))
        return
    for where, entry in entries:
        yield Document(where, _content(entry, where, column))


def _content(entry: Any, where: str, column: str | None) -> str | list[Any]:
    """The text or the messages of an entry."""
    if not isinstance(entry, dict):
        raise CalibrationError(f"{where}: expected an object with `text` or `messages`")
    found = [entry[name] for name in ((column,) if column else FIELDS) if name in entry]
    for content in found:
        if isinstance(content, str | list):
            return content
    if column is not None:
        listed = ", ".join(map(str, entry))
        what = "is neither a text nor a list of messages" if found else f"is not among {listed}"
        raise CalibrationError(f"{where}: the field {column} {what}: name another")
    raise CalibrationError(f"{where}: expected `text`, or `messages` with role and content")


def _entries(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    """The entries of a list, or of lines that are not blank, each with its place."""
    lines = _lines(path, name)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        is_list = number == 1 and line.lstrip().startswith("[")
        try:
            entry = json.loads(line + "".join(lines) if is_list else line)
        except ValueError as error:
            raise CalibrationError(f"{where} is not JSON ({error})") from None
        if is_list:
            yield from ((f"{name}[{index}]", one) for index, one in enumerate(entry))
        else:
            yield where, entry


def _lines(path: Path, name: str) -> Iterator[str]:
    try:
        opened: Any = gzip.open if path.suffix.lower() == ZIPPED else open
        with opened(path, "rt", encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{name} is not UTF-8 text (byte {error.start})") from None
    except (OSError, EOFError) as error:
        raise CalibrationError(f"{name} cannot be read ({error}): give a text file") from None


def _rows(path: Path, name: str, column: str | None) -> Iterator[tuple[str, Any]]:
    """The rows of a table, each as an object with those of its columns that may be read."""
    try:
        parquet: Any = import_module("pyarrow.parquet")
    except ImportError:
        raise CalibrationError(
            f"{name} is a Parquet file, which takes a library to read: pip install pyarrow"
        ) from None
    try:
        table = parquet.ParquetFile(path)
        columns = [one for one in table.schema_arrow.names if one in (column, *FIELDS)]
        if not columns or column not in (None, *columns):
            listed = ", ".join(table.schema_arrow.names)
            raise CalibrationError(
                f"{name} has no column {column or ' or '.join(FIELDS)}: name one of {listed}"
            )
        number = 0
        for batch in table.iter_batches(columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"{name}:{number}", row
    except (OSError, ValueError) as error:
        raise CalibrationError(f"{name} is not a whole Parquet file ({error})") from None
