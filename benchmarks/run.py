"""Run the benchmarks that need no hours, one process each: what `make bench` calls.

    python benchmarks/run.py [OPTIONS OF benchmarks/engines.py]

Rows go to docs/benchmarks, and what is made of them to the documentation. Apart from these, and
longer: `quality.py`, `activations.py`, and `gpu_calibration.py` on a machine with a GPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    """Measure kernels and engines, then renew the documentation; 1 when one of them failed."""
    scripts: dict[Path, list[str]] = {
        ROOT / "benchmarks" / "kernel_rates.py": [],
        ROOT / "benchmarks" / "engines.py": sys.argv[1:],
        ROOT / "docs" / "generate.py": [],
    }
    failed = []
    for script, options in scripts.items():
        print(f"== {script.name}", flush=True)
        if subprocess.run([sys.executable, script, *options], check=False).returncode:
            failed.append(script.name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
