"""The text that calibrates quantization unless the user gives one: written for this project.

About 80 KB in ten kinds: reference prose, essays, stories, conversations, news, technical writing,
code, mathematics, other languages, letters and lists. What a layer sees while it is calibrated
decides which of its weights are kept exact, so the kinds are those a served model meets.
"""

from __future__ import annotations

from pathlib import Path

KINDS = (
    "encyclopedia",
    "essays",
    "conversations",
    "code",
    "stories",
    "technical",
    "news",
    "mathematics",
    "languages",
    "letters_and_lists",
)


def texts() -> tuple[str, ...]:
    """One text for each of ``KINDS``, in that order, between 4 and 24 KB long."""
    folder = Path(__file__).parent
    return tuple((folder / f"{kind}.txt").read_text(encoding="utf-8") for kind in KINDS)
