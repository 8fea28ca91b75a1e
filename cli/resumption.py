"""What the commands that quantize say about work that is kept for another try."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qserve.cli.console import say


@contextmanager
def telling_what_is_kept(output: Path, key: str, restart: bool) -> Iterator[None]:
    """Say at the start that a run goes on, and when it ends before its end, how to go on.

    key: of the run, as ``publish_resumable`` has it.
    """
    from qserve.quant.errors import OutputError
    from qserve.quant.output import has_other_work, kept_work

    if kept_work(output, key) is not None and not restart:
        say("going on with a run that was stopped (--restart begins anew)")
    elif has_other_work(output, key):
        say(
            "beginning anew: what a stopped run has left is of other options, files or versions, "
            "and is removed"
        )
    try:
        yield
    except OutputError:
        raise  # it says so itself, or another run is at work there
    except BaseException:
        kept = kept_work(output, key)
        if kept is not None:
            say(f"what is finished is kept in {kept}: run the same command again to continue")
        raise
