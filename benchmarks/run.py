"""Run every benchmark of this folder, one process each: what `make bench` calls.

    python benchmarks/run.py [NAME ...]

The rows go to docs/benchmarks, checkpoints to out/bench. The comparison with llama.cpp runs when
its Python package is installed (`pip install -e '.[bench]'`, which compiles it).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from qserve.cli.cache import cache_folder
from qserve.cli.demo_model import find_model

HERE = Path(__file__).resolve().parent
CHECKPOINTS = HERE.parent / "out" / "bench"
SERVED = CHECKPOINTS / "awq-g64"  # what `quality` leaves and the engine is measured with


def compare_arguments() -> list[str]:
    """The checkpoint, the same model for llama.cpp, and the interpreter that has llama.cpp."""
    return [str(SERVED), str(find_model(cache_folder(os.environ))), "--peer-python", sys.executable]


# In the order of what they need: ops alone, a checkpoint, an engine and its peer.
BENCHMARKS: dict[str, Callable[[], list[str]]] = {
    "kernel_rates": list,
    "quality": lambda: ["--keep", str(CHECKPOINTS)],
    "compare_engines": compare_arguments,
}


def main() -> int:
    """Run the benchmarks named on the command line, or all; 1 when one of them failed."""
    failed = []
    for name in sys.argv[1:] or BENCHMARKS:
        print(f"== {name}", flush=True)
        if name == "compare_engines" and find_spec("llama_cpp") is None:
            print("left out: llama_cpp is not installed (pip install -e '.[bench]')")
            continue
        command = [sys.executable, str(HERE / f"{name}.py"), *BENCHMARKS[name]()]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
