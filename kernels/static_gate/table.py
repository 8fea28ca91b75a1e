"""Reports as text: a line for a terminal, a page with a table, and that table read back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
    "inputs",
)

Row = tuple[str, ...]

_EXPLANATION = "static-gate.md"


def row(report: Report, inputs: str) -> Row:
    """The cells of ``report``, as ``COLUMNS`` names them. inputs: the fingerprint of its spec."""
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
        inputs,
    )


def line(report: Report, broken: Sequence[str]) -> str:
    """``report`` for a terminal, with what it breaks."""
    verdict = "FAIL: " + "; ".join(broken) if broken else "ok"
    kernel, target, tile, registers, _, warps, tensor_core, wide, issue, _ = row(report, "")
    return (
        f"{target:7} {kernel:58} {tile:38} {registers:>4} regs {warps:>3} warps "
        f"{tensor_core:14} wide {wide} issue {issue:4} {verdict}"
    )


def page_path(folder: Path, family: str) -> Path:
    """Where the page of a family of kernels is."""
    return folder / f"static-gate-{family}.md"


def page(family: str, rows: Sequence[Row]) -> str:
    """The page of a family of kernels."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return (
        f"# Machine code of the {family} kernels\n\n"
        "Written by `python -m qserve.kernels.static_gate --pages docs/reference`; the columns are "
        f"explained in [the static gate](../{_EXPLANATION}).\n\n{table}\n"
    )


def read_page(path: Path) -> list[Row]:
    """The rows of the table on the page at ``path``; empty where there is none."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [tuple(line.removeprefix("| ").removesuffix(" |").split(" | ")) for line in lines[2:]]
