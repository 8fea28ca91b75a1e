"""Run qserve and llama.cpp in turn on one machine, and report the ratio of every figure.

    python benchmarks/compare_engines.py MODEL GGUF --peer-python /path/to/llama/bin/python

Absolute figures drift from machine to machine and minute to minute; what is reported is the best
of the rounds for each engine, and the ratio. A row for each figure goes to
docs/benchmarks/engine.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "benchmarks" / "engine.csv"
COLUMNS = ("date", "commit", "cpu", "threads", "figure", "qserve", "peer", "ratio", "peer_name")
LESS_IS_BETTER = ("load_s", "peak_rss_mib")

Figures = dict[str, float]


def main() -> None:
    """Parse the command line, run both engines in turn, print and append the ratios."""
    parser = argparse.ArgumentParser(description="Compare qserve's engine with llama.cpp.")
    parser.add_argument("model", type=Path, help="the checkpoint folder for qserve")
    parser.add_argument("gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--peer-python", type=Path, required=True, help="has llama-cpp-python")
    parser.add_argument("--requantize", help="have llama.cpp convert the file first, e.g. to q4_0")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-row", action="store_true", help="print only")
    args = parser.parse_args()
    threads = ["--threads", str(args.threads)]
    bench = [sys.executable, "-m", "qserve.cli.main", "bench", "engine"]
    ours = [*bench, str(args.model), "--json", *threads]
    peer = [str(args.peer_python), str(ROOT / "benchmarks/llama_peer.py"), str(args.gguf), *threads]
    if args.requantize:
        peer += ["--requantize", args.requantize]
    our_runs, peer_runs = [], []
    for _ in range(args.rounds):
        our_runs.append(run(ours))
        peer_runs.append(run(peer))
    peer_best = best(peer_runs)
    our_best = {name: best(our_runs)[name] for name in peer_best}
    print(f"{'figure':24} {'qserve':>10} {'peer':>10} {'ratio':>7}")
    for figure, value in our_best.items():
        ratio = value / peer_best[figure]
        print(f"{figure:24} {value:10.2f} {peer_best[figure]:10.2f} {ratio:7.2f}")
    if not args.no_row:
        peer_name = f"llama.cpp {args.requantize or args.gguf.name}"
        append(our_best, peer_best, args.threads, peer_name)


def run(command: list[str]) -> Figures:
    """The figures that one run of an engine prints as its last line."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    printed = json.loads(done.stdout.splitlines()[-1])
    return {
        name: float(value)
        for name, value in printed.items()
        if name.endswith("_tok_s") or name in LESS_IS_BETTER
    }


def best(runs: list[Figures]) -> Figures:
    """The best value of each figure over the runs: what the machine can do when left alone."""
    return {
        name: (min if name in LESS_IS_BETTER else max)(figures[name] for figures in runs)
        for name in runs[0]
    }


def append(ours: Figures, peer: Figures, threads: int, peer_name: str) -> None:
    """Add a row for each figure to the table in docs/benchmarks."""
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    is_new = not TABLE.exists()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout.strip()
    today = datetime.date.today().isoformat()
    with TABLE.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(COLUMNS)
        for figure, value in ours.items():
            ratio = round(value / peer[figure], 2)
            row = (
                today,
                commit,
                cpu_name(),
                threads,
                figure,
                value,
                peer[figure],
                ratio,
                peer_name,
            )
            writer.writerow(row)


def cpu_name() -> str:
    """What the system calls its processor."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "unknown"


if __name__ == "__main__":
    main()
