"""The dithered copy differs from its source by noise on the linear layers, and by nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from qserve.quant.formats.checkpoint import Checkpoint

LoadScript = Callable[[str], ModuleType]


def test_noise_is_at_most_half_a_step_of_a_groups_grid(load_script: LoadScript) -> None:
    script = load_script("dithered_copy")
    weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(1))
    noise = script.dither(weight, torch.Generator().manual_seed(2)) - weight
    groups = weight.unflatten(-1, (3, 32))
    step = (groups.amax(-1) - groups.amin(-1)) / 15
    share = noise.unflatten(-1, (3, 32)).abs().amax(-1) / step
    assert share.max() <= 0.501
    assert share.min() > 0.3
    assert noise.mean().abs() < 0.05 * step.mean()


def test_only_linear_layers_of_blocks_change(
    load_script: LoadScript, tiny_llama: Path, tmp_path: Path
) -> None:
    script = load_script("dithered_copy")
    source = Checkpoint(tiny_llama)
    script.write_dithered(source, tmp_path, torch.Generator().manual_seed(0))
    copy = Checkpoint(tmp_path)
    assert set(copy) == set(source)
    for name in source:
        same = torch.equal(copy.tensor(name), source.tensor(name).float())
        assert same != name.endswith("_proj.weight"), name
    assert copy.config["torch_dtype" if "torch_dtype" in source.config else "dtype"] == "float32"
    assert (tmp_path / "tokenizer.json").exists()
