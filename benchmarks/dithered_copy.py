"""Copy a model with noise on its weights, so that they lie on no 4-bit grid.

    python benchmarks/dithered_copy.py MODEL OUT

The model of ``qserve demo`` comes from a 4-bit file: a method whose groups happen to fit that grid
looks better on it than it is. To every weight of the blocks' linear layers this adds uniform noise,
one step of a 4-bit grid over 32 inputs wide. The copy is a worse model and a sound reference: what
is quantized from it is judged against itself.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import torch

from qserve.cli.cache import cache_folder
from qserve.cli.console import say
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.shard_writer import ShardWriter
from qserve.quant.model_files import copy_files, write_config
from qserve.quant.options import DEFAULT_SHARD_BYTES
from qserve.quant.output import publish
from qserve.quant.source import resolve_model

GROUP_SIZE = 32
STEPS = 15
"""Inputs that a scale covers, and steps between the least and the greatest of 4-bit codes."""
LINEAR = re.compile(r"\.layers\.\d+\..*_proj\.weight$")


def main() -> None:
    """Parse the command line and write the copy."""
    parser = argparse.ArgumentParser(description="A copy of a model off the 4-bit grid.")
    parser.add_argument("model", help="a float checkpoint: folder, .gguf file or hub id")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    source = resolve_model(args.model, cache=cache_folder(os.environ), notice=say)
    with publish(args.out, protect=(source.folder,)) as folder:
        write_dithered(source, folder, torch.Generator().manual_seed(args.seed))


def write_dithered(source: Checkpoint, folder: Path, generator: torch.Generator) -> None:
    """Write ``source`` in float32 to ``folder``, with noise from ``generator``."""
    with ShardWriter(folder, DEFAULT_SHARD_BYTES) as shards:
        for name in sorted(source):
            tensor = source.tensor(name).float()
            shards.add(name, dither(tensor, generator) if LINEAR.search(name) else tensor)
        shards.finish()
    write_config(folder, source.config, None, dtype="float32")
    copy_files(source.folder, folder)


def dither(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """``weight`` ``[out, in]`` with noise of one grid step of each group of inputs of a row."""
    groups = weight.unflatten(-1, (-1, GROUP_SIZE))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    noise = torch.rand(groups.shape, generator=generator) - 0.5
    dithered: torch.Tensor = groups + noise * (high - low) / STEPS
    return dithered.flatten(-2)


if __name__ == "__main__":
    main()
