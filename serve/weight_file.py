"""Packed weights in one file, in the layout of the kernels: written once, then only read."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import weakref
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qserve.kernels.native_weight import NativeWeight, checksum

MAGIC = b"qswgt\x00\r\n"  # no text, and not the same after a transfer that changes line ends
FORMAT = 1
ALIGNMENT = 64  # of weights: a cache line
HEAD = struct.Struct("<8sIIQQ")  # magic, format, CRC-32 and bytes of the index, bytes of the file

Facts = Mapping[str, Any]
Layers = Mapping[str, list[NativeWeight]]


class UnusableFile(Exception):
    """A file that does not hold packed weights, or not whole ones. The message says what is wrong
    with it."""


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One packed weight: ``nbytes`` for ``NativeWeight(kind, sizes)``.

    offset: from the first weight, which lies behind the index on a boundary of 64 bytes.
    """

    kind: str
    sizes: tuple[int, ...]
    offset: int
    nbytes: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Index:
    """What a file says of itself.

    facts: from whom wrote it. layers: the weights of each layer. start: where the first one lies.
    """

    start: int
    facts: Facts
    layers: Mapping[str, tuple[StoredWeight, ...]]


def read_index(file: BinaryIO) -> Index:
    """The index of a file, from its beginning alone. Raises ``UnusableFile`` or ``OSError``."""
    head = file.read(HEAD.size)
    if len(head) < HEAD.size or not head.startswith(MAGIC):
        raise UnusableFile("it is not a file of packed weights")
    _, version, expected_crc, index_bytes, file_bytes = HEAD.unpack(head)
    if version != FORMAT:
        raise UnusableFile(f"it has format {version}, this is qserve with format {FORMAT}")
    if os.fstat(file.fileno()).st_size != file_bytes:
        raise UnusableFile("it is not whole")
    content = file.read(index_bytes)
    if len(content) != index_bytes or zlib.crc32(content) != expected_crc:
        raise UnusableFile("its index is damaged")
    index = json.loads(content)
    layers = {
        name: tuple(StoredWeight(**{**entry, "sizes": tuple(entry["sizes"])}) for entry in entries)
        for name, entries in index["layers"].items()
    }
    return Index(_round_up(HEAD.size + index_bytes), index["facts"], layers)


class WeightFile:
    """A file of packed weights, open as long as this lives: who replaces or removes it meanwhile
    does not disturb."""

    def __init__(self, path: Path) -> None:
        """Raises ``UnusableFile`` for a file that is damaged, ``OSError`` for none."""
        self._file = path.open("rb")
        weakref.finalize(self, self._file.close)
        self.index = read_index(self._file)

    def read(self, layer: str) -> list[NativeWeight]:
        """The weights of a layer, in memory of their own.

        Raises ``UnusableFile`` when their bytes are not those that were written, ``OSError`` when
        they cannot be read, ``KeyError`` for a layer that is not there.
        """
        return [self._read(layer, stored) for stored in self.index.layers[layer]]

    def _read(self, layer: str, stored: StoredWeight) -> NativeWeight:
        weight = NativeWeight(stored.kind, stored.sizes)
        if weight.nbytes != stored.nbytes:
            raise UnusableFile(f"{layer} is damaged")
        address = weight.allocate()
        self._file.seek(self.index.start + stored.offset)
        num_read = self._file.readinto((ctypes.c_char * stored.nbytes).from_address(address))
        if num_read != stored.nbytes or checksum(address, stored.nbytes) != stored.checksum:
            raise UnusableFile(f"{layer} is damaged")
        return weight


def write_weights(file: BinaryIO, facts: Facts, layers: Layers) -> None:
    """Writes ``layers`` to an empty file, with ``facts``, which are JSON. Raises ``OSError``."""
    placed: dict[str, list[dict[str, Any]]] = {}
    end = 0
    for name, weights in layers.items():
        placed[name] = []
        for weight in weights:
            placed[name].append(asdict(_describe(weight, end)))
            end += _round_up(weight.nbytes)
    index = json.dumps({"facts": facts, "layers": placed}).encode()
    start = _round_up(HEAD.size + len(index))
    file.write(HEAD.pack(MAGIC, FORMAT, zlib.crc32(index), len(index), start + end))
    file.write(index)
    file.seek(start)
    for weight in (weight for weights in layers.values() for weight in weights):
        file.write((ctypes.c_char * weight.nbytes).from_address(weight.address))
        file.seek(_round_up(weight.nbytes) - weight.nbytes, os.SEEK_CUR)
    file.truncate(start + end)


def _describe(weight: NativeWeight, offset: int) -> StoredWeight:
    digest = checksum(weight.address, weight.nbytes)
    return StoredWeight(weight.kind, weight.sizes, offset, weight.nbytes, digest)


def _round_up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
