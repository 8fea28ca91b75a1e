"""Writes the tensors of a checkpoint to safetensors files, several when one grew too large."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from qserve.quant.formats.checkpoint import INDEX

SINGLE = "model.safetensors"


class ShardWriter:
    """Takes tensors one after the other and keeps at most one file's worth of them in memory.

    The files have their final names only after ``finish``: the number of files is part of them.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._files: list[tuple[Path, list[str]]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, now or with the next ones. A name may come once."""
        assert name not in self._pending and all(name not in names for _, names in self._files)
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_shard_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous()
        self._pending_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is pending, name the files, and write the index when there are several."""
        self._flush()
        if len(self._files) == 1:
            self._files[0][0].rename(self._folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for number, (path, names) in enumerate(self._files, 1):
            final = f"model-{number:05d}-of-{len(self._files):05d}.safetensors"
            path.rename(self._folder / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _flush(self) -> None:
        path = self._folder / f"shard-{len(self._files) + 1}.safetensors"
        save_file(self._pending, path, metadata={"format": "pt"})
        self._files.append((path, list(self._pending)))
        self._pending = {}
        self._pending_bytes = 0
