"""The built-in calibration text is there, varied, and long enough for the default settings."""

from __future__ import annotations

from pathlib import Path

from qserve.quant import calibration_text
from qserve.quant.calibration_text import KINDS, texts


def test_there_is_a_text_for_every_kind_and_no_file_without_one() -> None:
    folder = Path(calibration_text.__file__).parent
    assert sorted(path.stem for path in folder.glob("*.txt")) == sorted(KINDS)
    assert len(texts()) == len(KINDS)


def test_it_is_long_enough_for_32_windows_of_512_tokens() -> None:
    # The best tokenizers take 4.7 characters of English prose to a token, and fewer of code.
    assert sum(len(text) for text in texts()) > 32 * 512 * 4.7


def test_no_paragraph_of_prose_is_repeated() -> None:
    paragraphs = [part for text in texts() for part in text.split("\n\n") if len(part) > 120]
    assert len(paragraphs) == len(set(paragraphs))


def test_it_is_clean_text() -> None:
    for text in texts():
        assert text.endswith("\n")
        assert "\ufffd" not in text and "\r" not in text and "\t" not in text
