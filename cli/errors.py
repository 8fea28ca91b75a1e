"""What the command line does with an error: one line on stderr, and an exit code to rely on."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from enum import IntEnum

import click


class ExitCode(IntEnum):
    """The exit codes of every ``qserve`` command; ``meaning`` is what the documentation says."""

    meaning: str

    OK = 0, "It worked."
    ERROR = 1, "The system failed, or a bug: `qserve --debug COMMAND ...` shows the traceback."
    USAGE = 2, "The command line is wrong: an option unknown, missing, or contradicting another."
    MODEL = 3, "The model cannot be found, read or handled."
    CALIBRATION = 4, "The calibration or evaluation text does not do."
    OUTPUT = 5, "The result cannot be written where it was asked."
    SERVE = 6, "The server cannot start, or it failed."
    GATE = 7, "The result is worse than the limit that was given."
    INTERRUPTED = 130, "Stopped with Ctrl-C."

    def __new__(cls, code: int, meaning: str) -> ExitCode:
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member


class CommandError(click.ClickException):
    """An error that a command reports itself. The message: what was given, expected, what to do."""

    def __init__(self, message: str, code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = int(code)  # type: ignore[misc]  # click declares it on the class


# By class name along the inheritance: classifying an error imports neither folder, nor torch.
CODES_BY_CLASS = {
    "CalibrationError": ExitCode.CALIBRATION,
    "GateError": ExitCode.GATE,
    "OptionError": ExitCode.USAGE,
    "OutputError": ExitCode.OUTPUT,
    "CheckpointError": ExitCode.MODEL,
    "QuantError": ExitCode.MODEL,
    "ServeError": ExitCode.SERVE,
}


# What the system answers when the place to write to is full, read-only or not ours.
CANNOT_WRITE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})


def exit_code_for(error: BaseException) -> ExitCode | None:
    """The exit code of an expected error, None for one that is a bug.

    Expected are the trees of ``quant.errors`` and ``serve.errors``, and ``OSError``.
    """
    for kind in type(error).__mro__:
        if kind.__module__.startswith("qserve.") and kind.__name__ in CODES_BY_CLASS:
            return CODES_BY_CLASS[kind.__name__]
    if isinstance(error, OSError):
        return ExitCode.OUTPUT if error.errno in CANNOT_WRITE else ExitCode.ERROR
    return None


def describe(error: BaseException) -> str:
    """One line for stderr, without the line breaks that a library may have put into its message."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror.lower()}"
    return " ".join(str(error).split()) or type(error).__name__


def report(error: BaseException, debug: bool) -> ExitCode:
    """Print the error to stderr, with its traceback when ``debug``; return the exit code."""
    if debug:
        traceback.print_exception(error)
    code = exit_code_for(error)
    if code is None:
        hint = "" if debug else " (this is a bug in qserve: --debug before the command shows where)"
        click.echo(f"error: {type(error).__name__}: {describe(error)}{hint}", err=True)
        return ExitCode.ERROR
    click.echo(f"error: {describe(error)}", err=True)
    return code


def discard_output() -> None:
    """Point stdout at nothing: its reader is gone, and Python would complain again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
