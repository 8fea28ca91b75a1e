"""The user's cache of packed weights: a checkpoint is repacked once, and read from then on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qserve.kernels.native import extension
from qserve.kernels.native_weight import NativeWeight
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.serve.cache_folder import SUFFIX, make_room, replacing
from qserve.serve.weight_file import UnusableFile, WeightFile, write_weights

DISTRIBUTION = "qserve-llm"
NUM_SAMPLES = 16
SAMPLE_BYTES = 4096
HEADER_LENGTH_BYTES = 8  # of a safetensors file, before its JSON header

logger = logging.getLogger(__name__)


class WeightCache:
    """The packed weights of one checkpoint, layer by layer.

    What a file lacks, because it is missing, damaged, of other weights or of another build of
    qserve, is packed by the caller and kept with ``put``; ``save`` writes it. Whatever goes wrong
    with files here is logged, and the weights are packed as if there were no cache.
    """

    def __init__(self, folder: Path, checkpoint: Checkpoint, options: dict[str, str]) -> None:
        """folder: need not exist. options: what the layout depends on beside the checkpoint."""
        self._facts = {
            "model": str(checkpoint.folder.resolve()),
            "options": options,
            "weights": identify_checkpoint(checkpoint),
            "build": identify_build(),
        }
        place = json.dumps([self._facts["model"], options], sort_keys=True)
        digest = hashlib.sha256(place.encode()).hexdigest()[:16]
        self.path = folder / f"{checkpoint.folder.resolve().name}-{digest}{SUFFIX}"
        self._layers: dict[str, list[NativeWeight]] = {}
        self._file: WeightFile | None = None
        try:
            self._file = self._open()
        except FileNotFoundError:
            logger.debug("there is no %s yet", self.path)
        except (UnusableFile, OSError) as error:
            self._warn(error)

    def get(self, layer: str) -> list[NativeWeight] | None:
        """The weights of a layer, ready for products, or None when they must be packed."""
        if self._file is None or layer not in self._file.index.layers:
            return None
        try:
            weights = self._file.read(layer)
        except (UnusableFile, OSError) as error:
            self._warn(error)
            self._file = None
            return None
        self._layers[layer] = weights
        return weights

    def put(self, layer: str, weights: list[NativeWeight]) -> None:
        """Keep weights that ``get`` did not give."""
        self._layers[layer] = weights

    def save(self) -> None:
        """Write the layers unless the file holds them all; call when the last one was put."""
        if not self._layers:
            return
        if self._file is not None and self._layers.keys() <= self._file.index.layers.keys():
            return
        nbytes = sum(weight.nbytes for weights in self._layers.values() for weight in weights)
        try:
            make_room(self.path, nbytes)
            with replacing(self.path) as file:
                write_weights(file, self._facts, self._layers)
        except BlockingIOError:
            logger.info("%s is being written by another process", self.path)
        except OSError as error:
            reason = error.strerror or str(error)
            logger.warning("packed weights are not kept in %s: %s", self.path.parent, reason)
        else:
            logger.info("packed weights, %d MiB, are kept in %s", nbytes >> 20, self.path)

    def _open(self) -> WeightFile:
        file = WeightFile(self.path)
        found = file.index.facts
        if found.get("build") != self._facts["build"]:
            raise UnusableFile("another build of qserve wrote them")
        if found != self._facts:
            raise UnusableFile("the checkpoint has changed")
        with suppress(OSError):  # of somebody else: only they can say when it was used
            os.utime(self.path)
        return file

    def _warn(self, error: UnusableFile | OSError) -> None:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        logger.warning("packed weights in %s are made again: %s", self.path, reason)


def identify_build() -> dict[str, str]:
    """What the bytes of a layout depend on beside the weights: the code that makes them."""
    library = Path(extension().__file__).read_bytes()
    return {"version": version(DISTRIBUTION), "library": hashlib.sha256(library).hexdigest()}


def identify_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """What changes when the weights do, without reading them all.

    Of every file the size, the time of the last change, and a hash of its header and of samples
    spread over it: other weights of the same shapes are seen even where times are not kept.
    """
    config = json.dumps(checkpoint.config, sort_keys=True)
    found: dict[str, Any] = {"config": hashlib.sha256(config.encode()).hexdigest()}
    for path in sorted(set(checkpoint.tensor_files.values())):
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            length = file.read(HEADER_LENGTH_BYTES)
            digest = hashlib.sha256(file.read(int.from_bytes(length, "little")))
            for i in range(NUM_SAMPLES):
                file.seek(max(0, status.st_size - SAMPLE_BYTES) * i // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
        found[path.name] = [status.st_size, status.st_mtime_ns, digest.hexdigest()]
    return found
