"""The steps of `qserve demo`, one after the other, and the table at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from qserve.cli.console import print_table, progress, say
from qserve.cli.demo_model import NAME
from qserve.cli.demo_server import Answer, running_server
from qserve.quant.evaluate import Evaluation, evaluate
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.inspection import Inspection, inspect_checkpoint
from qserve.quant.options import QuantizeOptions
from qserve.quant.output import publish
from qserve.quant.pipeline import quantize
from qserve.quant.progress import Progress, ProgressCallback
from qserve.quant.quantities import format_bytes, format_seconds
from qserve.quant.source import resolve_model
from qserve.quant.windows import python_topics

PERCENT = 100
QUESTION = "What is the capital of France?"
# Enough to show the order of the loss in a minute; a judgement needs more (`qserve eval`).
NUM_WINDOWS = 8
WINDOW_TOKENS = 512
SPEED_PROMPT = "Tell me a story about a lighthouse keeper."
SPEED_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the demo found out."""

    before: Inspection
    after: Inspection
    quantize_s: float
    quality: Evaluation
    answer: Answer
    speed: Answer


def run_demo(model: Path, out: Path, cache: Path, port: int) -> Outcome:
    """Quantize the GGUF file ``model`` to ``out``, judge it, serve it and ask it.

    cache: where the float checkpoint is kept. port: of the server, 0 takes a free one.
    """
    source = resolve_model(str(model), cache=cache, notice=say)
    start = time.monotonic()
    with publish(out, force=True, protect=(source.folder,)) as folder, _shown("quantizing") as show:
        quantize(source, folder, QuantizeOptions(), show)
    quantize_s = time.monotonic() - start
    result = Checkpoint(out)
    with _shown("comparing with the float model") as show:
        quality = evaluate(result, source, python_topics(), NUM_WINDOWS, WINDOW_TOKENS, show)
    say("starting the server")
    with running_server(out, port) as server:
        answer = server.ask(QUESTION, max_tokens=32)
        server.ask(SPEED_PROMPT, max_tokens=8, ignore_eos=True)  # the first steps warm caches
        speed = server.ask(SPEED_PROMPT, max_tokens=SPEED_TOKENS, ignore_eos=True)
    before, after = inspect_checkpoint(source), inspect_checkpoint(result)
    return Outcome(before, after, quantize_s, quality, answer, speed)


@contextmanager
def _shown(title: str) -> Iterator[ProgressCallback]:
    """A progress display for what takes a callback of ``quant.progress``."""
    with progress(title, PERCENT) as advance:

        def show(step: Progress) -> None:
            share = PERCENT * step.done // step.total
            advance(share, f"{format_seconds(step.seconds_left)} left")

        yield show


def print_outcome(outcome: Outcome) -> None:
    """The table of what it cost, and the answer."""
    quality, before, after = outcome.quality, outcome.before, outcome.after
    quantized_bits = after.quantized_bits_per_weight
    rows = [
        ("weights", format_bytes(before.num_bytes), format_bytes(after.num_bytes)),
        (
            "bits per weight, all",
            f"{before.bits_per_parameter:.2f}",
            f"{after.bits_per_parameter:.2f}",
        ),
        (
            "bits per weight, quantized layers",
            f"{before.bits_per_parameter:.2f}",
            "-" if quantized_bits is None else f"{quantized_bits:.2f}",
        ),
        (
            f"perplexity ({NUM_WINDOWS} x {WINDOW_TOKENS} tokens of Python's help)",
            f"{quality.base_perplexity:.2f}",
            f"{quality.perplexity:.2f}",
        ),
        ("KL divergence from float", "0", f"{quality.kl:.3f} ± {quality.kl_standard_error:.3f}"),
        ("time to quantize", "-", format_seconds(outcome.quantize_s)),
        ("decode, one request", "-", f"{outcome.speed.tokens_per_s:.0f} tokens/s"),
    ]
    print_table(NAME, ("", "float", "4 bits"), rows)
    click.echo(f"Question: {QUESTION}")
    click.echo(f"Answer:   {outcome.answer.text.strip()}")
