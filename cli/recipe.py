"""`qserve recipe`: a recipe to start from, its schema, and translations from other tools."""

from __future__ import annotations

import json
from pathlib import Path

import click

from qserve.cli.console import say
from qserve.cli.errors import CommandError, ExitCode


@click.group(short_help="Write, check and translate recipes.")
def command() -> None:
    """Write, check and translate the recipes of `qserve run`."""


@command.command("init", short_help="Write a recipe with comments to start from.")
@click.argument("path", type=click.Path(path_type=Path), default=Path("recipe.yaml"))
@click.option("--model", default="owner/name", help="The model that the recipe names.")
@click.option("--output", default="quantized", help="The folder that the recipe writes.")
@click.option("--force", is_flag=True, help="Replace a file that is already there.")
def init(path: Path, model: str, output: str, force: bool) -> None:
    """Write a recipe with every section and comments to PATH."""
    from qserve.quant.options import Method
    from qserve.quant.recipe.starter import STARTER

    if path.exists() and not force:
        raise CommandError(
            f"{path} exists: give another path, or --force to replace it", ExitCode.OUTPUT
        )
    methods = ", ".join(method.value for method in Method)
    text = STARTER.format(name=path.name, model=model, output=output, methods=methods)
    path.write_text(text, encoding="utf-8")
    say(f"wrote {path}: edit it, then `qserve run {path}`")


@command.command("schema", short_help="Print the JSON Schema for editors.")
def schema() -> None:
    """Print the JSON Schema of a recipe."""
    from qserve.quant.recipe.schema import json_schema

    click.echo(json.dumps(json_schema(), indent=2))


@command.command("check", short_help="Say whether a recipe is sound.")
@click.argument("recipe", type=click.Path(path_type=Path))
def check(recipe: Path) -> None:
    """Read RECIPE and say what is wrong with it, with line and field."""
    from qserve.quant.recipe.loading import load_recipe
    from qserve.quant.recipe.running import Job

    job = Job(load_recipe(recipe), recipe.stem, recipe.absolute().parent)
    job.options()
    say(f"{recipe} is sound")


@command.command("import", short_help="Translate a recipe of llm-compressor.")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--model", default="owner/name", help="The model that the recipe names.")
@click.option("--output", default="quantized", help="The folder that the recipe writes.")
def translate(recipe: Path, model: str, output: str) -> None:
    """Print RECIPE, written for llm-compressor, as a recipe for `qserve run`.

    What cannot be carried over is said on stderr.
    """
    from qserve.quant.recipe.importing import import_recipe

    imported = import_recipe(recipe, model, output)
    for note in imported.notes:
        say(note)
    click.echo(imported.text, nl=False)
