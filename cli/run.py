"""`qserve run`: a recipe from the float model to the published checkpoint, or to a failed gate."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qserve.cli.cache import cache_folder
from qserve.cli.console import print_table, progress, say
from qserve.cli.errors import CommandError, ExitCode
from qserve.cli.phase_display import describe_step
from qserve.cli.resumption import telling_what_is_kept
from qserve.cli.termination import terminated_like_interrupted
from qserve.cli.threads import threads_option, use_threads

if TYPE_CHECKING:
    from qserve.quant.recipe.report import RecipeReport
    from qserve.quant.recipe.running import Job

SUMMARY_VARIABLE = "GITHUB_STEP_SUMMARY"
PERCENT = 100


@click.command(short_help="Run a recipe: quantize, judge, gate, check, publish.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--model", help="Take this model instead of the recipe's.")
@click.option("-o", "--output", help="Write to this folder instead of the recipe's.")
@click.option("--force", is_flag=True, help="Replace a model folder that is already there.")
@click.option("--restart", is_flag=True, help="Begin anew instead of going on with a stopped run.")
@threads_option
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def command(
    recipe: Path,
    model: str | None,
    output: str | None,
    force: bool,
    restart: bool,
    threads: int | None,
    as_json: bool,
) -> int:
    """Run RECIPE, a YAML file (`qserve recipe init` writes one).

    The exit code is 0 for a published result and 7 for a failed gate or check; reports are
    written for both.
    """
    from qserve.quant.errors import QuantError
    from qserve.quant.recipe.junit import render_junit_error

    job = _read_job(recipe, model, output, force)
    try:
        with terminated_like_interrupted():
            report = _run(job, threads, restart)
    except QuantError as error:
        _write(job, job.recipe.reports.junit, render_junit_error(job.name, str(error)))
        raise
    _write_reports(job, report)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        _print(report)
    return ExitCode.OK if report.published else ExitCode.GATE


def _read_job(recipe: Path, model: str | None, output: str | None, force: bool) -> Job:
    from qserve.quant.recipe.loading import load_recipe
    from qserve.quant.recipe.running import Job

    loaded = load_recipe(recipe)
    changes: dict[str, Any] = {}
    if model is not None:
        changes["model"] = os.path.abspath(model) if os.path.exists(model) else model
    if output is not None or force:
        folder = loaded.output.folder if output is None else os.path.abspath(output)
        overwrite = force or loaded.output.overwrite
        changes["output"] = loaded.output.model_copy(
            update={"folder": folder, "overwrite": overwrite}
        )
    return Job(loaded.model_copy(update=changes), recipe.stem, recipe.absolute().parent)


def _run(job: Job, threads: int | None, restart: bool) -> RecipeReport:
    from qserve.quant.output import check_output
    from qserve.quant.recipe.running import run_job
    from qserve.quant.run_state import run_key
    from qserve.quant.source import resolve_model

    use_threads(threads)
    check_output(job.output, job.recipe.output.overwrite)
    _check_reports(job)
    source = resolve_model(job.model, cache=cache_folder(os.environ), notice=say)
    key = run_key(source, job.options())
    with (
        telling_what_is_kept(job.output, key, restart),
        progress(job.name, PERCENT) as advance,
    ):
        return run_job(
            job,
            source,
            lambda step: advance(
                PERCENT * step.done // step.total,
                f"{step.phase.value}, {describe_step(step)}",
            ),
            restart,
        )


def _check_reports(job: Job) -> None:
    """Refuse places where no report can be written, before hours go into what it would say."""
    reports = job.recipe.reports
    for name in (reports.json_file, reports.markdown, reports.html, reports.junit):
        if name is None:
            continue
        path = job.folder / name
        parent = next(folder for folder in path.parents if folder.exists())
        if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
            raise CommandError(
                f"the report {path} cannot be written: expected a file in a folder that takes one",
                ExitCode.OUTPUT,
            )


def _write_reports(job: Job, report: RecipeReport) -> None:
    from qserve.quant.recipe.junit import render_junit
    from qserve.quant.recipe.markdown import render_markdown
    from qserve.quant.recipe.page import render_page

    reports, markdown = job.recipe.reports, render_markdown(report)
    _write(job, reports.json_file, json.dumps(report.to_dict(), indent=2) + "\n")
    _write(job, reports.markdown, markdown)
    _write(job, reports.html, render_page(report))
    _write(job, reports.junit, render_junit(report))
    summary = os.environ.get(SUMMARY_VARIABLE)
    if summary:
        with open(summary, "a", encoding="utf-8") as file:
            file.write(markdown)


def _write(job: Job, name: str | None, text: str) -> None:
    if name is not None:
        path = job.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def _print(report: RecipeReport) -> None:
    from qserve.quant.recipe.report import headline

    rows = headline(report)
    for gate in report.gates:
        rows.append((f"gate {gate.name}", f"{gate.says}, {gate.asked}: {_verdict(gate.passed)}"))
    for check in report.checks:
        rows.append((f"check {check.name}", f"{check.says}: {_verdict(check.passed)}"))
    verdict = report.output if report.published else report.verdict
    print_table(report.recipe, ("", ""), [*rows, ("result", verdict)])


def _verdict(passed: bool) -> str:
    return "passed" if passed else "FAILED"
