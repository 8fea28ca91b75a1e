"""A checkpoint folder on disk: its config, and tensors read one at a time from mapped files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qserve.kernels.activations import Activations
from qserve.quant.errors import CheckpointError
from qserve.quant.formats.compressed_schemes import KvCacheScheme, read_kv_cache
from qserve.quant.formats.layer_format import Format, PackedLayer, QuantizedWeight, StoredTensor
from qserve.quant.formats.registry import read_format

SINGLE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<total>\d{5})\.safetensors")
POINTER_START = b"version https://git-lfs"
QUANTIZED_LINEAR_MARKS = (
    ".qweight",
    ".weight_packed",
    ".weight_scale",
    ".weight_scale_inv",
    ".SCB",
    ".weight.quant_map",
)
SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where AutoGPTQ and AutoAWQ described the quantization before ``config.json`` did, and theirs."""


class Checkpoint:
    """Reads a Hugging Face folder of safetensors. Nothing is loaded until a tensor is asked for.

    trust_index: False finds the files as if there were no index.
    Raises ``CheckpointError`` for a missing folder, a folder that is not a model, a damaged file
    or index; every property and method may, since files are opened when they are needed.
    """

    def __init__(self, folder: Path, *, trust_index: bool = True) -> None:
        self.folder = folder
        self._trust_index = trust_index
        if not folder.exists():
            raise CheckpointError(
                f"{folder} does not exist: give a model folder, a hub id or a .gguf file"
            )
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is a file: expected a model folder with config.json")
        self.config: dict[str, Any] = read_object(folder, "config.json")
        self._files: dict[Path, Any] = {}

    @property
    def architecture(self) -> str:
        """The class name in ``config.json``, such as ``LlamaForCausalLM``."""
        names = self.config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise CheckpointError(
                f"{self.folder / 'config.json'} names no architecture: it is not a language model"
            )
        return names[0]

    @cached_property
    def quantization_config(self) -> dict[str, Any] | None:
        """The ``quantization_config`` block, or a side file's; None for a float checkpoint."""
        block = self.config.get("quantization_config")
        if block is not None and not isinstance(block, dict):
            raise CheckpointError(
                f"{self.folder / 'config.json'}: quantization_config holds "
                f"{type(block).__name__}, expected an object"
            )
        for name, method in SIDE_FILES.items():
            if block is None and (self.folder / name).is_file():
                block = {"quant_method": method, **read_object(self.folder, name)}
        return block

    @cached_property
    def tensor_files(self) -> dict[str, Path]:
        """Tensor name -> the safetensors file that holds it, in file order."""
        weight_map = read_weight_map(self.folder) if self._trust_index else {}
        found: dict[str, Path] = {}
        for path in list_weight_files(self.folder, weight_map):
            for name in self._open(path).keys():  # noqa: SIM118  (not a dict)
                if name in found:
                    raise CheckpointError(
                        f"{name} is in both {found[name].name} and {path.name} of {self.folder}: "
                        "keep one of them"
                    )
                found[name] = path
        for name, file_name in weight_map.items():
            if name not in found or found[name].name != file_name:
                raise CheckpointError(
                    f"{self.folder}: {INDEX} says that {file_name} holds {name}, and it does not: "
                    "the files belong to different versions, fetch them again"
                )
        return found

    def unmap(self) -> None:
        """Let go of the mapped files: what has been read of them counts as memory until then.

        They are opened again when something is read, and tensors that were given stay what they
        are, so it is a matter of memory alone.
        """
        self._files.clear()

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(path, "pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(explain_unreadable(path, error)) from None
        return self._files[path]

    def __contains__(self, name: str) -> bool:
        return name in self.tensor_files

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensor_files)

    def _file_of(self, name: str) -> Any:
        if name not in self.tensor_files:
            raise CheckpointError(
                f"{self.folder} has no tensor {name}: the checkpoint is incomplete"
            )
        return self._open(self.tensor_files[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        return tuple(self._file_of(name).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The safetensors dtype of a tensor, such as ``BF16`` or ``I32``, from the header alone."""
        return str(self._file_of(name).get_slice(name).get_dtype())

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in its stored dtype."""
        try:
            value: torch.Tensor = self._file_of(name).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{name} cannot be read from {self.tensor_files[name]}: {error}"
            ) from None
        return value

    @cached_property
    def format(self) -> Format | None:
        """How the linear layers are packed; None for a float checkpoint.

        Raises ``UnsupportedModelError`` for a quantization that is not read.
        """
        block = self.quantization_config
        if block is not None:
            return read_format(block, str(self.folder))
        marked = [name for name in self if name.endswith(QUANTIZED_LINEAR_MARKS)]
        if marked:
            raise CheckpointError(
                f"{self.folder} holds packed tensors ({marked[0]}), but its config.json has no "
                "quantization_config: fetch the config.json that belongs to the weights"
            )
        return None

    @property
    def method(self) -> str | None:
        """What the configuration calls the format, such as ``awq``; None for a float checkpoint."""
        return None if self.format is None else self.format.name

    @property
    def activations(self) -> Activations | None:
        """The activations that the checkpoint was made for; None when it leaves them open."""
        return None if self.format is None else self.format.activations

    @property
    def kv_cache(self) -> KvCacheScheme | None:
        """The key-value scales that the checkpoint states, None for none."""
        block = self.quantization_config
        return None if block is None else read_kv_cache(block)

    @cached_property
    def modules(self) -> dict[str, tuple[str, ...]]:
        """Module name -> the rest of the names of its tensors, such as ``weight`` and ``bias``."""
        keys = () if self.format is None else self.format.keys
        modules: dict[str, tuple[str, ...]] = {}
        for name in self:
            ends = [key for key in keys if name.endswith(f".{key}")]
            end = max(ends, key=len, default=name.rpartition(".")[2])
            module = name.removesuffix(end).removesuffix(".")
            modules[module] = (*modules.get(module, ()), end)
        return modules

    def describe(self, name: str) -> PackedLayer | None:
        """Layer ``name`` by the headers of its tensors; None when it is not packed."""
        return None if self.format is None else self.format.describe(name, self._stored(name))

    def linear(self, name: str) -> QuantizedWeight | torch.Tensor:
        """The weight of linear layer ``name`` (no ``.weight``).

        Codes in neutral form where the checkpoint has them, else the float tensor ``[N, K]``.
        """
        if self.format is not None and self.describe(name) is not None:
            return self.format.read(name, self._stored(name))
        return self.tensor(f"{name}.weight")

    def _stored(self, layer: str) -> dict[str, StoredTensor]:
        """What there is of the tensors of a packed layer."""
        assert self.format is not None
        names = {key: f"{layer}.{key}" for key in self.format.keys}
        return {
            key: StoredTensor(self.shape(name), self.dtype(name), partial(self.tensor, name))
            for key, name in names.items()
            if name in self
        }


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """The JSON object in file ``name`` of a model folder. Raises ``CheckpointError`` otherwise."""
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{folder} is not a model folder: it has no {name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): the file is damaged") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}, expected an object")
    return content


def read_weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name as the index says it; empty for a folder without an index.

    Raises ``CheckpointError`` for a damaged index, one that points out of the folder, or one
    beside a ``model.safetensors`` that it does not name (readers disagree on which one counts).
    """
    path = folder / INDEX
    if not path.is_file():
        return {}
    weight_map = read_object(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map: the index is damaged, fetch it again")
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{path} places {name} in {file_name!r}, expected the name of a file in the same "
                "folder: the index is damaged, fetch it again"
            )
    if (folder / SINGLE_FILE).is_file() and SINGLE_FILE not in weight_map.values():
        raise CheckpointError(
            f"{folder} holds {SINGLE_FILE} beside the files that {INDEX} names: it is not clear "
            "which of them is the model, remove one"
        )
    return weight_map


def list_weight_files(folder: Path, weight_map: dict[str, str]) -> list[Path]:
    """The safetensors files that make up the model, sorted.

    Those that the index names; without one ``model.safetensors``; without that all of them.
    Raises ``CheckpointError`` when there is none or when one of a numbered set is missing.
    """
    if weight_map:
        names = set(weight_map.values())
        told_by = INDEX
    elif (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    else:
        names = {path.name for path in folder.glob("*.safetensors")}
        told_by = "the names of the other files"
        for match in filter(None, map(SHARD_NAME.fullmatch, sorted(names))):
            total = match["total"]
            names |= {
                f"{match['stem']}-{i:05d}-of-{total}.safetensors" for i in range(1, int(total) + 1)
            }
    if not names:
        raise CheckpointError(
            f"{folder} holds no .safetensors file: convert the checkpoint to safetensors"
        )
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
        raise CheckpointError(
            f"{folder} lacks {listed} (known from {told_by}): fetch the model again"
        )
    return sorted(folder / name for name in names)


def explain_unreadable(path: Path, error: Exception) -> str:
    """One line on why a safetensors file cannot be opened, in plain words where we know them."""
    try:
        with path.open("rb") as file:
            start = file.read(len(POINTER_START))
    except OSError as refused:
        return f"{path} cannot be read: {refused.strerror}"
    if start == POINTER_START:
        return f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder"
    if not start:
        return f"{path} is empty: fetch it again"
    detail = str(error).removeprefix("Error while deserializing header: ")
    return f"{path} is not a whole safetensors file ({detail}): it is truncated or damaged"
