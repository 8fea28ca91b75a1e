"""Checkpoint folders: what is read, and how damage of every kind is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qserve.quant.errors import CheckpointError, UnsupportedModelError
from qserve.quant.formats.checkpoint import INDEX, Checkpoint

Damage = Callable[[Path], object]


def write_config(folder: Path, **fields: object) -> None:
    """A config.json that names an architecture."""
    folder.mkdir(exist_ok=True)
    content = {"architectures": ["LlamaForCausalLM"], **fields}
    (folder / "config.json").write_text(json.dumps(content))


def write_shards(folder: Path, shards: dict[str, list[str]], index: bool = True) -> Checkpoint:
    """A checkpoint of vectors: file name -> tensor names, whose values count up from zero."""
    write_config(folder)
    names = [name for tensors in shards.values() for name in tensors]
    for file_name, tensors in shards.items():
        values = {name: torch.tensor([float(names.index(name))]) for name in tensors}
        save_file(values, folder / file_name)
    if index:
        weight_map = {name: file for file, tensors in shards.items() for name in tensors}
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return Checkpoint(folder)


TWO_SHARDS = {
    "model-00001-of-00002.safetensors": ["a.weight", "b.weight"],
    "model-00002-of-00002.safetensors": ["c.weight"],
}


@pytest.mark.parametrize("index", [True, False])
def test_tensors_are_found_in_their_shards(tmp_path: Path, index: bool) -> None:
    checkpoint = write_shards(tmp_path, TWO_SHARDS, index)
    assert list(checkpoint) == ["a.weight", "b.weight", "c.weight"]
    assert [checkpoint.tensor(name).item() for name in checkpoint] == [0.0, 1.0, 2.0]
    assert checkpoint.shape("c.weight") == (1,)
    assert checkpoint.dtype("c.weight") == "F32"
    assert "d.weight" not in checkpoint


def test_mapped_files_are_let_go_and_opened_again(tmp_path: Path) -> None:
    def is_mapped() -> bool:
        return str(tmp_path / "model.safetensors") in Path("/proc/self/maps").read_text()

    model = write_shards(tmp_path, {"model.safetensors": ["a", "b"]}, index=False)
    held = model.tensor("b")
    model.unmap()
    assert is_mapped()
    assert held.tolist() == [1.0]
    del held
    assert not is_mapped()
    assert model.tensor("b").tolist() == [1.0]


def test_files_beside_the_model_are_not_read(tmp_path: Path) -> None:
    write_shards(tmp_path, {"model.safetensors": ["a"], "consolidated.safetensors": ["a"]}, False)
    assert list(Checkpoint(tmp_path)) == ["a"]


@pytest.mark.parametrize("name", ["a.weight", "linear.weight"])
def test_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    checkpoint = write_shards(tmp_path, {"model.safetensors": ["b.weight"]}, False)
    with pytest.raises(CheckpointError, match=f"no tensor {name}: the checkpoint is incomplete"):
        checkpoint.linear(name.removesuffix(".weight"))
    with pytest.raises(CheckpointError, match="incomplete"):
        checkpoint.shape(name)


def cut(path: Path, num_bytes: int) -> None:
    """Keep the first bytes of a file."""
    path.write_bytes(path.read_bytes()[:num_bytes])


def drop(*paths: Path) -> None:
    """Delete files."""
    for path in paths:
        path.unlink()


def replace_by_folder(path: Path) -> None:
    """A folder in the place of a file."""
    path.unlink()
    path.mkdir()


def edit_index(folder: Path, **changes: object) -> None:
    """Change places in the weight map; None removes a tensor from it."""
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= changes
    kept = {name: file for name, file in index["weight_map"].items() if file is not None}
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": kept}))


SECOND = "model-00002-of-00002.safetensors"
WEIGHT_DAMAGE: dict[str, tuple[Damage, str]] = {
    "empty file": (lambda f: cut(f / SECOND, 0), "is empty"),
    "truncated header": (lambda f: cut(f / SECOND, 30), "truncated or damaged"),
    "truncated data": (lambda f: cut(f / SECOND, -1), "truncated or damaged"),
    "not safetensors": (lambda f: (f / SECOND).write_text("<html>" * 99), "truncated or damaged"),
    "pointer": (
        lambda f: (f / SECOND).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "git lfs pull",
    ),
    "folder": (
        lambda f: replace_by_folder(f / SECOND),
        "lacks model-00002-of-00002.safetensors",
    ),
    "missing shard": (lambda f: drop(f / SECOND), f"lacks {SECOND}.*{INDEX}"),
    "missing shard, no index": (
        lambda f: drop(f / SECOND, f / INDEX),
        f"lacks {SECOND}",
    ),
    "index is not JSON": (lambda f: (f / INDEX).write_text("{"), "not valid JSON"),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), "holds list"),
    "index is empty": (lambda f: (f / INDEX).write_text("{}"), "no weight_map"),
    "index points elsewhere": (lambda f: edit_index(f, c="../x.safetensors"), "the same folder"),
    "index points nowhere": (lambda f: edit_index(f, c=3), "the same folder"),
    "index names a shard that is not there": (
        lambda f: edit_index(f, **{"c.weight": "model-00003-of-00003.safetensors"}),
        "lacks model-00003-of-00003",
    ),
    "index names a tensor that is not there": (
        lambda f: edit_index(f, **{"d.weight": SECOND}),
        f"{SECOND} holds d.weight, and it does not",
    ),
    "index swaps shards": (
        lambda f: edit_index(f, **{"a.weight": SECOND}),
        f"{SECOND} holds a.weight, and it does not",
    ),
    "tensor in two shards": (
        lambda f: save_file({"a.weight": torch.zeros(1)}, f / SECOND),
        "a.weight is in both",
    ),
    "two models": (
        lambda f: save_file({"a.weight": torch.zeros(1)}, f / "model.safetensors"),
        "not clear which",
    ),
    "no weights": (lambda f: drop(*f.glob("model*")), "no .safetensors"),
}


@pytest.mark.parametrize(("damage", "message"), WEIGHT_DAMAGE.values(), ids=WEIGHT_DAMAGE)
def test_damaged_weights_are_told_in_one_sentence(
    tmp_path: Path, damage: Damage, message: str
) -> None:
    write_shards(tmp_path, TWO_SHARDS)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint(tmp_path).tensor("c.weight")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "holds list, expected an object"),
        (b"{}", "names no architecture"),
        (b'{"architectures": []}', "names no architecture"),
        (b'{"architectures": "LlamaForCausalLM"}', "names no architecture"),
        (b'{"architectures": [null]}', "names no architecture"),
    ],
)
def test_damaged_config_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path).architecture  # noqa: B018  (read for what it raises)


def test_folder_without_a_config_is_not_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a model folder: it has no config.json"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        Checkpoint(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        Checkpoint(tmp_path / "file")


@pytest.mark.parametrize(
    ("block", "error", "message"),
    [
        ("awq", CheckpointError, "holds str, expected an object"),
        ({"quant_method": "modelopt"}, UnsupportedModelError, "quantized with 'modelopt'"),
        ({"quant_method": "mxfp4"}, UnsupportedModelError, "quantized with 'mxfp4'"),
        ({"quant_method": 4}, UnsupportedModelError, "quantized with None"),
        ({}, UnsupportedModelError, "quantized with None"),
        ({"quant_method": "gptq"}, UnsupportedModelError, "GPTQ with None bits"),
        (
            {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"},
            UnsupportedModelError,
            "'marlin' layout",
        ),
        ({"quant_method": "compressed-tensors"}, UnsupportedModelError, "without config_groups"),
        (
            {"quant_method": "fp8", "weight_block_size": [128]},
            UnsupportedModelError,
            r"weight_block_size \[128\]",
        ),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round:mxfp8"},
            UnsupportedModelError,
            "AutoRound packed as",
        ),
        ({"quant_method": "awq", "bits": 8}, UnsupportedModelError, "8 bits"),
    ],
)
def test_other_quantizations_are_refused(
    tmp_path: Path, block: object, error: type[CheckpointError], message: str
) -> None:
    write_config(tmp_path, quantization_config=block)
    with pytest.raises(error, match=message):
        Checkpoint(tmp_path).method  # noqa: B018  (read for what it raises)


def test_packed_tensors_without_a_config_block_are_refused(tmp_path: Path) -> None:
    checkpoint = write_shards(tmp_path, {"model.safetensors": ["a.qweight"]}, False)
    with pytest.raises(CheckpointError, match=r"packed tensors \(a.qweight\).*fetch the config"):
        checkpoint.method  # noqa: B018  (read for what it raises)


def test_float_model_is_read_as_transformers_wrote_it(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path, dirs_exist_ok=True)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.method is None
    assert checkpoint.architecture == "LlamaForCausalLM"
    weight = checkpoint.linear("model.layers.1.mlp.down_proj")
    assert isinstance(weight, torch.Tensor)
    assert (weight.shape, weight.dtype) == ((64, 128), torch.bfloat16)
