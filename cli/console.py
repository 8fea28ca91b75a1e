"""What commands show: progress on stderr (a bar on a terminal, else lines), tables on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

PLAIN_INTERVAL_S = 10.0  # in a CI log, one line in this time is enough to see that it moves
PLAIN_TABLE_WIDTH = 120  # without a terminal there is no width: wide enough that no cell wraps


class Advance(Protocol):
    """The work calls it: ``advance(done, "what it does now")``, ``done`` counts from the start."""

    def __call__(self, done: float, note: str = "") -> None: ...


def is_interactive() -> bool:
    """Whether stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and Console(stderr=True).is_terminal


@contextmanager
def progress(title: str, total: float) -> Iterator[Advance]:
    """A progress display that ends with the block, and says how long it took when that succeeded.

    total: in any unit, the one that ``done`` counts.
    """
    start = time.monotonic()
    if is_interactive():
        with _bar(title, total) as advance:
            yield advance
    else:
        yield _plain_lines(title, total)
    click.echo(f"{title}: {time.monotonic() - start:.1f} s", err=True)


@contextmanager
def _bar(title: str, total: float) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("[dim]{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as display:
        task = display.add_task(title, total=total, note="")

        def advance(done: float, note: str = "") -> None:
            display.update(task, completed=done, note=note)

        yield advance


def _plain_lines(title: str, total: float) -> Advance:
    last = time.monotonic()

    def advance(done: float, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_INTERVAL_S:
            return
        last = now
        click.echo(f"{title}: {done:g}/{total:g} {note}".rstrip(), err=True)

    return advance


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table to stdout, without a header when no column has a name.

    Columns of numbers are aligned to the right, except the first.
    """
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_header=any(columns),
    )
    for index, column in enumerate(columns):
        numeric = index > 0 and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console(
        file=sys.stdout,
        width=None if sys.stdout.isatty() else PLAIN_TABLE_WIDTH,
        markup=False,
        highlight=False,
    )
    console.print(table)


def say(message: str) -> None:
    """One line about what is going on, on stderr: stdout is for results."""
    click.echo(message, err=True)
