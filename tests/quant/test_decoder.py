"""A model run block by block computes what transformers computes in one go."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qserve.quant.decoder import Decoder
from qserve.quant.errors import CheckpointError, UnsupportedModelError
from qserve.quant.formats.checkpoint import Checkpoint

LENGTH = 40


def random_ids(vocab_size: int) -> torch.Tensor:
    """Three windows of token ids."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (3, LENGTH), generator=draw)


def logits_by_blocks(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    hidden = decoder.embed(ids)
    for index in range(decoder.num_blocks):
        decoder.block(index, LENGTH).run_(hidden)
    return decoder.head().logits(decoder.final_norm()(hidden))


def logits_by_transformers(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(ids, use_cache=False).logits
    return logits


def changed_copy(source: Path, folder: Path, tensors: dict[str, torch.Tensor | None]) -> Path:
    """A copy of a checkpoint with tensors replaced, or removed where None is given."""
    shutil.copytree(source, folder)
    state = load_file(source / "model.safetensors") | tensors
    kept = {name: value for name, value in state.items() if value is not None}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def changed_config(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a checkpoint whose config.json differs."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4, "head_dim": 32, "rope_theta": 500.0},
    ],
    ids=["plain", "tied with biases", "wide heads"],
)
def test_blocks_compute_what_transformers_computes(
    make_tiny_llama: Callable[..., Path], overrides: dict[str, Any]
) -> None:
    folder = make_tiny_llama(**overrides)
    decoder = Decoder(Checkpoint(folder))
    ids = random_ids(decoder.config.vocab_size)
    expected = logits_by_transformers(folder, ids)
    torch.testing.assert_close(logits_by_blocks(decoder, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "no tensor model.layers.1.mlp.up_proj"),
        ("model.layers.1.mlp.up_proj.weight", torch.zeros(3, 64), r"shape \(3, 64\)"),
        ("model.layers.1.input_layernorm.weight", torch.full((64,), float("nan")), "NaN"),
        ("model.layers.1.mlp.down_proj.weight", torch.full((64, 128), torch.inf), "infinite"),
    ],
    ids=["missing", "shape", "nan", "infinite"],
)
def test_a_damaged_tensor_is_named(
    tiny_llama: Path, tmp_path: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    folder = changed_copy(tiny_llama, tmp_path / "model", {name: value})
    decoder = Decoder(Checkpoint(folder))
    decoder.block(0, LENGTH)
    with pytest.raises(CheckpointError, match=message) as raised:
        decoder.block(1, LENGTH)
    assert name.removesuffix(".weight") in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "expected one of LlamaForCausalLM"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "type 'dynamic'",
        ),
    ],
    ids=["architecture", "rope"],
)
def test_models_that_are_not_handled_are_refused(
    tiny_llama: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = changed_config(tiny_llama, tmp_path / "model", **changes)
    with pytest.raises(UnsupportedModelError, match=message):
        Decoder(Checkpoint(folder))


def test_a_configuration_that_contradicts_itself_is_an_error_of_the_checkpoint(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = changed_config(tiny_llama, tmp_path / "model", hidden_size="wide")
    with pytest.raises(CheckpointError, match=r"config\.json is not a usable configuration"):
        Decoder(Checkpoint(folder))


def test_token_ids_beyond_the_embedding_are_an_error(decoder: Decoder) -> None:
    with pytest.raises(CheckpointError, match="the tokenizer gives id 512"):
        decoder.embed(torch.tensor([[1, 512]]))
