"""Where a model comes from: folders, GGUF files and the hub."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub_errors
from transformers import AutoTokenizer

from qserve.quant.errors import CheckpointError, OutputError, UnsupportedModelError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.gguf_inspection import inspect_gguf
from qserve.quant.source import resolve_model

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}
HALVED_ROTATION = {"attn_q": 4, "attn_k": 2}  # heads of the layers whose rows ggml reorders


def ggml_name(name: str) -> str:
    """The name that llama.cpp gives a tensor of a Llama."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def ggml_rows(name: str, values: np.ndarray) -> np.ndarray:
    """ggml pairs neighbours in its rotation, transformers the two halves of a head."""
    for part, num_heads in HALVED_ROTATION.items():
        if part in name:
            return (
                values.reshape(num_heads, 2, -1, values.shape[1])
                .swapaxes(1, 2)
                .reshape(values.shape)
            )
    return values


def write_gguf(path: Path, model: Path, extra: Callable[[gguf.GGUFWriter], None]) -> Path:
    """The tiny model as llama.cpp's converter would write it in float32, and ``extra`` fields."""
    checkpoint = Checkpoint(model)
    config = checkpoint.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    bpe = json.loads((model / "tokenizer.json").read_text())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(sorted(bpe["vocab"], key=bpe["vocab"].__getitem__))
    writer.add_token_types([3, 3, 3] + [1] * (len(bpe["vocab"]) - 3))
    writer.add_token_merges([" ".join(pair) for pair in bpe["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    extra(writer)
    for name in checkpoint:
        values = checkpoint.tensor(name).float().numpy()
        writer.add_tensor(ggml_name(name), ggml_rows(ggml_name(name), values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a GGUF file."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, tiny_llama, lambda writer: None)


def test_folder_is_taken_as_it_is(tiny_llama: Path, tmp_path: Path) -> None:
    assert resolve_model(str(tiny_llama), cache=tmp_path).folder == tiny_llama
    assert list(tmp_path.iterdir()) == []


def test_gguf_file_is_imported_once_and_in_silence(
    tiny_llama: Path, tiny_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    notices: list[str] = []
    first = resolve_model(str(tiny_gguf), cache=tmp_path, notice=notices.append)
    original = Checkpoint(tiny_llama)
    assert sorted(first) == sorted(original)
    for name in original:
        assert torch.equal(first.tensor(name), original.tensor(name)), name
    text = "What is the capital of France?"
    read, expected = (AutoTokenizer.from_pretrained(c.folder) for c in (first, original))
    assert read(text)["input_ids"] == expected(text)["input_ids"]

    again = resolve_model(str(tiny_gguf), cache=tmp_path, notice=notices.append)
    assert again.folder == first.folder
    assert first.folder.parent == tmp_path / "gguf"
    assert notices == [f"importing tiny.gguf as bfloat16 to {first.folder} (once)"]
    assert capfd.readouterr() == ("", "")


def test_gguf_content_and_not_its_name_is_the_key(tiny_gguf: Path, tmp_path: Path) -> None:
    imported = resolve_model(str(tiny_gguf), cache=tmp_path).folder
    (tmp_path / "copy.GGUF").write_bytes(tiny_gguf.read_bytes())
    assert resolve_model(str(tmp_path / "copy.GGUF"), cache=tmp_path).folder == imported


@pytest.mark.parametrize("kept", [0, 2, 20, 5_000, -100])
def test_truncated_gguf_is_refused_and_leaves_nothing(
    tiny_gguf: Path, tmp_path: Path, kept: int
) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match="cut.gguf"):
        resolve_model(str(path), cache=tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*")) == []
    with pytest.raises(CheckpointError, match="truncated"):
        inspect_gguf(path)


def test_gguf_of_another_architecture_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "unheard-of")
    writer.add_name("other")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture unheard-of is not supported"):
        resolve_model(str(tmp_path / "other.gguf"), cache=tmp_path / "cache")


def test_gguf_with_scaled_rotary_embedding_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "long.gguf", tiny_llama, lambda writer: writer.add_rope_scaling_factor(4.0)
    )
    with pytest.raises(UnsupportedModelError, match="scales its rotary embedding"):
        resolve_model(str(path), cache=tmp_path / "cache")


def test_cache_that_cannot_be_written_is_an_output_error(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(OutputError, match="leads through a file"):
        resolve_model(str(tiny_gguf), cache=tmp_path / "cache")


@pytest.mark.parametrize("model", ["nothing", "./no/model", "a/b/c", "/a/b", "a/b.gguf", ""])
def test_what_can_only_be_a_path_is_not_sought_on_the_hub(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: pytest.fail("asked"))
    with pytest.raises(CheckpointError):
        resolve_model(model, cache=tmp_path)


def test_hub_id_becomes_the_folder_of_its_snapshot(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def download(repo_id: str, **patterns: list[str]) -> str:
        asked.append(repo_id)
        assert "*.safetensors" in patterns["allow_patterns"]
        return str(tiny_llama)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("owner/tiny-1.0", cache=tmp_path).folder == tiny_llama
    assert asked == ["owner/tiny-1.0"]


REFUSED = Mock(headers={}, status_code=403)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_errors.LocalEntryNotFoundError("no route"), "the hub cannot be reached"),
        (hub_errors.RepositoryNotFoundError("404", response=REFUSED), "neither a folder here nor"),
        (hub_errors.GatedRepoError("403", response=REFUSED), "hf auth login"),
        (hub_errors.HfHubHTTPError("500", response=REFUSED), "cannot be fetched"),
    ],
)
def test_hub_that_gives_nothing_is_told_in_plain_words(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=f"owner/model.*{message}"):
        resolve_model("owner/model", cache=tmp_path)
