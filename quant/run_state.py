"""What a run has finished, kept on the disk: the same run goes on from there after it was killed.

A folder holds, for every finished block, its tensors (``block-00003.tensors``) and a record of them
(``block-00003.json``), and for the last two the hidden states that the next block receives. Every
file gets its name when it is complete and on the disk, the record last, so a record vouches for the
rest; sizes and checksums tell what was damaged since.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from qserve.kernels import packing
from qserve.quant.documents import read_documents
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.tensor_part import AtomicFile, Part, PartWriter, checksum
from qserve.quant.formats.writer import LayerScheme
from qserve.quant.hub_data import HubDataset
from qserve.quant.options import QuantizeOptions
from qserve.quant.report import LayerReport

PACKAGES = ("qserve-llm", "torch", "transformers", "tokenizers")
"""What a result depends on, beside the model and the options."""

KEY_DIGITS = 16
HIDDEN_KEPT = 2
"""Hidden states of so many blocks: when the last ones are damaged, those before them are there."""


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """A finished block: its tensors and what the report says of it.

    schemes: of its quantized layers by full name. bfloat16: the tensors that float16 cannot hold.
    packed_bytes: of the quantized layers. hidden_crc: of the hidden states that leave the block.
    """

    part: Part
    layers: tuple[LayerReport, ...]
    error: float | None
    schemes: dict[str, LayerScheme]
    bfloat16: tuple[str, ...]
    packed_bytes: int
    hidden_crc: int | None = None


_RECORD = TypeAdapter(BlockRecord)


def run_key(source: Checkpoint, options: QuantizeOptions) -> str:
    """A name for all that a result follows from: equal keys, equal results.

    Model files count by name, size and time of change, since reading a large model takes as long
    as quantizing a part of it; a calibration file or data set by its content; then the options, the
    number of threads (which decides the order of sums), the versions of ``PACKAGES``, and our own
    code: another build may keep its state in another form, and compute something else.
    Raises ``CalibrationError`` for a calibration file that cannot be read.
    """
    files = sorted(path for path in source.folder.iterdir() if path.is_file())
    content = {
        "model": [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files],
        "options": repr(options),
        "calibration": _calibration_hash(options),
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in PACKAGES},
        "code": _code_hash(),
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:KEY_DIGITS]


def _calibration_hash(options: QuantizeOptions) -> str | None:
    source = options.calibration
    if isinstance(source, HubDataset):
        contents = [document.content for document in read_documents(source)]
        return hashlib.sha256(repr(contents).encode()).hexdigest()
    if not isinstance(source, Path) or not source.is_file():
        return None  # what is wrong with it is said where it is read
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _code_hash() -> str:
    """Of the Python files that a result depends on: this folder and the kernels."""
    digest = hashlib.sha256()
    for folder in (Path(__file__).parent, Path(packing.__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.relative_to(folder).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


class RunState:
    """The state of one run in a folder, which is made when it is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def finished(self, with_hidden: bool) -> list[BlockRecord]:
        """The blocks that need not be done again, from the first on.

        with_hidden: of use only up to a block whose hidden states are there too.
        """
        records: list[BlockRecord] = []
        while (record := self._read(len(records))) and record.part.is_whole(self.folder):
            records.append(record)
        while with_hidden and records and not self._has_hidden(len(records) - 1, records[-1]):
            records.pop()
        return records

    def part_of(self, index: int) -> PartWriter:
        """Where to write the tensors of a block."""
        return PartWriter(self.folder / f"{_name(index)}.tensors")

    def commit(self, index: int, record: BlockRecord, hidden: torch.Tensor | None) -> BlockRecord:
        """Keep a block whose part is finished, and the hidden states that leave it.

        Returns the record as it is kept.
        """
        crc = None if hidden is None else self._write(self._hidden_path(index), hidden)
        kept = replace(record, hidden_crc=crc)
        self.write_object(_name(index), _RECORD.dump_python(kept, mode="json"))
        self._hidden_path(index - HIDDEN_KEPT).unlink(missing_ok=True)
        return kept

    def load_hidden_(self, index: int, hidden: torch.Tensor) -> None:
        """Read the hidden states that leave a block into float32 memory of their shape."""
        with self._hidden_path(index).open("rb") as file:
            file.readinto(hidden.view(-1).view(torch.uint8).numpy().data)

    def write_object(self, name: str, content: object) -> None:
        """Keep plain values under a name."""
        self._write(self.folder / f"{name}.json", json.dumps(content).encode())

    def read_object(self, name: str) -> Any:
        """The values that are kept under a name; None when there are none, or not whole."""
        try:
            return json.loads((self.folder / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return None

    def _read(self, index: int) -> BlockRecord | None:
        try:
            return _RECORD.validate_python(self.read_object(_name(index)))
        except ValidationError:
            return None

    def _has_hidden(self, index: int, record: BlockRecord) -> bool:
        path = self._hidden_path(index)
        return path.is_file() and checksum(path) == record.hidden_crc

    def _hidden_path(self, index: int) -> Path:
        return self.folder / f"{_name(index)}.hidden"

    def _write(self, path: Path, content: torch.Tensor | bytes) -> int:
        file = AtomicFile(path)
        try:
            file.write(content)
            return file.finish()
        finally:
            file.discard()


def _name(index: int) -> str:
    return f"block-{index:05d}"
