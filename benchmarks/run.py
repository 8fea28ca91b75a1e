"""Run every benchmark of this folder, one process each: what `make bench` calls."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# In the order of what they need: ops alone, a checkpoint, an engine, an engine and its peers.
SCRIPTS = ("kernels.py", "quality.py", "engine.py", "compare_engines.py")


def main() -> int:
    """Run the scripts, or those named on the command line; 1 when one of them failed."""
    failed = []
    for name in sys.argv[1:] or SCRIPTS:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, HERE / name], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
