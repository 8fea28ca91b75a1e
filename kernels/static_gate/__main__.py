"""``python -m qserve.kernels.static_gate``: compiles the kernels and checks their promises.

Leaves with 0 when all are kept, with 1 when one is broken or a kernel does not compile.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from qserve.kernels.gpu_target import TARGETS, GpuTarget
from qserve.kernels.static_gate.catalogue import FAMILIES, production_kernels
from qserve.kernels.static_gate.compilation import inspect_kernel
from qserve.kernels.static_gate.fingerprint import fingerprint
from qserve.kernels.static_gate.report import Report, as_record, broken_promises
from qserve.kernels.static_gate.spec import KernelSpec
from qserve.kernels.static_gate.table import Row, line, page, page_path, read_page, row


def main(arguments: list[str] | None = None) -> int:
    """Runs the command with ``arguments`` (the process's own when None): its exit status."""
    options = _parser().parse_args(arguments)
    names = options.targets.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        print(f"unknown targets {unknown}: expected some of {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    if options.pages:
        return 1 if sum(_write_page(options.pages, family) for family in FAMILIES) else 0
    records: list[dict[str, Any]] = []
    for target in (TARGETS[name] for name in names):
        for spec in production_kernels(target):
            if options.kernels in spec.name and (spec.is_core or not options.core):
                records.append(_record(spec, target))
    num_failed = sum(bool(record["broken"]) for record in records)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))
    print(f"{len(records)} kernels, {num_failed} failed", file=sys.stderr)
    return 1 if num_failed else 0


def _record(spec: KernelSpec, target: GpuTarget) -> dict[str, Any]:
    report, broken = _judge(spec, target)
    known = as_record(report) if report else {"kernel": spec.name, "target": target.name}
    return known | {"broken": broken}


def _judge(spec: KernelSpec, target: GpuTarget) -> tuple[Report | None, list[str]]:
    """The report on ``spec``, None if it does not compile, and what it breaks; told on the way."""
    try:
        report = inspect_kernel(spec, target)
    except Exception as error:  # whatever the compiler raises: the other kernels still count
        message = f"does not compile: {type(error).__name__}: {error}"
        print(f"{target.name:7} {spec.name} FAIL: {message}", file=sys.stderr)
        return None, [message]
    broken = broken_promises(report, spec)
    print(line(report, broken), file=sys.stderr, flush=True)
    return report, broken


def _write_page(folder: Path, family: str) -> int:
    """Brings the page of ``family`` up to date: the number of kernels that fail, whose rows are
    left out. Only what has changed since the page was written is compiled."""
    path = page_path(folder, family)
    written = {(*cells[:3], cells[-1]): cells for cells in read_page(path)}
    rows: list[Row] = []
    num_failed = 0
    for target in TARGETS.values():
        for spec in FAMILIES[family](target):
            inputs = fingerprint(spec)
            known = written.get((spec.name, target.name, spec.tile, inputs))
            if known is None:
                report, broken = _judge(spec, target)
                num_failed += bool(broken)
                known = row(report, inputs) if report and not broken else None
            rows += [known] if known else []
    path.write_text(page(family, rows), encoding="utf-8")
    return num_failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qserve.kernels.static_gate",
        description="Compile the Triton kernels without a GPU and check their machine code.",
    )
    parser.add_argument("--targets", default=",".join(TARGETS), help="names, with commas between")
    parser.add_argument("--kernels", default="", metavar="TEXT", help="only names that hold TEXT")
    parser.add_argument("--core", action="store_true", help="only the few of every test run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every count to FILE")
    parser.add_argument(
        "--pages",
        type=Path,
        metavar="FOLDER",
        help="bring the pages in FOLDER up to date, compiling what has changed",
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
