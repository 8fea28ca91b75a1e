"""What the scales of keys and values that a checkpoint stores lose, beside those of every token.

    python benchmarks/kv_scales.py MODEL --calibration FILE --text FILE [--threads 1] [--no-rows]

The scales are found as `qserve quantize --kv-cache` finds them, for a float or quantized MODEL. The
same model judges with unrounded keys and values; rows go to docs/benchmarks/kv_scales.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from qserve.cli.row_table import append_rows, stamp
from qserve.kernels.activations import Activations, round_activations
from qserve.quant.cache_scales import find_scales, round_by
from qserve.quant.cached_decoder import CachedDecoder, Rounding
from qserve.quant.decoder import Decoder
from qserve.quant.evaluate import compare
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.compressed_schemes import Kind
from qserve.quant.options import KvCache
from qserve.quant.pipeline import CACHE_STRIDE
from qserve.quant.progress import ignore_progress
from qserve.quant.windows import read_text, spread_windows, tokenize, windows_of_text

TABLE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "kv_scales.csv"


def main() -> None:
    """Parse the command line, measure, print and append the rows."""
    parser = argparse.ArgumentParser(description="Compare scales of keys and values.")
    parser.add_argument("model", type=Path, help="the folder of a checkpoint")
    parser.add_argument("--calibration", type=Path, required=True, help="text to find scales on")
    parser.add_argument("--text", type=Path, required=True, help="text to judge them on")
    parser.add_argument("--samples", type=int, default=32, help="windows to quantize with")
    parser.add_argument("--windows", type=int, default=16, help="windows to judge on")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens of a window")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-rows", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkpoint = Checkpoint(args.model)
    windows = windows_of(checkpoint, args.text, args.windows, args.seq_len)
    found = windows_of(checkpoint, args.calibration, args.samples, args.seq_len)[::CACHE_STRIDE]
    cached = {name: CachedDecoder(checkpoint, way) for name, way in ways(checkpoint, found)}
    results = compare([Decoder(checkpoint), *cached.values()], windows, ignore_progress)
    rows = [
        stamp()
        | {
            "model": args.model.name,
            "format": name,
            "scales_from": f"{len(found)}x{args.seq_len}",
            "text": args.text.name,
            "windows": f"{result.num_windows}x{result.seq_len}",
            "perplexity": round(result.perplexity, 4),
            "kl": None if result.kl is None else round(result.kl, 6),
            "top1": None if result.top1 is None else round(result.top1, 4),
        }
        for name, result in zip(cached, results, strict=True)
    ]
    for row in rows:
        print(row)
    if not args.no_rows:
        append_rows(TABLE, rows)


def windows_of(checkpoint: Checkpoint, text: Path, count: int, seq_len: int) -> torch.Tensor:
    """Windows ``[S, seq_len]`` spread over a text."""
    return spread_windows(tokenize(checkpoint.folder, read_text(text)), count, seq_len)


def ways(checkpoint: Checkpoint, windows: torch.Tensor) -> list[tuple[str, Rounding]]:
    """Each format with the scales found on windows ``[S, T]``, then with those of every token."""
    kinds = (
        (KvCache.FLOAT8, Kind.FLOAT, Activations.FLOAT8_TOKEN),
        (KvCache.INT8, Kind.INT, Activations.INT8_TOKEN),
    )
    found = []
    for cache, kind, activations in kinds:
        scales = find_scales(Decoder(checkpoint), windows_of_text(windows), kind, ignore_progress)
        found.append((f"{cache.value}, stored scales", by_stored(scales, kind)))
        found.append((f"{cache.value}, a scale a token", by_token(activations)))
    return found


def by_stored(scales: Mapping[str, torch.Tensor], kind: Kind) -> Rounding:
    """Rounding by the scale of each head; what is too large becomes the largest number."""
    return lambda name, rows: round_by(rows, scales[name], kind)


def by_token(activations: Activations) -> Rounding:
    """Rounding as qserve's own cache does it: each token and head by its largest magnitude."""
    return lambda _, rows: round_activations(rows.flatten(0, -2), activations).view_as(rows)


if __name__ == "__main__":
    main()
