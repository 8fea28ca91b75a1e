"""Scales of keys and values: found where a cache takes them, stored and read as one a head."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from qserve.quant.cache_scales import find_scales, least_loss
from qserve.quant.checking import check_checkpoint
from qserve.quant.decoder import Decoder
from qserve.quant.engine_rules import judge_for
from qserve.quant.errors import OptionError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.compressed_schemes import Kind, KvCacheScheme
from qserve.quant.inspection import inspect_checkpoint
from qserve.quant.options import KvCache, Method, QuantizeOptions
from qserve.quant.pipeline import quantize
from qserve.quant.progress import ignore_progress
from qserve.quant.windows import Windows, windows_of_text

WINDOWS = torch.arange(3 * 20).view(3, 20) * 7 % 512


def stored(numbers: torch.Tensor, scale: torch.Tensor, kind: Kind) -> torch.Tensor:
    units = numbers / scale[:, None]
    if kind is Kind.INT:
        return units.round().clamp(-127, 127) * scale[:, None]
    return units.clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale[:, None]


@pytest.mark.parametrize("kind", list(Kind))
def test_a_scale_loses_no_more_than_the_largest_magnitude_would(kind: Kind) -> None:
    numbers = torch.randn(2, 100_000, generator=torch.Generator().manual_seed(0))
    numbers[:, 0] = 8
    top = 127 if kind is Kind.INT else 448
    whole = numbers.abs().amax(1) / top
    found = least_loss(numbers, kind)
    errors = [(stored(numbers, s, kind) - numbers).square().sum(1) for s in (found, whole)]
    assert bool((errors[0] <= errors[1]).all())
    if kind is Kind.INT:
        assert bool((found < whole).all())  # one outlier is clipped


def test_numbers_that_are_all_zero_get_a_scale_that_can_divide() -> None:
    scale = least_loss(torch.zeros(2, 8), Kind.INT)
    assert bool((scale > 0).all())


def test_keys_and_values_are_those_that_a_cache_holds(tiny_llama: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    cache = DynamicCache()
    with torch.no_grad():
        model(WINDOWS, past_key_values=cache)
    found = find_scales(
        Decoder(Checkpoint(tiny_llama)), windows_of_text(WINDOWS), Kind.INT, ignore_progress
    )
    assert len(found) == 2 * len(cache.layers)
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        for name, held in (("k_scale", layer.keys), ("v_scale", layer.values)):
            expected = least_loss(held.transpose(0, 1).flatten(1), Kind.INT)
            scales = found[f"model.layers.{index}.self_attn.{name}"]
            assert scales.shape == (2, 1, 1)
            torch.testing.assert_close(scales.flatten(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kv_cache", list(KvCache))
def test_a_checkpoint_states_its_scales_and_readers_see_them(
    kv_cache: KvCache, tiny_llama: Path, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    options = replace(tiny_options, method=Method.INT4, kv_cache=kv_cache)
    quantize(Checkpoint(tiny_llama), tmp_path, options, ignore_progress)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.kv_cache == KvCacheScheme(kv_cache.scheme.kind, per_head=True)
    for index in range(2):
        for name in ("k_scale", "v_scale"):
            scales = checkpoint.tensor(f"model.layers.{index}.self_attn.{name}")
            assert scales.shape == (2, 1, 1) and scales.dtype is torch.float32
            assert bool((scales < 1).all()) and bool((scales > 0).all())
    assert inspect_checkpoint(checkpoint).kv_cache == f"{kv_cache.value}, a scale for each head"
    assert check_checkpoint(tmp_path)[1] == []
    (verdict,) = judge_for(checkpoint, ["vllm"])
    assert bool(verdict.refusals) is (kv_cache is KvCache.INT8)


def test_a_format_without_room_for_them_is_refused(
    tiny_llama: Path, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    options = replace(tiny_options, kv_cache=KvCache.FLOAT8)
    with pytest.raises(OptionError, match="awq cannot state key-value scales"):
        quantize(Checkpoint(tiny_llama), tmp_path, options, ignore_progress)


def test_positions_that_do_not_count_change_no_scale(tiny_llama: Path) -> None:
    counts = torch.arange(WINDOWS.shape[1]).expand(len(WINDOWS), -1) < WINDOWS.shape[1] // 2
    others = torch.where(counts, WINDOWS, WINDOWS.flip(1))
    first, second = (
        find_scales(
            Decoder(Checkpoint(tiny_llama)), Windows(ids, counts), Kind.INT, ignore_progress
        )
        for ids in (WINDOWS, others)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(scales, second[name]) for name, scales in first.items())
