"""`qserve quantize --smoke`: one block through everything, in seconds."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from qserve.cli.cache import cache_folder
from qserve.cli.console import print_table, say
from qserve.cli.quantize_options import read_options
from qserve.cli.threads import use_threads

if TYPE_CHECKING:
    from qserve.quant.smoke import Smoke


def try_quantization(model: str, choices: dict[str, Any]) -> None:
    """Quantize one block of a model, save it, read it, run it, and print what was compared."""
    # Imported here so that a wrong option or `--help` is answered before torch has loaded.

    from qserve.quant.smoke import try_block
    from qserve.quant.source import resolve_model

    options = read_options(choices)
    use_threads(choices["threads"])
    source = resolve_model(model, cache=cache_folder(os.environ), notice=say)
    with TemporaryDirectory(prefix="qserve-smoke-") as folder:
        found = try_block(source, options, Path(folder))
    if choices["as_json"]:
        click.echo(json.dumps(asdict(found), indent=2))
    else:
        _print(found)


def _print(found: Smoke) -> None:
    rows = [(check.name, check.format, "same bits", f"{check.ran:.1e}") for check in found.checks]
    heading = ("layer", "format", "read again", "kernel's error")
    print_table(f"block {found.block}", heading, rows)
    text = f"{found.num_tokens} tokens of text" if found.num_tokens else "no text"
    error = "" if found.error is None else f", error of its output {found.error:.1e}"
    say(f"it works: one block, {text}{error}; saved, read again and run by the kernels")
