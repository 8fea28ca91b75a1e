"""Tensors one after the other in a file of their own, until it is known which shard takes them."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float64: "F64",
}
"""What safetensors calls the types of torch."""

WIDTHS = {name: dtype.itemsize for dtype, name in DTYPES.items()}

BYTES_AT_ONCE = 1 << 22


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: its safetensors type and shape, and where its bytes are in the part."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Part:
    """A finished file of tensors. crc: of its bytes, which tells a damaged file."""

    file_name: str
    entries: tuple[Entry, ...]
    crc: int

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.entries)

    def is_whole(self, folder: Path) -> bool:
        """Whether the file is in ``folder`` as it was written."""
        path = folder / self.file_name
        return path.is_file() and checksum(path) == self.crc


class PartWriter:
    """Writes a part; the file has its name only when it is complete and on the disk.

    A context manager: what was not finished is removed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = AtomicFile(path)
        self._entries: list[Entry] = []

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor."""
        self.add_pieces(name, tensor.dtype, tensor.shape, [tensor])

    def add_pieces(
        self,
        name: str,
        dtype: torch.dtype,
        shape: Iterable[int],
        pieces: Iterable[torch.Tensor],
    ) -> None:
        """Append a tensor that comes in pieces along its first dimension, each of ``dtype``."""
        start = self._file.num_bytes
        for piece in pieces:
            assert piece.dtype is dtype
            self._file.write(piece)
        size = self._file.num_bytes - start
        entry = Entry(name, DTYPES[dtype], tuple(shape), start, size)
        assert size == torch.Size(entry.shape).numel() * dtype.itemsize
        self._entries.append(entry)

    def finish(self) -> Part:
        """Give the file its name."""
        crc = self._file.finish()
        return Part(self._path.name, tuple(self._entries), crc)

    def discard(self) -> None:
        """Remove the file unless it is finished."""
        self._file.discard()


class AtomicFile:
    """A file that appears under its name when ``finish`` has flushed it to the disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._hidden = path.with_name(path.name + ".unfinished")
        self._file = self._hidden.open("wb")
        self._crc = 0
        self.num_bytes = 0

    def write(self, content: torch.Tensor | bytes) -> None:
        """Append bytes, or those of a tensor."""
        if isinstance(content, torch.Tensor):
            flat = content.detach().contiguous().view(-1).view(torch.uint8)
            view = flat.numpy().data
        else:
            view = memoryview(content)
        self._crc = zlib.crc32(view, self._crc)
        self._file.write(view)
        self.num_bytes += len(view)

    def finish(self) -> int:
        """Flush and rename; the CRC-32 of the content."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._hidden.replace(self._path)
        return self._crc

    def discard(self) -> None:
        """Remove what was not finished."""
        self._file.close()
        self._hidden.unlink(missing_ok=True)


def checksum(path: Path) -> int:
    """The CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(BYTES_AT_ONCE):
            crc = zlib.crc32(piece, crc)
    return crc
