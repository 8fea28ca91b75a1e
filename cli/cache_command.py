"""`qserve cache`: what is kept of packed weights, and how to be rid of it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qserve.cli.cache import OFF, WEIGHT_CACHE_VARIABLE, weight_cache_folder
from qserve.cli.console import print_table
from qserve.cli.errors import CommandError, ExitCode
from qserve.quant.quantities import format_bytes

if TYPE_CHECKING:
    from qserve.serve.cache_folder import Entry


@click.command()
@click.argument("action", type=click.Choice(["list", "clear"]), default="list")
@click.option(
    "--weight-cache",
    metavar="DIR",
    envvar=WEIGHT_CACHE_VARIABLE,
    show_envvar=True,
    help="The folder. Default: the one that `qserve serve` uses.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(action: str, weight_cache: str | None, as_json: bool) -> None:
    """List the packed weights that `qserve serve` keeps to start faster, or clear them.

    They are made again when a model is served the next time. A server that is running keeps what it
    has loaded.
    """
    from qserve.serve.cache_folder import clear, list_entries

    folder = weight_cache_folder(os.environ, weight_cache)
    if folder is None:
        raise click.UsageError(f"the cache is {OFF}: name a folder with --weight-cache")
    try:
        entries = list_entries(folder) if action == "list" else clear(folder)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CommandError(f"{folder} cannot be changed: {reason}", ExitCode.OUTPUT) from None
    if as_json:
        found = {"folder": str(folder), action: [_describe(entry) for entry in entries]}
        json.dump(found, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _print(folder, action, entries)


def _describe(entry: Entry) -> dict[str, object]:
    return {
        "file": entry.path.name,
        "model": entry.model,
        "bytes": entry.nbytes,
        "used": int(entry.used),
    }


def _print(folder: Path, action: str, entries: list[Entry]) -> None:
    files = "1 file" if len(entries) == 1 else f"{len(entries)} files"
    total = format_bytes(sum(entry.nbytes for entry in entries))
    if action == "clear":
        click.echo(f"{files} removed from {folder}, {total}")
        return
    rows = [
        (
            entry.model or "damaged or unfinished",
            format_bytes(entry.nbytes),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used)),
        )
        for entry in entries
    ]
    if rows:
        print_table(f"Packed weights in {folder}", ("model", "size", "last used"), rows)
    click.echo(f"{files} in {folder}, {total}")
