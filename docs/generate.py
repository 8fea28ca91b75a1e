"""Write the pages of docs/reference/ that come from the code: what `make docs` calls."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from qserve.cli.errors import ExitCode
from qserve.cli.main import PROGRAM, cli
from qserve.cli.row_table import STAMP, last_run

DOCS = Path(__file__).resolve().parent
REFERENCE = DOCS / "reference"
BENCHMARKS = DOCS / "benchmarks"
WIDTH = 100  # so that the pages do not depend on who runs this


def command_line() -> str:
    """The page about the command line: every command's own help, and the exit codes."""
    parts = [
        "# Command line",
        "Written by `make docs` from the commands' own help: change it there.",
        *_help_blocks(PROGRAM, cli, None),
        "## Exit codes",
        _exit_codes(),
    ]
    return "\n\n".join(parts) + "\n"


def _help_blocks(name: str, command: click.Command, parent: click.Context | None) -> list[str]:
    """The help of a command, and of those below it."""
    context = click.Context(
        command,
        info_name=name,
        parent=parent,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        **command.context_settings,  # not applied by itself to a context that is made by hand
    )
    blocks = [f"## {context.command_path}\n\n```\n{command.get_help(context)}\n```"]
    if isinstance(command, click.Group):
        for inner in command.list_commands(context):
            found = command.get_command(context, inner)
            assert found is not None
            blocks += _help_blocks(inner, found, context)
    return blocks


def _exit_codes() -> str:
    rows = [f"| {int(code)} | `{code.name}` | {code.meaning} |" for code in ExitCode]
    return "\n".join(["| code | name | means |", "|---:|---|---|", *rows])


def benchmarks() -> str:
    """The page about measurements: the last run in each table of docs/benchmarks."""
    parts = [
        "# Benchmarks",
        "Written by `make docs`: the last run in each table of docs/benchmarks.",
    ]
    parts += [_last_run(table) for table in sorted(BENCHMARKS.glob("*.csv"))]
    return "\n\n".join(parts) + "\n"


def _last_run(table: Path) -> str:
    shown = last_run(table)
    columns = [column for column in shown[0] if column not in STAMP]
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(row[column] or "" for column in columns) for row in shown]
    date, commit = (shown[0][column] for column in STAMP)
    title = table.stem.replace("_", " ").capitalize()
    return "\n".join([f"## {title}", "", f"{date}, {commit}.", "", *(f"| {x} |" for x in lines)])


PAGES = {"cli.md": command_line, "benchmarks.md": benchmarks}


def main() -> int:
    """Write the pages that differ and name them."""
    REFERENCE.mkdir(exist_ok=True)
    for name, render in PAGES.items():
        path = REFERENCE / name
        text = render()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path.relative_to(DOCS.parent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
