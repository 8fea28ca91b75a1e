"""transformers without its progress bars and remarks: stderr belongs to the command."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

from transformers.utils import logging


@contextmanager
def silenced() -> Iterator[None]:
    """Nothing that transformers says in the block reaches stderr; errors are still raised.

    Verbosity and progress bars are as before after the block. For the main thread: stderr is
    redirected for the whole process, since some of the bars obey no switch.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
