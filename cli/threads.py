"""The option --threads, the same for every command that computes on the CPU, and how they wait."""

from __future__ import annotations

from collections.abc import MutableMapping

import click

MAX_THREADS = 256
"""As many as the native kernels' pool takes."""

threads_option = click.option(
    "--threads", type=click.IntRange(1, MAX_THREADS), help="CPU threads. Default: all cores."
)


def use_threads(threads: int | None) -> None:
    """Let torch compute with so many threads; None leaves it as it is."""
    if threads is not None:
        import torch  # so that a wrong option or `--help` is answered before torch has loaded

        torch.set_num_threads(threads)


def limit_waiting(environ: MutableMapping[str, str]) -> None:
    """Let torch's threads wait for each other in sleep, not in a loop that takes the processor from
    whom they wait for. Works until torch is imported; settings that are there are kept.
    """
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", "1000")  # microseconds; by default milliseconds
