"""The comparison of ways to compute runs through the engine's model, and tells them apart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from qserve.quant.formats.checkpoint import Checkpoint

LENGTH = 40


def test_every_way_is_compared_with_the_exact_one(
    load_script: Callable[[str], ModuleType], rtn_llama: Path
) -> None:
    script = load_script("activations")
    engine = script.Engine(Checkpoint(rtn_llama), LENGTH)
    token_ids = torch.arange(LENGTH) * 7 % 500
    found = {way: (kl, same) for way, kl, same in script.compare(engine, token_ids)}
    assert list(found) == list(script.WAYS)
    for way, (kl, same) in found.items():
        # What is rounded costs something, and not much; nothing is lost in the sums.
        assert 1e-9 < kl < 0.2, way
        assert 0.5 <= same <= 1.0, way
    heads = {way.head_group: found[way][0] for way in script.WAYS if way.kv.value == "float32"}
    assert heads[32] < heads[script.WHOLE_ROW]


def test_the_exact_way_is_no_distance_from_itself(
    load_script: Callable[[str], ModuleType], rtn_llama: Path
) -> None:
    script = load_script("activations")
    engine = script.Engine(Checkpoint(rtn_llama), LENGTH)
    token_ids = torch.arange(LENGTH) * 7 % 500
    first, second = (engine.hidden(script.REFERENCE, token_ids) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (LENGTH, 64)
