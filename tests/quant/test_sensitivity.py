"""The estimate of what rounding one stage does agrees with what it does."""

from __future__ import annotations

import torch

from qserve.quant.decoder import Decoder
from qserve.quant.grid import LevelSet, Zero, grid_over_all, rounding_difference
from qserve.quant.sensitivity import measure_sensitivity
from qserve.quant.target import StageSpec
from qserve.quant.windows import Windows, windows_of_text

WINDOWS = torch.randint(3, 512, (8, 64), generator=torch.Generator().manual_seed(3))
SPECS = [
    StageSpec(LevelSet(bits, Zero.MIDDLE), group) for bits, group in ((4, 64), (6, 64), (8, 32))
]


def log_probs(decoder: Decoder, rounded: tuple[int, str] | None, spec: StageSpec) -> torch.Tensor:
    """Of the whole model with one stage rounded, ``[S, T, V]``."""
    hidden = decoder.embed(WINDOWS)
    for index in range(decoder.num_blocks):
        block = decoder.block(index, WINDOWS.shape[1])
        for stage in block.stages:
            if (index, stage.name) == rounded:
                for name in stage.linears:
                    groups = block.linear(name).weight.unflatten(1, (-1, spec.group_size))
                    grid = grid_over_all(groups, spec.levels)
                    block.linear(name).weight.add_(rounding_difference(groups, grid).flatten(1))
        block.run_(hidden)
    logits = decoder.head().logits(decoder.final_norm()(hidden))
    return logits.log_softmax(-1)


def test_estimates_are_near_the_divergence_that_is_measured(decoder: Decoder) -> None:
    keys = [(i, stage.name) for i in range(2) for stage in decoder.skeleton(i).stages]
    steps: list[int] = []
    found = measure_sensitivity(
        decoder,
        windows_of_text(WINDOWS),
        {key: SPECS for key in keys},
        lambda step: steps.append(step.done),
    )
    assert steps == [1, 2, 3, 4]
    base = log_probs(decoder, None, SPECS[0])
    for key in keys:
        for estimate, spec in zip(found[key], SPECS, strict=True):
            moved = log_probs(decoder, key, spec)
            measured = float((base.exp() * (base - moved)).sum(-1).mean())
            assert 0.5 < estimate / measured < 2, (key, spec.levels.bits)


def test_the_same_windows_give_the_same_estimates_and_others_are_not_asked_for(
    decoder: Decoder,
) -> None:
    wanted = {(1, "mlp output"): SPECS[:1]}
    first, second = (
        measure_sensitivity(decoder, windows_of_text(WINDOWS), wanted, lambda _: None)
        for _ in range(2)
    )
    assert first == second
    assert first.keys() == wanted.keys()


def test_positions_that_do_not_count_change_nothing(decoder: Decoder) -> None:
    counts = torch.arange(WINDOWS.shape[1]).expand(len(WINDOWS), -1) < 20
    others = torch.where(counts, WINDOWS, WINDOWS.flip(1))
    wanted = {(0, "mlp input"): SPECS[:1]}
    first, second, whole = (
        measure_sensitivity(decoder, windows, wanted, lambda _: None)
        for windows in (Windows(WINDOWS, counts), Windows(others, counts), windows_of_text(WINDOWS))
    )
    assert first == second != whole


def test_the_pieces_in_which_most_counts_are_looked_at(decoder: Decoder) -> None:
    ids = torch.randint(3, 512, (2, 300), generator=torch.Generator().manual_seed(5))
    counts = torch.zeros_like(ids, dtype=torch.bool)
    counts[:, 140:150] = True
    wanted = {(0, "mlp input"): SPECS[:1]}
    piece = Windows(ids[:, 128:256], counts[:, 128:256])
    first, second = (
        measure_sensitivity(decoder, windows, wanted, lambda _: None)
        for windows in (Windows(ids, counts), piece)
    )
    assert first == second
