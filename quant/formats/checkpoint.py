"""A checkpoint folder on disk: its config, and its tensors read one at a time from mapped files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.errors import CheckpointError, UnsupportedModelError
from qserve.quant.formats import awq

INDEX = "model.safetensors.index.json"
QUANTIZED_LINEAR_MARKS = (
    ".qweight",
    ".weight_packed",
    ".weight_scale",
    ".SCB",
    ".weight.quant_map",
)


class Checkpoint:
    """Reads a Hugging Face folder of safetensors. Nothing is loaded until a tensor is asked for.

    Raises ``CheckpointError`` for a missing folder, one that is no model, a damaged file or index.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.exists():
            raise CheckpointError(
                f"{folder} does not exist: give a model folder, a hub id or a .gguf file"
            )
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is a file: expected a model folder with config.json")
        self.config: dict[str, Any] = self._read_json("config.json")
        self._files: dict[str, Any] = {}

    def _read_json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        if not path.is_file():
            raise CheckpointError(f"{self.folder} is not a model folder: it has no {name}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise CheckpointError(
                f"{path} is not valid JSON ({error}): the file is damaged"
            ) from None
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} holds {type(content).__name__}, expected an object")
        return content

    @property
    def architecture(self) -> str:
        """The class name in ``config.json``, such as ``LlamaForCausalLM``."""
        names = self.config.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise CheckpointError(
                f"{self.folder / 'config.json'} names no architecture: it is not a language model"
            )
        return names[0]

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """The ``quantization_config`` block, None for a float checkpoint."""
        block = self.config.get("quantization_config")
        if block is not None and not isinstance(block, dict):
            raise CheckpointError(
                f"quantization_config holds {type(block).__name__}, expected an object"
            )
        return block

    @cached_property
    def tensor_files(self) -> dict[str, Path]:
        """Tensor name -> the safetensors file that holds it, in file order."""
        index = self.folder / INDEX
        paths = sorted(self.folder.glob("*.safetensors"))
        if index.is_file():
            weight_map = self._read_json(INDEX).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{index} has no weight_map: the index is damaged")
            missing = sorted(
                {name for name in weight_map.values() if not (self.folder / name).is_file()}
            )
            if missing:
                raise CheckpointError(
                    f"{self.folder} lacks {', '.join(missing)}, named in {INDEX}: fetch it again"
                )
            paths = sorted({self.folder / name for name in weight_map.values()})
        if not paths:
            raise CheckpointError(
                f"{self.folder} holds no .safetensors file: convert the checkpoint to safetensors"
            )
        found: dict[str, Path] = {}
        for path in paths:
            for name in self._open(path).keys():  # noqa: SIM118  (not a dict)
                if name in found:
                    raise CheckpointError(
                        f"{name} is in both {found[name].name} and {path.name}: keep one of them"
                    )
                found[name] = path
        return found

    def _open(self, path: Path) -> Any:
        if path.name not in self._files:
            try:
                self._files[path.name] = safe_open(path, "pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} cannot be read ({error}): the file is truncated or damaged"
                ) from None
        return self._files[path.name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensor_files

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensor_files)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The safetensors dtype of a tensor, such as ``BF16`` or ``I32``."""
        return str(self._slice(name).get_dtype())

    def _slice(self, name: str) -> Any:
        if name not in self.tensor_files:
            raise CheckpointError(
                f"{self.folder} has no tensor {name}: the checkpoint is incomplete"
            )
        return self._open(self.tensor_files[name]).get_slice(name)

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, in its stored dtype."""
        if name not in self.tensor_files:
            raise CheckpointError(
                f"{self.folder} has no tensor {name}: the checkpoint is incomplete"
            )
        try:
            value: torch.Tensor = self._open(self.tensor_files[name]).get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{name} cannot be read from {self.tensor_files[name]}: {error}"
            ) from None
        return value

    @cached_property
    def method(self) -> str | None:
        """``awq`` for a checkpoint we can read packed, None for a float one.

        Raises ``UnsupportedModelError`` for any other.
        """
        block = self.quantization_config
        if block is None:
            marked = [name for name in self if name.endswith(QUANTIZED_LINEAR_MARKS)]
            if marked:
                raise CheckpointError(
                    f"{self.folder} holds packed tensors ({marked[0]}) but config.json has no "
                    "quantization_config: the config is not the one they were written with"
                )
            return None
        method = block.get("quant_method")
        if method != "awq":
            raise UnsupportedModelError(
                f"{self.folder} is quantized with {method!r}: float and AWQ (gemm) checkpoints "
                "can be read"
            )
        return "awq"

    def linear(self, name: str) -> GroupedWeight | torch.Tensor:
        """The weight of layer ``name`` (no ``.weight``): packed codes, or a float ``[N, K]``."""
        if self.method == "awq" and f"{name}.qweight" in self:
            assert self.quantization_config is not None
            group_size = awq.group_size_from(self.quantization_config)
            tensors = {
                key: self.tensor(f"{name}.{key}") for key in awq.TENSORS if f"{name}.{key}" in self
            }
            return awq.unpack(tensors, group_size, name)
        return self.tensor(f"{name}.weight")
