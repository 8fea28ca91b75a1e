"""Where the cache is."""

from __future__ import annotations

from pathlib import Path

import pytest

from qserve.cli.cache import cache_folder


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"XDG_CACHE_HOME": "/var/cache/me"}, Path("/var/cache/me/qserve")),
        ({"XDG_CACHE_HOME": ""}, Path.home() / ".cache" / "qserve"),
        ({"XDG_CACHE_HOME": "relative"}, Path.home() / ".cache" / "qserve"),
        ({}, Path.home() / ".cache" / "qserve"),
    ],
)
def test_cache_is_where_the_desktop_specification_puts_it(
    environment: dict[str, str], folder: Path
) -> None:
    assert cache_folder(environment) == folder
