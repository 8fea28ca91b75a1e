"""Calibration tokens: evenly spread, reproducible, and honest about what was there."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qserve.quant.calibration import gather_calibration
from qserve.quant.calibration_text import texts
from qserve.quant.decoder import Decoder
from qserve.quant.errors import CalibrationError, CheckpointError
from qserve.quant.options import CalibrationSource, QuantizeOptions
from qserve.quant.windows import python_topics, read_text, spread_windows, tokenize


def test_windows_reach_from_the_start_to_the_end_of_the_text() -> None:
    windows = spread_windows(list(range(1000)), 4, 100)
    assert windows[:, 0].tolist() == [0, 300, 600, 900]
    assert windows[3, -1] == 999


def test_a_short_text_gives_the_windows_it_holds() -> None:
    assert spread_windows(list(range(250)), 8, 100)[:, 0].tolist() == [0, 150]
    assert spread_windows(list(range(100)), 8, 100).tolist() == [list(range(100))]


def test_a_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(CalibrationError, match="99 tokens, one window takes 100"):
        spread_windows(list(range(99)), 8, 100)


def test_a_file_is_read_without_special_tokens(
    decoder: Decoder, tiny_options: QuantizeOptions, text_file: Path
) -> None:
    calibration = gather_calibration(decoder, tiny_options)
    ids = tokenize(decoder.checkpoint.folder, text_file.read_text())
    assert calibration.windows.token_ids[0].tolist() == ids[:48]
    assert calibration.windows.token_ids.shape == (12, 48)
    assert calibration.report.source == "prose.txt"
    assert calibration.report.sha256 == hashlib.sha256(text_file.read_bytes()).hexdigest()
    assert calibration.report.num_text_tokens == len(ids)
    assert decoder.config.bos_token_id not in ids


def test_the_text_of_the_package_is_the_default(decoder: Decoder) -> None:
    calibration = gather_calibration(decoder, QuantizeOptions(num_samples=4, seq_len=32))
    expected = tokenize(decoder.checkpoint.folder, "\n\n".join(texts()))
    assert calibration.report.source == "built-in"
    assert calibration.windows.token_ids[0].tolist() == expected[:32]


def test_the_model_writes_its_own_text_the_same_with_the_same_seed(decoder: Decoder) -> None:
    options = QuantizeOptions(calibration=CalibrationSource.SELF, num_samples=3, seq_len=20, seed=5)
    state = torch.get_rng_state()
    first, second = (gather_calibration(decoder, options) for _ in range(2))
    other = gather_calibration(decoder, replace(options, seed=6))
    assert first.windows.token_ids.shape == (3, 20)
    assert torch.equal(first.windows.token_ids, second.windows.token_ids)
    assert first.report.sha256 == second.report.sha256
    assert not torch.equal(first.windows.token_ids, other.windows.token_ids)
    assert torch.equal(torch.get_rng_state(), state)


def test_windows_longer_than_the_context_are_refused(decoder: Decoder) -> None:
    with pytest.raises(CalibrationError, match="513 tokens, the model was made for 512"):
        gather_calibration(decoder, QuantizeOptions(seq_len=513))


@pytest.mark.parametrize(
    ("content", "message"), [(None, "cannot be read"), (b"caf\xe9", "not UTF-8 text")]
)
def test_a_file_that_is_not_text_is_refused(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_text(path)


def test_a_folder_without_a_tokenizer_is_an_error_of_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        tokenize(tmp_path, "text")


def test_the_text_of_python_is_long_prose() -> None:
    text = python_topics()
    assert len(text) > 400_000
    assert "generator" in text
