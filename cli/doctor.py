"""`qserve doctor`: what this machine can run, which backend each op takes on it, and why."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
import torch

from qserve.cli.cache import WEIGHT_CACHE_VARIABLE, cache_folder, weight_cache_folder
from qserve.cli.console import print_table
from qserve.kernels import backend, native
from qserve.quant.quantities import format_bytes

PACKAGES = ("qserve-llm", "torch", "triton", "transformers", "tokenizers", "safetensors", "uvicorn")
# Of the many flags of a processor, those that one of our kernels looks at.
INSTRUCTION_SETS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16")
CPU_INFO = Path("/proc/cpuinfo")
MEMORY_INFO = Path("/proc/meminfo")

Section = dict[str, Any]


def versions() -> Section:
    """Python, and the installed packages that matter; None for one that is missing."""
    found: Section = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def machine() -> Section:
    """Processor, cores this process may use, memory in bytes, GPUs."""
    cpu = _fields(CPU_INFO)
    memory = _fields(MEMORY_INFO)
    flags = cpu.get("flags", "").split()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": cpu.get("model name") or platform.processor() or "unknown",
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "num_cores": os.cpu_count(),
        "num_usable_cores": len(os.sched_getaffinity(0)),
        "num_torch_threads": torch.get_num_threads(),
        "memory_bytes": _kibibytes(memory.get("MemTotal")),
        "available_memory_bytes": _kibibytes(memory.get("MemAvailable")),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def native_kernels() -> Section:
    """Whether the native CPU kernels run, on what, and if not, why not."""
    try:
        if not native.available():
            return {"available": False, "problem": native.failure()}
    except ValueError as error:  # QSERVE_ISA asks for what this machine has not got
        return {"available": False, "problem": str(error)}
    return {
        "available": True,
        "isa": native.isa(),
        "supported_isas": list(native.supported_isas()),
        "num_threads": native.num_threads(),
    }


def ops() -> list[Section]:
    """For each op and kind of device here: the backend, the reason, and why not the others."""
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    found = []
    for name in backend.OPS:
        for device in devices:
            choice = backend.choose(name, torch.device(device))
            found.append(
                {
                    "op": name,
                    "device": device,
                    "backend": choice.backend.value,
                    "reason": choice.reason,
                    "rejected": {other.value: why for other, why in choice.rejected},
                }
            )
    return found


def storage() -> Section:
    """The cache folder, what it holds and what is free there, in bytes; and the packed weights
    (`qserve cache` lists them)."""
    folder = cache_folder(os.environ)
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    weights = weight_cache_folder(os.environ, os.environ.get(WEIGHT_CACHE_VARIABLE))
    return {
        "folder": str(folder),
        "held_bytes": _bytes_in(folder),
        "weights_folder": str(weights) if weights else None,
        "weights_bytes": _bytes_in(weights) if weights else 0,
        "free_bytes": shutil.disk_usage(existing).free,
        "writable": os.access(existing, os.W_OK),
    }


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def examine() -> dict[str, Any]:
    """Everything the command prints; ``problems`` are sentences, and empty on a good machine."""
    kernels = native_kernels()
    cache = storage()
    problems = []
    if not kernels["available"]:
        problems.append(f"CPU speed is far below what is possible: {kernels['problem']}")
    if not cache["writable"]:
        problems.append(f"{cache['folder']} cannot be written: set XDG_CACHE_HOME to another place")
    try:
        choices = ops()
    except ValueError:  # a QSERVE_ISA that cannot be had: `problems` says so already
        choices = []
    return {
        "versions": versions(),
        "machine": machine(),
        "native_kernels": kernels,
        "ops": choices,
        "cache": cache,
        "problems": problems,
    }


def _fields(path: Path) -> dict[str, str]:
    if not path.is_file():  # only Linux has these files
        return {}
    found: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            found.setdefault(name.strip(), value.strip())
    return found


def _kibibytes(value: str | None) -> int | None:
    return int(value.split()[0]) * 1024 if value else None


def _plain(name: str, value: Any) -> str:
    if value is None:
        return "not there"
    if name.endswith("_bytes"):
        return format_bytes(value)
    if isinstance(value, list):
        return ", ".join(value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _print_section(title: str, section: Section) -> None:
    rows = [
        (name.removesuffix("_bytes").replace("_", " "), _plain(name, value))
        for name, value in section.items()
    ]
    print_table(title, ("", ""), rows)


def _print_report(report: dict[str, Any]) -> None:
    _print_section("Versions", report["versions"])
    _print_section("Machine", report["machine"])
    _print_section("Native CPU kernels", report["native_kernels"])
    together: dict[tuple[str, ...], list[str]] = {}  # most ops agree: one row for all that do
    for row in report["ops"]:
        rejected = "\n".join(f"{other}: {why}" for other, why in row["rejected"].items())
        key = (row["device"], row["backend"], row["reason"], rejected)
        together.setdefault(key, []).append(row["op"])
    rows = [("\n".join(names), *key) for key, names in together.items()]
    print_table("Ops", ("op", "device", "backend", "because", "not taken"), rows)
    _print_section("Cache", report["cache"])
    for problem in report["problems"]:
        click.echo(f"problem: {problem}")
    if not report["problems"]:
        click.echo("No problems found.")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(as_json: bool) -> None:
    """Say what this machine can run, and why.

    Shows versions, processor, memory and GPUs, whether the native CPU kernels work, and which
    backend each op takes. Exits with 0 also when there are problems: they are the answer.
    """
    report = examine()
    if as_json:
        json.dump(report, sys.stdout, indent=2)
        sys.stdout.write("\n")
    else:
        _print_report(report)
