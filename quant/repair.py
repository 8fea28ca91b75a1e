"""Writes the mended copy of a checkpoint that the findings of a check ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from qserve.quant.checking import check_checkpoint
from qserve.quant.errors import CheckpointError
from qserve.quant.findings import Finding, Severity
from qserve.quant.formats.checkpoint import SIDE_FILES, Checkpoint
from qserve.quant.formats.shard_writer import ShardWriter
from qserve.quant.model_files import copy_files, write_config
from qserve.quant.options import DEFAULT_SHARD_BYTES


def repair(checkpoint: Checkpoint, findings: Sequence[Finding], out: Path) -> list[Finding]:
    """Write the checkpoint with every remedy applied into the existing, empty folder ``out``.

    Returns what is still worth a warning afterwards. Raises ``CheckpointError`` when an error has
    no remedy, or when one is left in the result.
    """
    hopeless = [one for one in findings if one.severity is Severity.ERROR and one.remedy is None]
    if hopeless:
        raise CheckpointError(f"{hopeless[0].where} cannot be mended: {hopeless[0].problem}")
    remedies = [finding.remedy for finding in findings if finding.remedy is not None]
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    dropped: set[str] = set()
    block = dict(checkpoint.quantization_config or {})
    for remedy in remedies:
        changes |= remedy.tensors
        dropped |= remedy.dropped
        block |= remedy.config
    with ShardWriter(out, DEFAULT_SHARD_BYTES) as files:
        for name in checkpoint:
            if name not in dropped:
                tensor = checkpoint.tensor(name)
                files.add(name, changes[name](tensor) if name in changes else tensor)
        files.finish()
    side_file = next((name for name in SIDE_FILES if (checkpoint.folder / name).is_file()), None)
    dtype = checkpoint.config.get("torch_dtype") or checkpoint.config.get("dtype") or "float16"
    write_config(out, checkpoint.config, block or None, dtype=str(dtype), side_file=side_file)
    copy_files(checkpoint.folder, out)
    _, left = check_checkpoint(out)
    errors = [finding for finding in left if finding.severity is Severity.ERROR]
    if errors:
        raise CheckpointError(f"{errors[0].where} stays broken: {errors[0].problem}")
    return left
