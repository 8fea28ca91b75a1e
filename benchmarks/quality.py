"""Quantize a model in several ways and append what each costs in quality to docs/benchmarks.

    python benchmarks/quality.py [--model MODEL] [--calibration FILE] [--text FILE] [--way NAME]...
    python benchmarks/quality.py --judge "AutoAWQ 0.2.9=FOLDER" --text FILE

The default model is that of `qserve demo`, the default text the help that comes with Python. A
folder to judge is another tool's, made by ``quality_peers.py`` on the same tokens.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

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
WAYS: dict[str, dict[str, Any]] = {
    "rtn": {"method": Method.RTN},
    "hqq": {"method": Method.HQQ},
    "awq-plain": {"effort": Effort.PLAIN},
    "awq-fast": {"effort": Effort.FAST},
    "awq": {},
    "awq, 64 windows": {"num_samples": 64},
    "gptq": {"method": Method.GPTQ},
    "gptq-plain": {"method": Method.GPTQ, "effort": Effort.PLAIN},
    "gptq, act-order": {"method": Method.GPTQ, "activation_order": True},
    "gptq, 3 bits": {"method": Method.GPTQ, "bits": 3},
    "nf4": {"method": Method.NF4},
    "qoq": {"method": Method.QOQ},
    "int8": {"method": Method.INT8, "group_size": None},
    "smoothquant": {"method": Method.SMOOTHQUANT, "group_size": None},
}
"""Way -> what it asks for besides the group size, AWQ being the usual method."""

Row = dict[str, str | int | float | None]


def main() -> None:
    """Parse the command line, quantize, judge, print and append the rows."""
    parser = argparse.ArgumentParser(description="What quantization costs in quality.")
    parser.add_argument("--model", help="a float checkpoint; default: the model of qserve demo")
    parser.add_argument("--text", type=Path, help="default: the help that comes with Python")
    parser.add_argument("--calibration", type=Path, help="default: the text that comes with qserve")
    parser.add_argument("--way", action="append", choices=WAYS, help="default: all of them")
    parser.add_argument("--judge", action="append", metavar="NAME=FOLDER", help="only judge these")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=DEFAULT_NUM_WINDOWS)
    parser.add_argument("--seq-len", type=int, default=DEFAULT_SEQ_LEN)
    parser.add_argument("--keep", type=Path, help="leave the checkpoints in this folder")
    parser.add_argument("--no-rows", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cache = cache_folder(os.environ)
    model = args.model or str(find_model(cache))
    source = resolve_model(model, cache=cache, notice=say)
    with TemporaryDirectory(prefix="qserve-quality-") as folder:
        made = (
            judge_given(args) if args.judge else make_all(source, args.keep or Path(folder), args)
        )
        for out, described in made:
            row = {"model": Path(model).stem} | described | judge(source, out, args)
            print(row, flush=True)
            if not args.no_rows:
                append_rows(TABLE, [{**stamp(), **row}])


def judge_given(args: argparse.Namespace) -> Iterator[tuple[Path, Row]]:
    """Folders that another tool has written, under the names they are given."""
    for entry in args.judge:
        name, _, folder = entry.partition("=")
        yield Path(folder), {"way": name}


def make_all(
    source: Checkpoint, folder: Path, args: argparse.Namespace
) -> Iterator[tuple[Path, Row]]:
    """A checkpoint for each way, and the columns that say how it was made."""
    for way in args.way or WAYS:
        asked = {"group_size": args.group_size} | WAYS[way]
        calibration = args.calibration or CalibrationSource.BUILT_IN
        out = folder / way.replace(", ", "-").replace(" ", "-")
        report = quantize_to(source, out, QuantizeOptions(calibration=calibration, **asked))
        yield out, {"way": way} | describe(report)


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
