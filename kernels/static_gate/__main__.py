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
from qserve.kernels.static_gate.catalogue import production_kernels
from qserve.kernels.static_gate.compilation import inspect_kernel
from qserve.kernels.static_gate.report import Report, as_record, broken_promises
from qserve.kernels.static_gate.spec import KernelSpec
from qserve.kernels.static_gate.table import line, markdown, replace_table


def main(arguments: list[str] | None = None) -> int:
    """Runs the command with ``arguments`` (the process's own when None): its exit status."""
    options = _parser().parse_args(arguments)
    names = options.targets.split(",")
    if unknown := [name for name in names if name not in TARGETS]:
        print(f"unknown targets {unknown}: expected some of {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    reports: list[Report] = []
    records: list[dict[str, Any]] = []
    for target in (TARGETS[name] for name in names):
        for spec in production_kernels(target):
            if options.kernels in spec.name and (spec.is_core or not options.core):
                records.append(_judge(spec, target, reports))
    num_failed = sum(bool(record["broken"]) for record in records)
    if options.json:
        options.json.write_text(json.dumps(records, indent=1))
    if options.markdown:
        print(markdown(reports))
    if options.page:
        page = options.page.read_text(encoding="utf-8")
        options.page.write_text(replace_table(page, markdown(reports)), encoding="utf-8")
    print(f"{len(records)} kernels, {num_failed} failed", file=sys.stderr)
    return 1 if num_failed else 0


def _judge(spec: KernelSpec, target: GpuTarget, reports: list[Report]) -> dict[str, Any]:
    try:
        report = inspect_kernel(spec, target)
    except Exception as error:  # whatever the compiler raises: the other kernels still count
        message = f"does not compile: {type(error).__name__}: {error}"
        print(f"{target.name:7} {spec.name} FAIL: {message}", file=sys.stderr)
        return {"kernel": spec.name, "target": target.name, "broken": [message]}
    broken = broken_promises(report, spec)
    reports.append(report)
    print(line(report, broken), file=sys.stderr, flush=True)
    return as_record(report) | {"broken": broken}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qserve.kernels.static_gate",
        description="Compile the Triton kernels without a GPU and check their machine code.",
    )
    parser.add_argument("--targets", default=",".join(TARGETS), help="names, with commas between")
    parser.add_argument("--kernels", default="", metavar="TEXT", help="only names that hold TEXT")
    parser.add_argument("--core", action="store_true", help="only the few of every test run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every count to FILE")
    parser.add_argument("--markdown", action="store_true", help="print a table to stdout")
    parser.add_argument("--page", type=Path, metavar="FILE", help="replace the table in FILE")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
