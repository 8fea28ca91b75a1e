"""Tables of measurements grow by whole runs, or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from qserve.cli.row_table import append_rows, last_run, read_rows, replace_text, stamp

FIRST = {"date": "2026-11-22", "commit": "aaaaaaa", "op": "rms_norm", "us": 3.5}
SECOND = {"date": "2026-11-23", "commit": "bbbbbbb", "op": 'a, "quoted" name', "us": 4.0}


def test_rows_are_added_to_those_there_are(tmp_path: Path) -> None:
    table = tmp_path / "new" / "kernels.csv"
    append_rows(table, [FIRST])
    append_rows(table, [SECOND, SECOND | {"us": 5.0}])
    append_rows(table, [])
    rows = read_rows(table)
    assert [row["us"] for row in rows] == ["3.5", "4.0", "5.0"]
    assert rows[1]["op"] == 'a, "quoted" name'
    assert [row["us"] for row in last_run(table)] == ["4.0", "5.0"]


def test_a_column_that_is_new_is_empty_in_old_rows(tmp_path: Path) -> None:
    table = tmp_path / "kernels.csv"
    append_rows(table, [FIRST])
    append_rows(table, [{"date": "2026-11-23", "commit": "c", "op": "x", "share": 0.5}])
    old, new = read_rows(table)
    assert (old["share"], new["share"], new["us"]) == ("", "0.5", "")


def test_a_write_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "kernels.csv"
    append_rows(table, [FIRST])
    before = table.read_bytes()

    def fail(descriptor: int) -> Any:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        append_rows(table, [SECOND])
    assert table.read_bytes() == before
    assert list(tmp_path.iterdir()) == [table]


def test_there_is_nothing_to_read_where_there_is_no_table(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "none.csv") == last_run(tmp_path / "none.csv") == []


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    replace_text(tmp_path / "chart.svg", "é\n")
    assert (tmp_path / "chart.svg").read_bytes() == "é\n".encode()


def test_a_stamp_is_a_date_and_a_commit() -> None:
    assert list(stamp()) == ["date", "commit"]
    assert len(stamp()["date"]) == len("2026-11-23")
