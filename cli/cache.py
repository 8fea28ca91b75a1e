"""Where qserve keeps what it made once and can make again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

OFF = "off"
WEIGHT_CACHE_VARIABLE = "QSERVE_WEIGHT_CACHE"


def cache_folder(environment: Mapping[str, str]) -> Path:
    """The user's cache folder of qserve: ``$XDG_CACHE_HOME/qserve``, or ``~/.cache/qserve``.

    environment: usually ``os.environ``. A relative ``XDG_CACHE_HOME`` does not count, as the XDG
    base directory specification asks. The folder need not exist.
    """
    root = Path(environment.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "qserve"


def weight_cache_folder(environment: Mapping[str, str], choice: str | None = None) -> Path | None:
    """The folder of packed weights: ``choice``, or the one in the user's cache; None for "off"."""
    if choice == OFF:
        return None
    return Path(choice) if choice else cache_folder(environment) / "weights"
