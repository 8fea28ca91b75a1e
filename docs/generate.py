"""Write the pages and charts that come from the code and from tables: what `make docs` calls."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from qserve.cli.engine_comparison import engine_chart, engine_table
from qserve.cli.errors import ExitCode
from qserve.cli.main import PROGRAM, cli
from qserve.cli.row_table import STAMP, last_run, replace_text

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
README = ROOT / "README.md"
BENCHMARKS = DOCS / "benchmarks"
ENGINES = BENCHMARKS / "engines.csv"
CHART = BENCHMARKS / "engines.svg"
MARK_BEGIN, MARK_END = "<!-- engines: written by make docs -->", "<!-- engines end -->"
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
    for table in sorted(BENCHMARKS.glob("*.csv")):
        rows = last_run(table)
        shown = _engines(rows) if table == ENGINES else _rows(rows)
        date, commit = (rows[0][column] for column in STAMP)
        title = table.stem.replace("_", " ").capitalize()
        parts += [f"## {title}", f"{date}, {commit}.", shown]
    return "\n\n".join(parts) + "\n"


def _engines(rows: list[dict[str, str]]) -> str:
    first = rows[0]
    measured = f"{first['model']} on {first['threads']} threads of {first['cpu']}; in brackets, "
    measured += "how many times better qserve is."
    chart = f"![the rates as bars](../benchmarks/{CHART.name})"
    return "\n\n".join([measured, engine_table(rows), chart])


def _rows(rows: list[dict[str, str]]) -> str:
    columns = [column for column in rows[0] if column not in STAMP]
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(row[column] or "" for column in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def chart() -> str:
    """The comparison of engines as an SVG."""
    return engine_chart(last_run(ENGINES))


def readme() -> str:
    """The README with the comparison of engines between its two marks."""
    text = README.read_text(encoding="utf-8")
    before, begin, rest = text.partition(MARK_BEGIN)
    _, end, after = rest.partition(MARK_END)
    if not (begin and end):
        raise ValueError(f"README.md must have {MARK_BEGIN} and {MARK_END}, in this order")
    return f"{before}{begin}\n\n{engine_table(last_run(ENGINES))}\n\n{end}{after}"


PAGES = {
    DOCS / "reference" / "cli.md": command_line,
    DOCS / "reference" / "benchmarks.md": benchmarks,
    CHART: chart,
    README: readme,
}


def main() -> int:
    """Write what differs and name it."""
    for path, render in PAGES.items():
        text = render()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            replace_text(path, text)
            print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
