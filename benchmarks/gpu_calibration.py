"""Test the kernels on the GPU of this machine, time them, try other tiles: what `make gpu` runs.

    python benchmarks/gpu_calibration.py [--op int4_matmul] [--tiles] [--skip-tests]

Launch rules choose a tile from a table that was made without a GPU. With --tiles, each product is
timed with other tiles as well, and a row says which was fastest. Rows go to
docs/benchmarks/gpu-NAME.csv with what the GPU was measured to copy and multiply beside them.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from qserve.cli.console import print_table, say
from qserve.cli.row_table import append_rows, stamp
from qserve.kernels.benchmark import Measurement, find_cases, measure_case
from qserve.kernels.benchmark.case import Case
from qserve.kernels.machine_bounds import measure_bounds

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "docs" / "benchmarks"
TILED = "qserve.kernels.tiled_matmul.launch"  # where the matmuls that work in tiles plan a launch
PLAN = "plan_launch"
RULE = "rule"  # in place of a tile: the one that the launch rule takes
ROWS, OUTPUTS, WARPS, STAGES = (16, 32, 64), (32, 64, 128), (2, 4, 8), (2, 3, 4)

Measure = Callable[[Case], Measurement]
Row = dict[str, Any]


def main() -> int:
    """Parse the command line, test, time, append; 1 when a test failed."""
    parser = argparse.ArgumentParser(description="Test and time the GPU kernels.")
    parser.add_argument("--op", action="append", default=[], help="only this op; may be repeated")
    parser.add_argument("--shape", default="", help="only shapes that contain this")
    parser.add_argument("--tiles", action="store_true", help="also try other tiles (an hour)")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each case")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch finds no GPU here: see `qserve doctor`")
    if not args.skip_tests and run_tests():
        say("the tests failed: timings of wrong results mean nothing (--skip-tests takes them)")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    bounds = measure_bounds(device)

    def measure(case: Case) -> Measurement:
        return measure_case(case, device, bounds, args.seconds)

    rows = []
    for case in find_cases(device, args.op, args.shape):
        say(f"{case.op} {case.shape}")
        rows += time_case(case, measure, with_tiles=args.tiles)
    table = BENCHMARKS / f"gpu-{file_name(torch.cuda.get_device_name(device))}.csv"
    append_rows(table, [{**stamp(), **row, **asdict(bounds)} for row in rows])
    columns = ("op", "shape", "tile", "p50_us", "share")
    print_table(table.stem, columns, [[row[name] for name in columns] for row in rows])
    return 0


def run_tests() -> int:
    """The exit status of the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/kernels"]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def file_name(device: str) -> str:
    """The name of a GPU in small letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def time_case(case: Case, measure: Measure, *, with_tiles: bool) -> list[Row]:
    """A row for what the launch rule takes; and, with tiles, one for the fastest other tile if that
    is faster."""
    found = {RULE: measure(case)}
    module = launch_module(case.op)
    if with_tiles and module is not None:
        for tile in tiles_for(rows_of(case.shape)):
            with forced_tile(module, tile):
                try:
                    found[str(tile)] = measure(case)
                except Exception as error:  # a tile may be more than the GPU has room for
                    say(f"  {tile}: {type(error).__name__}")
    best = min(found, key=lambda tile: found[tile].p50_us)
    return [{"tile": tile, **asdict(found[tile])} for tile in dict.fromkeys((RULE, best))]


def launch_module(op: str) -> ModuleType | None:
    """The launch rule of an op that works in tiles, None of another."""
    name = f"qserve.kernels.{op}.launch"
    if find_spec(TILED) is None or find_spec(name) is None:
        return None
    module = import_module(name)
    return module if hasattr(module, PLAN) else None


def rows_of(shape: str) -> int:
    """The number of rows that a shape in words ends with, 1 if it says none."""
    found = re.search(r"(\d+) rows$", shape)
    return int(found[1]) if found else 1


def tiles_for(num_rows: int) -> Iterator[Any]:
    """Tiles to try: as few rows as hold ``num_rows``, with every number of outputs, warps and
    pipeline stages."""
    tile = import_module(TILED).Tile
    fitting = next((rows for rows in ROWS if rows >= num_rows), ROWS[-1])
    for outputs, warps, stages in product(OUTPUTS, WARPS, STAGES):
        yield tile(fitting, outputs, warps, stages)


@contextmanager
def forced_tile(module: ModuleType, tile: Any) -> Iterator[None]:
    """Within the block, the launch rule in ``module`` plans with ``tile``."""
    plan = getattr(module, PLAN)
    setattr(module, PLAN, lambda problem, form, _, target: plan(problem, form, tile, target))
    try:
        yield
    finally:
        setattr(module, PLAN, plan)


if __name__ == "__main__":
    sys.exit(main())
