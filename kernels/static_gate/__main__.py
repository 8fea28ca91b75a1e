"""``python -m qserve.kernels.static_gate``: compiles the kernels and checks their promises.

Leaves with 0 when all are kept, with 1 when one is broken or a kernel does not compile.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from qserve.kernels.gpu_target import TARGETS
from qserve.kernels.static_gate.catalogue import FAMILIES, production_kernels
from qserve.kernels.static_gate.compilation import inspect_kernel
from qserve.kernels.static_gate.fingerprint import fingerprint
from qserve.kernels.static_gate.report import Report, as_record, broken_promises
from qserve.kernels.static_gate.table import line, page, page_path, read_page, row


def main(arguments: list[str] | None = None) -> int:
    """Runs the command with ``arguments`` (the process's own when None): its exit status."""
    options = _parser().parse_args(arguments)
    names = options.targets.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        print(f"unknown targets {unknown}: expected some of {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    with ProcessPoolExecutor(options.jobs) as pool:
        if options.pages:
            failures = [_write_page(options.pages, family, pool) for family in FAMILIES]
            return 1 if any(failures) else 0
        chosen = [
            (spec.name, name)
            for name in names
            for spec in production_kernels(TARGETS[name])
            if options.kernels in spec.name and (spec.is_core or not options.core)
        ]
        records = list(pool.map(_record, chosen))
    num_failed = sum(bool(record["broken"]) for record in records)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))
    print(f"{len(records)} kernels, {num_failed} failed", file=sys.stderr)
    return 1 if num_failed else 0


Named = tuple[str, str]
"""A kernel and a target: a process can be sent names, but no kernels."""


def _record(named: Named) -> dict[str, Any]:
    report, broken = _judge(named)
    known = as_record(report) if report else {"kernel": named[0], "target": named[1]}
    return known | {"broken": broken}


def _judge(named: Named) -> tuple[Report | None, list[str]]:
    """The report on a kernel, None if it does not compile, and what it breaks; told on the way."""
    name, target = named[0], TARGETS[named[1]]
    spec = next(spec for spec in production_kernels(target) if spec.name == name)
    try:
        report = inspect_kernel(spec, target)
    except Exception as error:  # whatever the compiler raises: the other kernels still count
        message = f"does not compile: {_innermost(error)!r}"
        print(f"{target.name:7} {spec.name} FAIL: {message}", file=sys.stderr)
        return None, [message]
    broken = broken_promises(report, spec)
    print(line(report, broken), file=sys.stderr, flush=True)
    return report, broken


def _innermost(error: BaseException) -> BaseException:
    """What raised first: Triton wraps an error once for each function it is inside of."""
    return error if error.__cause__ is None else _innermost(error.__cause__)


def _write_page(folder: Path, family: str, pool: Executor) -> int:
    """Brings the page of ``family`` up to date: the number of kernels that fail, whose rows are
    left out. Only what has changed since the page was written is compiled."""
    path = page_path(folder, family)
    written = {(*cells[:3], cells[-1]): cells for cells in read_page(path)}
    wanted = {
        (spec.name, name): (spec.name, name, spec.tile, fingerprint(spec))
        for name, target in TARGETS.items()
        for spec in FAMILIES[family](target)
    }
    rows = {named: written[facts] for named, facts in wanted.items() if facts in written}
    stale = [named for named in wanted if named not in rows]
    num_failed = 0
    for named, (report, broken) in zip(stale, pool.map(_judge, stale), strict=True):
        num_failed += bool(broken)
        if report and not broken:
            rows[named] = row(report, wanted[named][-1])
    path.write_text(page(family, [rows[n] for n in wanted if n in rows]), encoding="utf-8")
    return num_failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qserve.kernels.static_gate",
        description="Compile the Triton kernels without a GPU and check their machine code.",
    )
    parser.add_argument("--targets", default=",".join(TARGETS), help="names, with commas between")
    parser.add_argument("--kernels", default="", metavar="TEXT", help="only names that hold TEXT")
    parser.add_argument("--core", action="store_true", help="only the few of every test run")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="kernels at a time")
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
