"""Threads of torch wait briefly, unless the environment says how."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qserve.cli.threads import limit_waiting

RUN_AND_TELL = """
import os, sys
from qserve.cli.main import main
sys.argv = ["qserve", "--version"]
try:
    main()
finally:
    print(os.environ["GOMP_SPINCOUNT"], "torch" in sys.modules)
"""


def test_the_command_line_says_how_to_wait_before_torch_is_there() -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN_AND_TELL], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "1000 False"


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}])
def test_what_the_environment_says_is_kept(given: dict[str, str]) -> None:
    environ = dict(given)
    limit_waiting(environ)
    assert environ == given
