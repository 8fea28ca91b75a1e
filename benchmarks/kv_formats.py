"""What each format of the KV cache costs in quality and brings in speed, on one model.

    python benchmarks/kv_formats.py MODEL [--text FILE] [--threads 1] [--no-rows]

Rates go to docs/benchmarks/kv_formats.csv, and with a text what the engine makes of it with each
format, against float16, to docs/benchmarks/kv_quality.csv.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qserve.cli.row_table import append_rows, stamp
from qserve.kernels import native
from qserve.kernels.kv_cache import KvFormat
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.windows import read_text, spread_windows, tokenize
from qserve.serve.config import EngineConfig
from qserve.serve.engine import Engine
from qserve.serve.messages import AddRequest, SamplingParams
from qserve.serve.model_runner import ModelRunner
from qserve.serve.scheduler import Chunk
from qserve.serve.sequence import Sequence

TABLES = Path(__file__).resolve().parent.parent / "docs" / "benchmarks"
FORMATS = (KvFormat.FLOAT16, KvFormat.FLOAT8, KvFormat.INT8, KvFormat.INT4)  # the first is the base
CONTEXT = 1024
BATCH_SIZES = (1, 8)
NUM_STEPS = 64
SEQ_LEN = 512


def main() -> None:
    """Parse the command line, measure, print and append the rows."""
    parser = argparse.ArgumentParser(description="Compare the formats of the KV cache.")
    parser.add_argument("model", type=Path, help="the folder of a checkpoint")
    parser.add_argument("--text", type=Path, help="judge the formats on it as well")
    parser.add_argument("--windows", type=int, default=16, help=f"of {SEQ_LEN} tokens of the text")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--no-rows", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the native kernels have threads of their own
    common = stamp() | {"model": args.model.name}
    tables = {"kv_formats.csv": list(measure_rates(args.model, args.threads))}
    if args.text:
        tables["kv_quality.csv"] = judge(args.model, args.text, args.windows)
    for name, rows in tables.items():
        for row in rows:
            print(row)
        if not args.no_rows:
            append_rows(TABLES / name, [common | row for row in rows])


def measure_rates(folder: Path, num_threads: int | None) -> Iterator[dict[str, object]]:
    """Rates of decode steps after ``CONTEXT`` tokens, the formats in turn, step by step.

    tok_s: of the median step. ratio: to the base, of the fastest tenth of the steps, which other
    work on the machine disturbs least.
    """
    limits = EngineConfig(
        max_model_len=CONTEXT + NUM_STEPS + 2,
        max_num_seqs=max(BATCH_SIZES),
        max_num_batched_tokens=max(BATCH_SIZES) * CONTEXT,  # all prompts in one step
        num_threads=num_threads,
    )
    engines = [Engine.from_checkpoint(folder, with_format(limits, format)) for format in FORMATS]
    for size in BATCH_SIZES:
        for engine in engines:
            begin(engine, size)
        seconds = np.array([[time_step(engine) for engine in engines] for _ in range(NUM_STEPS)])
        for engine in engines:
            engine.step()  # the last token of every request
        fast = np.quantile(seconds, 0.1, axis=0).tolist()
        for index, format in enumerate(FORMATS):
            yield {
                "isa": native.isa(),
                "threads": native.num_threads(),
                "format": format.value,
                "context": CONTEXT,
                "batch": size,
                "tok_s": round(size / float(np.median(seconds[:, index])), 1),
                "fast_tok_s": round(size / fast[index], 1),
                "ratio": round(fast[0] / fast[index], 3),
                "steps": NUM_STEPS,
            }


def begin(engine: Engine, size: int) -> None:
    """Compute the prompts of ``size`` requests that last ``NUM_STEPS`` steps and two tokens."""
    params = SamplingParams(max_tokens=NUM_STEPS + 2, temperature=0.0, ignore_eos=True)
    for index in range(size):
        prompt = tuple((7919 * i + index) % engine.vocab_size for i in range(CONTEXT))
        engine.add(AddRequest(str(index), prompt, params, 0.0))
    engine.step()


def time_step(engine: Engine) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start


def with_format(config: EngineConfig, format: KvFormat) -> EngineConfig:
    """``config`` with another cache."""
    fields = {name: getattr(config, name) for name in EngineConfig.__dataclass_fields__}
    return EngineConfig(**fields | {"kv_format": format})


def judge(folder: Path, text: Path, num_windows: int) -> list[dict[str, object]]:
    """Perplexity of each format, and its divergence from the base, over all positions of windows.

    Every token is a decode step: what it sees was stored, and read back, in the format.
    """
    windows = spread_windows(tokenize(folder, read_text(text)), num_windows, SEQ_LEN).numpy()
    limits = EngineConfig(max_model_len=SEQ_LEN, max_num_seqs=len(windows))
    checkpoint = Checkpoint(folder)
    runs = [
        step_through(ModelRunner(checkpoint, with_format(limits, format)), windows)
        for format in FORMATS
    ]
    sums = np.zeros((len(FORMATS), 3))
    for position, step in enumerate(zip(*runs, strict=True)):
        base = step[0]
        for index, found in enumerate(step):
            truth = found[range(len(windows)), windows[:, position + 1]]
            kl = (np.exp(base) * (base - found)).sum(axis=1)
            same = found.argmax(axis=1) == base.argmax(axis=1)
            sums[index] += (-truth.sum(), kl.sum(), same.sum())
    means = sums / (len(windows) * (SEQ_LEN - 1))
    return [
        {
            "format": format.value,
            "text": text.name,
            "windows": f"{len(windows)}x{SEQ_LEN}",
            "perplexity": round(float(np.exp(loss)), 4),
            "kl": round(float(kl), 6),
            "top1": round(float(same), 4),
        }
        for format, (loss, kl, same) in zip(FORMATS, means, strict=True)
    ]


def step_through(runner: ModelRunner, windows: NDArray[np.int64]) -> Iterator[NDArray[np.float64]]:
    """Log probabilities ``[windows, vocabulary]`` after each token but the last."""
    blocks = -(-SEQ_LEN // runner.plan.block_size)
    sequences = []
    for index in range(len(windows)):
        sequence = Sequence(str(index), (), SamplingParams(max_tokens=1))
        sequence.block_table.extend(range(index * blocks, (index + 1) * blocks))
        sequences.append(sequence)
    for position in range(SEQ_LEN - 1):
        for sequence, window in zip(sequences, windows, strict=True):
            sequence.token_ids.append(int(window[position]))
        chunks = [Chunk(sequence, position, position + 1) for sequence in sequences]
        logits = runner.run(chunks).astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        yield logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


if __name__ == "__main__":
    main()
