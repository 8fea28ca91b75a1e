"""Quantize a model in several ways and append what each costs in quality to docs/benchmarks.

    python benchmarks/quality.py [--model MODEL] [--calibration FILE] [--text FILE]

The default model is that of `qserve demo`, the default text the help that comes with Python.
"""

from __future__ import annotations

import argparse
import os
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from qserve.cli.cache import cache_folder
from qserve.cli.console import say
from qserve.cli.demo_model import find_model
from qserve.cli.row_table import append_rows, stamp
from qserve.quant.evaluate import DEFAULT_NUM_WINDOWS, DEFAULT_SEQ_LEN, evaluate
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.options import CalibrationSource, Effort, Method, QuantizeOptions
from qserve.quant.output import publish
from qserve.quant.pipeline import quantize
from qserve.quant.progress import ignore_progress
from qserve.quant.report import QuantizationReport
from qserve.quant.source import resolve_model
from qserve.quant.windows import python_topics, read_text

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "benchmarks" / "quality.csv"
WAYS = (
    ("rtn", Method.RTN, Effort.FULL),
    ("awq-plain", Method.AWQ, Effort.PLAIN),
    ("awq-fast", Method.AWQ, Effort.FAST),
    ("awq", Method.AWQ, Effort.FULL),
)

Row = dict[str, str | int | float | None]


def main() -> None:
    """Parse the command line, quantize, judge, print and append the rows."""
    parser = argparse.ArgumentParser(description="What quantization costs in quality.")
    parser.add_argument("--model", help="a float checkpoint; default: the model of qserve demo")
    parser.add_argument("--text", type=Path, help="default: the help that comes with Python")
    parser.add_argument("--calibration", type=Path, help="default: the text that comes with qserve")
    parser.add_argument("--group-size", type=int, action="append", help="default: 64 and 32")
    parser.add_argument("--windows", type=int, default=DEFAULT_NUM_WINDOWS)
    parser.add_argument("--seq-len", type=int, default=DEFAULT_SEQ_LEN)
    parser.add_argument("--keep", type=Path, help="leave the checkpoints in this folder")
    parser.add_argument("--no-rows", action="store_true", help="print only")
    args = parser.parse_args()
    cache = cache_folder(os.environ)
    model = args.model or str(find_model(cache))
    source = resolve_model(model, cache=cache, notice=say)
    with TemporaryDirectory(prefix="qserve-quality-") as folder:
        rows = []
        for group_size, (name, method, effort) in product(args.group_size or (64, 32), WAYS):
            out = (args.keep or Path(folder)) / f"{name}-g{group_size}"
            options = QuantizeOptions(
                method=method,
                group_size=group_size,
                effort=effort,
                calibration=args.calibration or CalibrationSource.BUILT_IN,
            )
            report = quantize_to(source, out, options)
            described = {"model": Path(model).stem, "way": name} | describe(report)
            rows.append(described | judge(source, out, args))
            print(rows[-1], flush=True)
    if not args.no_rows:
        append_rows(TABLE, [{**stamp(), **row} for row in rows])


def quantize_to(source: Checkpoint, out: Path, options: QuantizeOptions) -> QuantizationReport:
    """Quantize ``source`` to the folder ``out``, whatever is there."""
    with publish(out, force=True, protect=(source.folder,)) as folder:
        return quantize(source, folder, options, ignore_progress)


def describe(report: QuantizationReport) -> Row:
    """The columns that say what was done."""
    windows = report.calibration
    return {
        "bits": report.bits,
        "group_size": report.group_size,
        "bits_per_weight": round(report.sizes.bits_per_weight, 3),
        "calibration": f"{windows.source} {windows.num_windows}x{windows.seq_len}"
        if windows
        else "none",
        "quantize_s": round(report.seconds, 1),
        "peak_mib": report.peak_memory_bytes // 2**20,
    }


def judge(source: Checkpoint, out: Path, args: argparse.Namespace) -> Row:
    """The columns that say what it cost."""
    text = read_text(args.text) if args.text else python_topics()
    found = evaluate(Checkpoint(out), source, text, args.windows, args.seq_len, ignore_progress)
    figures: Row = {
        "text": args.text.name if args.text else "python help",
        "windows": f"{found.num_windows}x{found.seq_len}",
    }
    for name in ("base_perplexity", "perplexity", "kl", "kl_standard_error", "top1"):
        value = getattr(found, name)
        figures[name] = None if value is None else round(value, 4)
    return figures


if __name__ == "__main__":
    main()
