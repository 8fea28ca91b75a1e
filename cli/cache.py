"""Where qserve keeps what it made once and can make again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def cache_folder(environment: Mapping[str, str]) -> Path:
    """The user's cache folder of qserve: ``$XDG_CACHE_HOME/qserve``, or ``~/.cache/qserve``.

    environment: usually ``os.environ``. A relative ``XDG_CACHE_HOME`` does not count, as the XDG
    base directory specification asks. The folder need not exist.
    """
    root = Path(environment.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "qserve"
