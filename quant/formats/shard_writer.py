"""Puts tensors into safetensors files, several when one grew too large, and holds none of them."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from qserve.quant.formats.checkpoint import INDEX
from qserve.quant.formats.tensor_part import WIDTHS, Entry, Part, PartWriter

SINGLE = "model.safetensors"
HEADER_ALIGNMENT = 8

Place = tuple[Path, Entry]
"""A tensor and the file it is in."""


class ShardWriter:
    """Takes tensors one after the other and writes each of them at once.

    They wait in a file of their own in the folder: which shard a tensor belongs to, and the names
    of the shards, are known only after the last one. A context manager; ``finish`` makes the files.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self._folder = folder
        self._max_shard_bytes = max_shard_bytes
        self._waiting = PartWriter(folder / "waiting.tensors")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._waiting.discard()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor. A name may come once."""
        self._waiting.add(name, tensor)

    def finish(self) -> None:
        """Make the shards, and the index when there are several."""
        part = self._waiting.finish()
        assemble([part], self._folder, self._folder, self._max_shard_bytes)
        (self._folder / part.file_name).unlink()


def assemble(parts: Sequence[Part], source: Path, out: Path, max_shard_bytes: int) -> int:
    """Copy the tensors of the parts in ``source`` into safetensors files in ``out``.

    A new file is begun when the next tensor would make it larger than ``max_shard_bytes``. The
    system copies the bytes: they do not pass through this process. Returns the tensors' bytes.
    """
    shards = _split([(source / p.file_name, e) for p in parts for e in p.entries], max_shard_bytes)
    total = sum(part.num_bytes for part in parts)
    if len(shards) == 1:
        _write_shard(out / SINGLE, shards[0])
        return total
    weight_map: dict[str, str] = {}
    for number, places in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(out / name, places)
        weight_map |= {entry.name: name for _, entry in places}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _split(places: Sequence[Place], max_shard_bytes: int) -> list[list[Place]]:
    shards: list[list[Place]] = [[]]
    size = 0
    for place in places:
        if shards[-1] and size + place[1].num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(place)
        size += place[1].num_bytes
    return shards


def _write_shard(path: Path, places: Sequence[Place]) -> None:
    """One safetensors file: the widest types first, so that every tensor is aligned to its own."""
    ordered = sorted(places, key=lambda place: (-WIDTHS[place[1].dtype], place[1].name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for _, entry in ordered:
        begin, end = end, end + entry.num_bytes
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": (begin, end),
        }
    assert len(header) == len(ordered) + 1, "a name may come once"
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        for source, entry in ordered:
            with source.open("rb") as waiting:
                _copy(waiting.fileno(), file.fileno(), entry)


def _copy(source: int, target: int, entry: Entry) -> None:
    position, left = entry.start, entry.num_bytes
    while left:
        copied = os.sendfile(target, source, position, left)
        if not copied:
            raise OSError(f"the file that holds {entry.name} ends before it")
        position, left = position + copied, left - copied
