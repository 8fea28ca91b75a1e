"""Run `qserve bench kernels` and append its rows to docs/benchmarks.

python benchmarks/kernel_rates.py [--isa avx2] [-- OPTIONS OF qserve bench kernels]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from qserve.cli.row_table import append_rows, stamp
from qserve.kernels import native

TABLE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "kernels.csv"


def main() -> None:
    """Parse the command line, measure in a process for each instruction set, append."""
    parser = argparse.ArgumentParser(description="Measure the kernels one by one.")
    parser.add_argument("--isa", action="append", help="may be repeated; default: the best")
    parser.add_argument("options", nargs="*", help="for `qserve bench kernels`")
    args = parser.parse_args()
    found = []
    for isa in args.isa or [native.isa()]:
        found += measure([*args.options, "--isa", isa])
    append_rows(TABLE, [stamp() | row for row in found])


def measure(options: list[str]) -> list[dict[str, object]]:
    """The rows of one run, each with the machine and its bounds."""
    command = [sys.executable, "-m", "qserve.cli.main", "bench", "kernels", "--json", *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    return [found["machine"] | row | found["bounds"] for row in found["rows"]]


if __name__ == "__main__":
    main()
