"""The `qserve` command: one group whose subcommands are imported only when they run."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import click

from qserve.cli.errors import ExitCode, discard_output, report
from qserve.cli.threads import limit_waiting

DISTRIBUTION = "qserve-llm"
PROGRAM = "qserve"

# name -> (module that has it as `command`, its line in `qserve --help`): listing imports nothing.
COMMANDS = {
    "quantize": ("qserve.cli.quantize", "Quantize a model and write a checkpoint."),
    "plan": ("qserve.cli.plan", "Say what a quantization will cost and give."),
    "eval": ("qserve.cli.evaluate", "Measure perplexity, and the distance to the float model."),
    "run": ("qserve.cli.run", "Run a recipe: quantize, judge, gate, publish."),
    "recipe": ("qserve.cli.recipe", "Write, check and translate recipes."),
    "convert": ("qserve.cli.convert", "Write a quantized checkpoint in another format."),
    "inspect": ("qserve.cli.inspection", "Say what a checkpoint holds: layers, bits, sizes."),
    "serve": ("qserve.cli.serve", "Answer over HTTP as an OpenAI-compatible server."),
    "bench": ("qserve.cli.bench", "Measure the engine and the kernels on this machine."),
    "cache": ("qserve.cli.cache_command", "List or clear the packed weights that are kept."),
    "doctor": ("qserve.cli.doctor", "Say what this machine can run, and why."),
    "demo": ("qserve.cli.demo", "Quantize, judge and serve a small model, end to end."),
}


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports the module of the one that is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(COMMANDS[cmd_name][0]).command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # here, since click would leave with 1 for it
            discard_output()
            return ExitCode.OK

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}: choose one of {', '.join(COMMANDS)}")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version(DISTRIBUTION), prog_name=PROGRAM)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Take a language model from full precision to a quantized one that answers over HTTP."""


def run(arguments: Sequence[str]) -> ExitCode | int:
    """Run one command line and return its exit code. Every error ends here, as a line on stderr."""
    debug = "--debug" in arguments
    try:
        result = cli.main(list(arguments), prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return ExitCode.OK
    except click.ClickException as error:
        usage = getattr(error, "ctx", None)
        if usage is not None:
            click.echo(usage.get_usage(), err=True)
        click.echo(f"error: {error.format_message()}", err=True)
        return error.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        discard_output()
        return ExitCode.OK
    except Exception as error:
        return report(error, debug)
    return result if isinstance(result, int) else ExitCode.OK


def main() -> None:
    """Entry point of the console script."""
    limit_waiting(os.environ)
    sys.exit(int(run(sys.argv[1:])))


if __name__ == "__main__":
    main()
