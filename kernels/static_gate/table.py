"""Reports as text: a line for a terminal, a table for a page, and that table read back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from qserve.kernels.static_gate.report import Report

COLUMNS = (
    "kernel",
    "target",
    "tile",
    "registers",
    "shared KiB",
    "warps/core",
    "tensor cores",
    "wide",
    "issue",
)

Row = tuple[str, ...]


def row(report: Report) -> Row:
    """The cells of ``report``, as ``COLUMNS`` names them."""
    loop = report.loop
    tensor_core = " ".join(f"{number} {opcode}" for opcode, number in loop.tensor_core.items())
    return (
        report.kernel,
        report.target,
        report.tile,
        str(report.registers),
        f"{report.shared_bytes / 1024:.1f}",
        "-" if report.resident_warps is None else str(report.resident_warps),
        tensor_core or "-",
        f"{loop.wide_share:.2f}",
        "-" if report.issue_share is None else f"{report.issue_share:.2f}",
    )


def line(report: Report, broken: Sequence[str]) -> str:
    """``report`` for a terminal, with what it breaks."""
    verdict = "FAIL: " + "; ".join(broken) if broken else "ok"
    kernel, target, tile, registers, _, warps, tensor_core, wide, issue = row(report)
    return (
        f"{target:7} {kernel:58} {tile:38} {registers:>4} regs {warps:>3} warps "
        f"{tensor_core:14} wide {wide} issue {issue:4} {verdict}"
    )


def markdown(reports: Sequence[Report]) -> str:
    """A table with a row for each report."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *(row(report) for report in reports)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def read_markdown(text: str) -> list[Row]:
    """The rows of the table in ``text`` that has our columns; empty if there is none."""
    return [
        tuple(found.removeprefix("| ").removesuffix(" |").split(" | "))
        for found in _table_lines(text)[2:]
    ]


def replace_table(text: str, table: str) -> str:
    """``text`` with ``table`` in the place of the table in it that has our columns.

    Raises ``ValueError`` when there is none.
    """
    old = "\n".join(_table_lines(text))
    if not old:
        raise ValueError(f"no table with the columns {', '.join(COLUMNS)}: put an empty one there")
    return text.replace(old, table)


def _table_lines(text: str) -> list[str]:
    lines = text.splitlines()
    header = f"| {' | '.join(COLUMNS)} |"
    if header not in lines:
        return []
    return list(takewhile(lambda found: found.startswith("|"), lines[lines.index(header) :]))
