"""`qserve inspect`: tables for people, JSON for scripts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qserve.cli.errors import ExitCode
from qserve.quant.formats.checkpoint import Checkpoint


def test_float_model_is_described(tiny_llama: Path, qserve: Callable[..., Any]) -> None:
    done = qserve("inspect", tiny_llama)
    assert done.code == ExitCode.OK
    assert done.err == ""
    text = " ".join(done.out.split())
    for part in ("LlamaForCausalLM", "format bfloat16", "whole model 16.000", "256 B"):
        assert part in text
    assert "model.layers.1.mlp.down_proj 64 x 128 bfloat16 16.0 - 16384" in text
    assert "and 5 vectors (norms and the like): 640 bytes" in text


def test_quantized_model_has_its_layers_in_json(
    rtn_llama: Path, qserve: Callable[..., Any]
) -> None:
    found = json.loads(qserve("inspect", rtn_llama, "--json").out)
    assert found["format"] == "awq"
    assert found["bits_per_weight_quantized_layers"] == 4.625
    assert found["kv_bytes_per_token"] == 256
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert layers["model.layers.1.mlp.down_proj"] == {
        "name": "model.layers.1.mlp.down_proj",
        "shape": [64, 128],
        "format": "awq",
        "bits": 4.625,
        "group_size": 32,
        "num_parameters": 64 * 128,
        "num_bytes": 64 * 128 * 37 // 64,
    }
    assert sum(layer["num_bytes"] for layer in found["layers"]) == found["num_bytes"]


def test_parameters_are_counted_the_same_before_and_after(
    tiny_llama: Path, rtn_llama: Path, qserve: Callable[..., Any]
) -> None:
    before, after = (
        json.loads(qserve("inspect", folder, "--json").out) for folder in (tiny_llama, rtn_llama)
    )
    assert before["num_parameters"] == after["num_parameters"]
    assert before["num_bytes"] > after["num_bytes"]


def test_no_tensor_is_read(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, qserve: Callable[..., Any]
) -> None:
    monkeypatch.setattr(Checkpoint, "tensor", lambda *args: pytest.fail("a tensor was read"))
    assert qserve("inspect", tiny_llama).code == ExitCode.OK


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("missing", "missing does not exist"),
        ("empty", "it has no config.json"),
        ("file.gguf", "cannot be read as GGUF"),
        ("cut", "truncated or damaged"),
    ],
)
def test_what_is_no_model_is_refused(
    model: str,
    message: str,
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    qserve: Callable[..., Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.gguf").write_text("not a model")
    shutil.copytree(tiny_llama, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    done = qserve("inspect", model)
    assert done.code == ExitCode.MODEL
    assert message in done.error


def test_gguf_file_is_described_without_importing_it(
    tmp_path: Path, qserve: Callable[..., Any]
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    rows = gguf.quants.quantize(np.ones((16, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_k.weight", rows, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = json.loads(qserve("inspect", tmp_path / "tiny.gguf", "--json").out)
    assert (found["architecture"], found["format"]) == ("llama", "Q8_0")
    assert found["num_parameters"] == 16 * 64 + 64
    assert found["bits_per_weight_quantized_layers"] == 8.5
    assert found["kv_bytes_per_token"] == 2 * 1 * 2 * 16 * 2
    assert found["layers"][0]["shape"] == [16, 64]
    assert not (tmp_path / "cache").exists()


def test_a_checkpoint_in_order_passes_and_engines_are_told(
    rtn_llama: Path, qserve: Callable[..., Any]
) -> None:
    done = qserve("inspect", rtn_llama, "--check", "--for", "vllm,transformers")
    assert done.code == ExitCode.OK
    text = " ".join(done.out.split())
    assert "in order: every tensor was read" in text
    assert "vllm 0.33.0 yes" in text
    found = json.loads(qserve("inspect", rtn_llama, "--for", "vllm", "--json").out)
    assert found["findings"] == []
    assert found["engines"][0]["loads"]


def copy_with_scale(model: Path, folder: Path, scale: float) -> Path:
    """A copy of a packed model in ``folder``, the first scale of a layer replaced."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.scales"][0, 0] = scale
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_damaged_checkpoint_is_explained_and_mended(
    rtn_llama: Path, tmp_path: Path, qserve: Callable[..., Any]
) -> None:
    broken = copy_with_scale(rtn_llama, tmp_path / "broken", 0.0)
    out = tmp_path / "out"
    done = qserve("inspect", broken, "--check")
    assert done.code == ExitCode.MODEL
    assert "has 1 errors: see above" in done.err
    assert "scales are zero" in " ".join(done.out.split())
    done = qserve("inspect", broken, "--repair", out)
    assert done.code == ExitCode.OK
    assert "the mended copy is in" in done.err
    assert qserve("inspect", out, "--check").code == ExitCode.OK
    assert (out / "tokenizer.json").is_file()


def test_what_cannot_be_mended_leaves_no_copy(
    rtn_llama: Path, tmp_path: Path, qserve: Callable[..., Any]
) -> None:
    broken, out = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(rtn_llama, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.scales"]
    tensors["model.layers.0.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, broken / "model.safetensors")
    done = qserve("inspect", broken, "--repair", out)
    assert done.code == ExitCode.MODEL
    assert "model.layers.0.mlp.up_proj cannot be mended: scales missing" in done.err
    assert not out.exists()


def test_errors_without_a_remedy_count_with_repair_too(
    rtn_llama: Path, tmp_path: Path, qserve: Callable[..., Any]
) -> None:
    broken = copy_with_scale(rtn_llama, tmp_path / "broken", torch.nan)
    out = tmp_path / "out"
    done = qserve("inspect", broken, "--repair", out)
    assert done.code == ExitCode.MODEL
    assert "nothing can be mended: no copy is written" in done.err
    assert not out.exists()


def test_engines_without_rules_and_gguf_are_usage_errors(
    rtn_llama: Path, tmp_path: Path, qserve: Callable[..., Any]
) -> None:
    for engines in ("ollama", ""):
        assert qserve("inspect", rtn_llama, "--for", engines).code == ExitCode.USAGE
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    assert qserve("inspect", tmp_path / "a.gguf", "--check").code == ExitCode.USAGE
