"""`qserve eval`: how good a model is, and how far it is from the one it was made from."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qserve.cli.cache import cache_folder
from qserve.cli.console import print_table, progress, say
from qserve.cli.threads import threads_option, use_threads
from qserve.quant.quantities import format_seconds

if TYPE_CHECKING:
    from qserve.quant.evaluate import Evaluation
    from qserve.quant.progress import Progress

DEFAULT_TEXT = "Python's help topics"
PERCENT = 100


@click.command(short_help="Measure perplexity, and the distance to the float model.")
@click.argument("model")
@click.option("--against", metavar="BASE", help="Model to compare with, usually the float one.")
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help=f"UTF-8 file to judge on. Default: {DEFAULT_TEXT}, which every machine has.",
)
@click.option(
    "--windows", type=click.IntRange(1), default=48, show_default=True, help="Windows of text."
)
@click.option(
    "--seq-len", type=click.IntRange(2), default=512, show_default=True, help="Tokens of a window."
)
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def command(model: str, as_json: bool, **options: Any) -> None:
    """Measure the perplexity of MODEL, and with --against how far it is from BASE.

    MODEL and BASE are folders (float or quantized), .gguf files or hub ids. All arithmetic is in
    float32, so the figures tell about the checkpoint and not about an engine; activations, keys and
    values are rounded to 8 bits where the checkpoint was made for that.
    """
    evaluation = _evaluate(model, options)
    if as_json:
        click.echo(json.dumps(summarize(evaluation, model, options), indent=2))
    else:
        _print_table(evaluation, model, options)


def _evaluate(model: str, options: dict[str, Any]) -> Evaluation:
    # Imported here so that a wrong option or `--help` is answered before torch has loaded.

    from qserve.quant.evaluate import evaluate
    from qserve.quant.source import resolve_model
    from qserve.quant.windows import python_topics, read_text

    use_threads(options["threads"])
    text = read_text(options["text"]) if options["text"] else python_topics()
    cache = cache_folder(os.environ)
    judged = resolve_model(model, cache=cache, notice=say)
    against = options["against"]
    base = resolve_model(against, cache=cache, notice=say) if against else None
    with progress("evaluating", PERCENT) as advance:

        def show(step: Progress) -> None:
            share = PERCENT * step.done // step.total
            advance(share, f"{format_seconds(step.seconds_left)} left")

        evaluation = evaluate(judged, base, text, options["windows"], options["seq_len"], show)
    if evaluation.num_windows < options["windows"]:
        say(f"the text is short: {evaluation.num_windows} windows, {options['windows']} asked for")
    return evaluation


def summarize(evaluation: Evaluation, model: str, options: dict[str, Any]) -> dict[str, Any]:
    """What `--json` prints. A standard error that one window cannot give is null."""
    figures = {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in asdict(evaluation).items()
    }
    text = DEFAULT_TEXT if options["text"] is None else str(options["text"])
    return {"model": model, "against": options["against"], "text": text} | figures


def _print_table(evaluation: Evaluation, model: str, options: dict[str, Any]) -> None:
    rows = [
        ("model", model),
        ("text", options["text"] or DEFAULT_TEXT),
        ("windows", f"{evaluation.num_windows} of {evaluation.seq_len} tokens"),
        ("perplexity", f"{evaluation.perplexity:.3f}"),
    ]
    if evaluation.base_perplexity is not None:
        rows.insert(1, ("against", options["against"]))
        rows.append(("perplexity of the base", f"{evaluation.base_perplexity:.3f}"))
    if evaluation.kl is not None and evaluation.kl_standard_error is not None:
        rows.append(("KL from the base, nats", _with(evaluation.kl, evaluation.kl_standard_error)))
    if evaluation.top1 is not None and evaluation.top1_standard_error is not None:
        agreement = _with(PERCENT * evaluation.top1, PERCENT * evaluation.top1_standard_error, 2)
        rows.append(("same most likely token, %", agreement))
    if evaluation.activations is not None:
        rows.append(("activations rounded to", evaluation.activations))
    if evaluation.kv_cache is not None:
        rows.append(("keys and values rounded to", evaluation.kv_cache))
    rows.append(("time", format_seconds(evaluation.seconds)))
    print_table("evaluation", ("", ""), rows)


def _with(value: float, standard_error: float, digits: int = 4) -> str:
    if math.isnan(standard_error):
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f} ± {standard_error:.{digits}f}"
