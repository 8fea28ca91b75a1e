"""What the tests of quantization share: a calibration text, and the tiny model in pieces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qserve.quant.decoder import Decoder
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.options import QuantizeOptions
from qserve.quant.windows import python_topics

SEQ_LEN = 48


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """English prose, some 9,000 tokens of the tiny tokenizer."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text(python_topics()[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_options(text_file: Path) -> QuantizeOptions:
    """AWQ in groups of 32, calibrated on 12 short windows."""
    return QuantizeOptions(group_size=32, calibration=text_file, num_samples=12, seq_len=SEQ_LEN)


@pytest.fixture
def decoder(tiny_llama: Path) -> Decoder:
    """The tiny float model."""
    return Decoder(Checkpoint(tiny_llama))


@pytest.fixture
def hidden_states() -> Callable[[Decoder], torch.Tensor]:
    """Gives what the first block of a model receives for 6 windows of random tokens."""

    def embed(decoder: Decoder) -> torch.Tensor:
        draw = torch.Generator().manual_seed(1)
        ids = torch.randint(decoder.config.vocab_size, (6, SEQ_LEN), generator=draw)
        return decoder.embed(ids)

    return embed
