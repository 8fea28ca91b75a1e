"""The command group: fast to start, one line for an error, exit codes that mean something."""

from __future__ import annotations

import errno
import importlib
import resource
import subprocess
import sys
from importlib.metadata import version

import click
import pytest

from qserve.cli import main as cli_main
from qserve.cli.errors import CommandError, ExitCode, exit_code_for
from qserve.cli.main import COMMANDS, LazyGroup, run
from qserve.quant import errors as quant_errors
from qserve.serve.errors import ServeError


class FailingGroup(LazyGroup):
    """A group whose every command raises ``error``."""

    error: BaseException = Exception()

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        @click.command()
        def fail() -> None:
            raise self.error

        return fail


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> FailingGroup:
    """The group with a command `fail` that raises what its `error` attribute is set to."""
    group = FailingGroup(params=cli_main.cli.params, callback=cli_main.cli.callback)
    monkeypatch.setitem(COMMANDS, "fail", ("nowhere", "Fails."))
    monkeypatch.setattr(cli_main, "cli", group)
    return group


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from qserve.cli.main import run; run(['--help']); "
        "sys.exit(bool({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0


def test_help_takes_less_than_300_ms_of_processor_time() -> None:
    def used_s() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    times = []
    for _ in range(3):
        before = used_s()
        subprocess.run(
            [sys.executable, "-m", "qserve.cli.main", "--help"], capture_output=True, check=True
        )
        times.append(used_s() - before)
    assert min(times) < 0.3


def test_every_command_has_a_line_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == ExitCode.OK
    text = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert f"{name} " in text and summary in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == ExitCode.OK
    assert f"Usage: qserve {name}" in capsys.readouterr().out


def test_threads_are_stated_alike_by_every_command_that_computes() -> None:
    stated = {}
    for name, (module, _) in COMMANDS.items():
        command = importlib.import_module(module).command
        commands = command.commands.values() if isinstance(command, click.Group) else [command]
        for option in (option for one in commands for option in one.params):
            if option.name == "threads":
                stated[name] = (option.opts, option.help, option.default, repr(option.type))
    assert stated.keys() == {"quantize", "plan", "eval", "run", "convert", "serve", "bench"}
    assert len({str(one) for one in stated.values()}) == 1


def test_the_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == ExitCode.OK
    assert capsys.readouterr().out.strip() == f"qserve, version {version('qserve-llm')}"


def test_no_arguments_print_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == ExitCode.OK
    assert "Commands:" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], ["doctor", "--nonsense"]])
def test_a_wrong_command_line_exits_with_2_and_a_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("Usage: qserve") and "\nerror: " in captured.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (quant_errors.CheckpointError("no model"), ExitCode.MODEL),
        (quant_errors.UnsupportedModelError("no model"), ExitCode.MODEL),
        (quant_errors.CalibrationError("no text"), ExitCode.CALIBRATION),
        (quant_errors.OptionError("no option"), ExitCode.USAGE),
        (quant_errors.OutputError("no room"), ExitCode.OUTPUT),
        (quant_errors.QuantError("no"), ExitCode.MODEL),
        (ServeError("no server"), ExitCode.SERVE),
        (OSError(errno.ENOSPC, "No space left on device", "x"), ExitCode.OUTPUT),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), ExitCode.ERROR),
        (CommandError("worse", ExitCode.GATE), ExitCode.GATE),
    ],
    ids=lambda value: getattr(value, "name", type(value).__name__),
)
def test_an_expected_error_is_one_line_and_its_code(
    error: Exception, code: ExitCode, failing: FailingGroup, capsys: pytest.CaptureFixture[str]
) -> None:
    failing.error = error
    assert run(["fail"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert "bug" not in captured.err


def test_a_bug_is_one_line_that_says_how_to_see_more(
    failing: FailingGroup, capsys: pytest.CaptureFixture[str]
) -> None:
    failing.error = KeyError("name")
    assert run(["fail"]) == ExitCode.ERROR
    text = capsys.readouterr().err
    assert "Traceback" not in text and "KeyError" in text and "--debug" in text


@pytest.mark.parametrize("error", [KeyError("name"), quant_errors.CheckpointError("no model")])
def test_debug_shows_the_traceback(
    error: Exception, failing: FailingGroup, capsys: pytest.CaptureFixture[str]
) -> None:
    failing.error = error
    assert run(["--debug", "fail"]) != ExitCode.OK
    assert "Traceback" in capsys.readouterr().err


def test_a_message_of_many_lines_becomes_one(
    failing: FailingGroup, capsys: pytest.CaptureFixture[str]
) -> None:
    failing.error = quant_errors.CheckpointError("first\n  second")
    run(["fail"])
    assert capsys.readouterr().err == "error: first second\n"


def test_ctrl_c_exits_quietly_with_130(
    failing: FailingGroup, capsys: pytest.CaptureFixture[str]
) -> None:
    failing.error = KeyboardInterrupt()
    assert run(["fail"]) == ExitCode.INTERRUPTED
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err


def test_a_reader_that_leaves_early_causes_no_noise() -> None:
    command = f"'{sys.executable}' -m qserve.cli.main doctor --json | head -c 1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "{", "")


def test_an_error_of_another_package_with_a_known_name_is_a_bug() -> None:
    impostor = type("ServeError", (Exception,), {"__module__": "somewhere.else"})
    assert exit_code_for(impostor()) is None
