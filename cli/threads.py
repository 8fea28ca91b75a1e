"""The option --threads, the same for every command that computes on the CPU."""

from __future__ import annotations

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
