"""What a checkpoint holds, counted from its headers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.errors import CheckpointError
from qserve.quant.formats import awq
from qserve.quant.formats.awq import AwqWriter
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.inspection import dtype_bits, inspect_checkpoint, kv_bytes_per_token

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def write_packed(folder: Path) -> Checkpoint:
    """An embedding in float16, one packed layer with a bias in groups of 32, and eleven norms."""
    weight = GroupedWeight(
        codes=torch.zeros(96, 64, dtype=torch.uint8),
        scales=torch.ones(96, 2),
        zero_points=torch.zeros(96, 2, dtype=torch.uint8),
        bits=4,
        group_size=32,
    )
    tensors = {f"layers.0.up.{key}": value for key, value in AwqWriter().encode(weight).items()}
    tensors |= {f"layers.{i}.norm.weight": torch.ones(64) for i in range(11)}
    tensors["layers.0.up.bias"] = torch.zeros(96).half()
    tensors["embed.weight"] = torch.zeros(100, 64).half()
    save_file(tensors, folder / "model.safetensors")
    content = CONFIG | {"quantization_config": awq.config_block(32, [])}
    (folder / "config.json").write_text(json.dumps(content))
    return Checkpoint(folder)


def test_packed_layer_counts_its_scales_and_zero_points(tmp_path: Path) -> None:
    layers = {layer.name: layer for layer in inspect_checkpoint(write_packed(tmp_path)).layers}
    packed = layers["layers.0.up"]
    assert (packed.shape, packed.format, packed.group_size) == ((96, 64), "awq", 32)
    assert packed.bits == 4 + (16 + 4) / 32
    assert packed.num_parameters == 96 * 64 + 96
    assert packed.num_bytes == 96 * 64 // 2 + 96 * 2 * 2 + 96 * 2 // 2 + 96 * 2
    embedding = layers["embed"]
    assert (embedding.format, embedding.bits, embedding.group_size) == ("float16", 16, None)


def test_whole_model_adds_up(tmp_path: Path) -> None:
    inspection = inspect_checkpoint(write_packed(tmp_path))
    num_parameters = 100 * 64 + 96 * 64 + 96 + 11 * 64
    num_bytes = 100 * 64 * 2 + 96 * 64 // 2 + 96 * 2 * 2 + 96 * 2 // 2 + 96 * 2 + 11 * 64 * 4
    assert inspection.architecture == "LlamaForCausalLM"
    assert inspection.format == "awq"
    assert inspection.num_parameters == num_parameters
    assert inspection.num_bytes == num_bytes
    assert inspection.bits_per_parameter == 8 * num_bytes / num_parameters
    assert inspection.quantized_bits_per_weight == 4.625
    assert inspection.kv_bytes_per_token == 2 * 12 * 2 * 16 * 2


def test_layers_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [layer.name for layer in inspect_checkpoint(write_packed(tmp_path)).layers]
    assert names == [
        "embed",
        "layers.0.norm",
        "layers.0.up",
        *(f"layers.{i}.norm" for i in range(1, 11)),
    ]


def test_float_model_has_no_quantized_layer(tiny_llama: Path) -> None:
    inspection = inspect_checkpoint(Checkpoint(tiny_llama))
    assert inspection.format == "bfloat16"
    assert inspection.quantized_bits_per_weight is None
    assert inspection.bits_per_parameter == 16.0
    assert inspection.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2


def test_only_headers_are_read(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Checkpoint, "tensor", lambda *args: pytest.fail("read a tensor"))
    assert inspect_checkpoint(Checkpoint(tiny_llama)).layers


def test_tensors_that_contradict_the_config_are_refused(tmp_path: Path) -> None:
    write_packed(tmp_path)
    content = CONFIG | {"quantization_config": awq.config_block(64, [])}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"layers.0.up: .* do not fit groups of 64"):
        inspect_checkpoint(Checkpoint(tmp_path))


def test_model_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match="no tensor"):
        inspect_checkpoint(Checkpoint(tmp_path))


@pytest.mark.parametrize(
    ("changes", "num_bytes"),
    [
        ({}, 2 * 12 * 2 * 16 * 2),
        ({"head_dim": 32}, 2 * 12 * 2 * 32 * 2),
        ({"head_dim": None, "num_key_value_heads": None}, 2 * 12 * 4 * 16 * 2),
        ({"num_hidden_layers": "12"}, None),
        ({"num_attention_heads": 0, "num_key_value_heads": None}, None),
        ({"hidden_size": None}, None),
    ],
)
def test_kv_bytes_follow_from_the_config(changes: dict[str, object], num_bytes: int) -> None:
    assert kv_bytes_per_token(CONFIG | changes) == num_bytes


def test_every_dtype_of_safetensors_has_a_width() -> None:
    widths = {"BOOL": 8, "F8_E4M3": 8, "F4": 4, "BF16": 16, "I32": 32, "F64": 64, "C64": 64}
    assert {dtype: dtype_bits(dtype) for dtype in widths} == widths
    with pytest.raises(CheckpointError, match="dtype STRANGE"):
        dtype_bits("STRANGE")
