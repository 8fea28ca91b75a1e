"""The comparison of scales of keys and values rounds what attention reads, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from qserve.quant.decoder import Decoder
from qserve.quant.evaluate import final_hidden
from qserve.quant.formats.checkpoint import Checkpoint


def test_attention_reads_what_the_cache_gives_back(
    load_script: Callable[[str], ModuleType], tiny_llama: Path
) -> None:
    script = load_script("kv_scales")
    checkpoint = Checkpoint(tiny_llama)
    windows = torch.arange(96).view(4, 24)
    exact = final_hidden(Decoder(checkpoint), windows, lambda: None)

    def distance(rounding: object) -> float:
        decoder = script.CachedDecoder(checkpoint, rounding)
        return float((final_hidden(decoder, windows, lambda: None) - exact).norm() / exact.norm())

    assert distance(lambda _, rows: rows) == 0
    found = {name: distance(rounding) for name, rounding in script.ways(checkpoint, windows)}
    by_name = ["int8, a scale a token", "int8, stored scales", "fp8, a scale a token"]
    assert 0 < found[by_name[0]] < found[by_name[1]] < found[by_name[2]] < 0.1
    assert found[by_name[2]] < found["fp8, stored scales"] < 0.1
