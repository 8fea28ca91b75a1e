"""The verdict of `qserve inspect --check`, `--repair` and `--for` on a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qserve.cli.cache import cache_folder
from qserve.cli.console import print_table, say
from qserve.cli.errors import CommandError, ExitCode

if TYPE_CHECKING:
    from qserve.quant.engine_rules import Verdict
    from qserve.quant.findings import Finding
    from qserve.quant.formats.checkpoint import Checkpoint


def judge(model: str, engines: str | None, mended: Path | None, as_json: bool) -> None:
    """Check a model, say whether engines load it, and write a mended copy where asked.

    engines: names with commas between them. Raises ``CommandError`` with the code for models when
    there are errors that no copy mends, or an engine that refuses it.
    """
    # Imported here so that a wrong option or `--help` is answered before torch has loaded.
    from qserve.quant.checking import check_checkpoint
    from qserve.quant.engine_rules import judge_for
    from qserve.quant.source import is_gguf, resolve_model

    if is_gguf(model):
        raise click.UsageError("--check, --repair and --for take a folder or a hub id, not GGUF")
    source = resolve_model(model, cache=cache_folder(os.environ), notice=say)
    checkpoint, findings = check_checkpoint(source.folder)
    verdicts = [] if engines is None else judge_for(checkpoint, engines.split(","))
    if as_json:
        _print_json(findings, verdicts)
    else:
        _print_findings(findings)
        _print_verdicts(verdicts)
    if mended is not None:
        if any(finding.remedy for finding in findings):
            _repair(checkpoint, findings, mended)
            return
        say("nothing can be mended: no copy is written")
    num_errors = sum(finding.severity.value == "error" for finding in findings)
    refused = [verdict.engine for verdict in verdicts if verdict.refusals]
    if num_errors:
        raise CommandError(f"{source.folder} has {num_errors} errors: see above", ExitCode.MODEL)
    if refused:
        raise CommandError(f"{', '.join(refused)} will not load {source.folder}", ExitCode.MODEL)


def _repair(checkpoint: Checkpoint, findings: Sequence[Finding], out: Path) -> None:
    from qserve.quant.output import publish
    from qserve.quant.repair import repair

    with publish(out, protect=[checkpoint.folder]) as folder:
        left = repair(checkpoint, findings, folder)
    say(f"the mended copy is in {out}" + (f"; {len(left)} warnings stay" if left else ""))


def _print_findings(findings: Sequence[Finding]) -> None:
    if not findings:
        click.echo("in order: every tensor was read and nothing is wrong")
        return
    rows = [
        (
            finding.severity.value,
            finding.where,
            finding.problem,
            finding.remedy.summary if finding.remedy else "-",
        )
        for finding in findings
    ]
    print_table("findings", ("", "where", "what", "--repair would"), rows)


def _print_verdicts(verdicts: Sequence[Verdict]) -> None:
    rows = [
        (
            f"{verdict.engine} {verdict.version}",
            "no" if verdict.refusals else "yes",
            "; ".join([*verdict.refusals, *verdict.notes]) or "-",
        )
        for verdict in verdicts
    ]
    if rows:
        print_table("will it load", ("engine", "loads", "why, and what to know"), rows)


def _print_json(findings: Sequence[Finding], verdicts: Sequence[Verdict]) -> None:
    found = {
        "findings": [
            {
                "severity": finding.severity.value,
                "where": finding.where,
                "problem": finding.problem,
                "remedy": finding.remedy.summary if finding.remedy else None,
            }
            for finding in findings
        ],
        "engines": [
            {
                "engine": verdict.engine,
                "version": verdict.version,
                "loads": not verdict.refusals,
                "refusals": verdict.refusals,
                "notes": verdict.notes,
            }
            for verdict in verdicts
        ],
    }
    click.echo(json.dumps(found, indent=2))
