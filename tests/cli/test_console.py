"""Progress goes to stderr, tables to stdout, and both read well in a log."""

from __future__ import annotations

import time

import pytest

from qserve.cli.console import print_table, progress, say


def test_progress_without_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.0, 1.0, 11.0, 12.0, 30.0, 31.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with progress("quantizing", 30) as advance:
        for block in range(1, 5):
            advance(block, f"{30 - block} s left")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "quantizing: 2/30 28 s left",
        "quantizing: 4/30 26 s left",
        "quantizing: 31.0 s",
    ]


def test_progress_of_a_failed_run_does_not_claim_a_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(KeyError), progress("quantizing", 30):
        raise KeyError("a mistake")
    assert capsys.readouterr().err == ""


def test_a_table_aligns_numbers_to_the_right(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("sizes", ("name", "bytes"), [("a", 5), ("b", 1234)])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "sizes"
    assert next(line for line in lines if line.startswith("  a")).endswith("    5")
    assert next(line for line in lines if line.startswith("  b")).endswith("1234")


def test_a_table_without_column_names_has_no_header(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("facts", ("", ""), [("size", "5 MB")])
    assert [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()] == [
        ["facts"],
        ["size", "5", "MB"],
    ]


def test_markup_in_a_cell_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("names", ("name",), [("[bold]model[/bold]",), ("a/[b]",)])
    text = capsys.readouterr().out
    assert "[bold]model[/bold]" in text and "a/[b]" in text


def test_what_is_said_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    say("importing")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "importing\n")
