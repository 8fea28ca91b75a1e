"""Tables of measurements: CSV files to which runs append rows, each with its date and commit."""

from __future__ import annotations

import csv
import datetime
import io
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = Mapping[str, object]

STAMP = ("date", "commit")
"""The columns that all rows of a run share."""


def stamp() -> dict[str, str]:
    """The values of ``STAMP`` now; the commit is empty outside of git."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parent,
    )
    values = (datetime.date.today().isoformat(), done.stdout.strip())
    return dict(zip(STAMP, values, strict=True))


def append_rows(table: Path, rows: Sequence[Row]) -> None:
    """Add ``rows``, which all have the columns of the first, to a table that may not exist yet.

    A column that only old or only new rows have is empty in the others. Either all rows are in the
    file afterwards, or it is as it was.
    """
    if not rows:
        return
    old = read_rows(table)
    columns = list(dict.fromkeys([*(old[0] if old else ()), *rows[0]]))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows([*old, *rows])
    replace_text(table, text.getvalue())


def read_rows(table: Path) -> list[dict[str, str]]:
    """The rows of a table, none when there is no such file."""
    if not table.is_file():
        return []
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def last_run(table: Path) -> list[dict[str, str]]:
    """The rows with the stamp of the last one."""
    rows = read_rows(table)
    return [row for row in rows if all(row.get(c) == rows[-1].get(c) for c in STAMP)]


def replace_text(path: Path, text: str) -> None:
    """Write a file that is there in full or as it was before, whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
