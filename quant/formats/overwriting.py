"""New values in the place of old ones: tensors of a safetensors file that keep shape and type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.layer_format import DTYPES

LENGTH_BYTES = 8


def overwrite_tensors(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace tensors of a checkpoint folder by name, and leave every other byte as it is.

    A reader must not have the folder open meanwhile: this is for a folder that is not published
    yet. Raises ``CheckpointError`` for a folder that cannot be read, ``ValueError`` for a tensor
    that is not there with the same shape and type.
    """
    places = Checkpoint(folder).tensor_files
    by_file: dict[Path, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name not in places:
            raise ValueError(f"{folder} has no tensor {name} to overwrite")
        by_file.setdefault(places[name], {})[name] = tensor
    for path, own in by_file.items():
        _overwrite(path, own)


def _overwrite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        for name, tensor in tensors.items():
            entry = header[name]
            if entry["dtype"] != DTYPES[tensor.dtype] or entry["shape"] != list(tensor.shape):
                raise ValueError(
                    f"{name} is {entry['dtype']} {entry['shape']}, cannot become "
                    f"{DTYPES[tensor.dtype]} {list(tensor.shape)}"
                )
            file.seek(LENGTH_BYTES + length + entry["data_offsets"][0])
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
