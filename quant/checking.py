"""Finds mislabelled and damaged checkpoints: what loads nowhere, or computes nonsense."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from qserve.quant.errors import CheckpointError
from qserve.quant.findings import Finding, Remedy, Severity
from qserve.quant.formats.awq import AwqFormat, Layout
from qserve.quant.formats.checkpoint import (
    INDEX,
    SINGLE_FILE,
    Checkpoint,
    read_weight_map,
)
from qserve.quant.formats.fused_sets import FUSED_SETS
from qserve.quant.formats.gptq import GptqFormat
from qserve.quant.formats.layer_format import COMPUTED
from qserve.quant.gptq_checks import check_group_index, check_zero_points

SMALLEST_NORMAL = 2.0**-14
"""Of float16: scales below it lose digits."""

LEAST = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-126, torch.float32: 2.0**-126}
"""What takes the place of a scale of zero: the smallest of its type that readers keep."""

SCALES = (".scales", ".weight_scale", ".weight_scale_inv", ".SCB", ".weight.absmax")

Check = Callable[[Checkpoint], Iterator[Finding]]


def check_checkpoint(folder: Path) -> tuple[Checkpoint, list[Finding]]:
    """Everything that is wrong with the model in a folder, and the checkpoint as far as it reads.

    Raises ``CheckpointError`` for what cannot even be opened.
    """
    checkpoint, findings = _open(folder)
    for check in CHECKS:
        findings += check(checkpoint)
    return checkpoint, findings


def _open(folder: Path) -> tuple[Checkpoint, list[Finding]]:
    checkpoint = Checkpoint(folder)
    try:
        checkpoint.tensor_files  # noqa: B018  (read for what it raises)
    except CheckpointError as error:
        if not _is_index_to_blame(folder):
            raise
        remedy = Remedy("write the tensors that are there with an index of their own")
        finding = Finding(Severity.ERROR, INDEX, str(error), remedy)
        return Checkpoint(folder, trust_index=False), [finding]
    return checkpoint, list(_check_total_size(checkpoint))


def _is_index_to_blame(folder: Path) -> bool:
    """Whether all tensors are there, and only the index says otherwise."""
    if not (folder / INDEX).is_file() or (folder / SINGLE_FILE).is_file():
        return False
    try:
        found = Checkpoint(folder, trust_index=False).tensor_files
    except CheckpointError:
        return False
    with suppress(CheckpointError):  # an index that cannot be read names nothing that is missing
        return all(name in found for name in read_weight_map(folder))
    return True


def _check_total_size(checkpoint: Checkpoint) -> Iterator[Finding]:
    path = checkpoint.folder / INDEX
    if not path.is_file():
        return
    metadata = json.loads(path.read_text(encoding="utf-8")).get("metadata") or {}
    stated = metadata.get("total_size")
    found = sum(checkpoint.tensor(name).nbytes for name in checkpoint)
    if stated is not None and stated != found:
        yield Finding(
            Severity.WARNING,
            INDEX,
            f"total_size says {stated:,} bytes, the tensors have {found:,}",
            Remedy("write the index anew"),
        )


def check_layers(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Tensors that are missing, of a wrong type or shape; layers that the config does not name."""
    for name in checkpoint.modules:
        try:
            checkpoint.describe(name)
        except CheckpointError as error:
            yield Finding(Severity.ERROR, name, str(error).removeprefix(f"{name}: "))


def check_values(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Values that no computation survives, and scales that lose digits."""
    for name in checkpoint:
        values = checkpoint.tensor(name)
        if not values.is_floating_point() or values.itemsize == 1:
            continue
        broken = int((~torch.isfinite(values)).sum())
        if broken:
            yield Finding(
                Severity.ERROR, name, f"{broken} of {values.numel()} values are infinite or NaN"
            )
        elif checkpoint.format is not None and name.endswith(SCALES) and not _is_padded(checkpoint):
            yield from _check_scales(name, values)


def _is_padded(checkpoint: Checkpoint) -> bool:
    """Whether zeros fill up the scales: AWQ's layouts for single rows."""
    reader = checkpoint.format
    return isinstance(reader, AwqFormat) and reader.layout is not Layout.GEMM


def _check_scales(name: str, scales: torch.Tensor) -> Iterator[Finding]:
    zeros = int((scales == 0).sum())
    if zeros and not name.endswith(("SCB", "absmax")):  # there a zero stands for a block of zeros
        least = LEAST[scales.dtype]
        yield Finding(
            Severity.ERROR,
            name,
            f"{zeros} of {scales.numel()} scales are zero, which readers take for damage",
            Remedy(
                f"put {least:.0e} in their place, which leaves their weights next to zero",
                tensors={name: partial(_fill_zeros, least=least)},
            ),
        )
    small = int(((scales != 0) & (scales.abs() < SMALLEST_NORMAL)).sum())
    if small and scales.dtype is torch.float16:
        yield Finding(
            Severity.WARNING,
            name,
            f"{small} of {scales.numel()} scales are subnormal in float16: they lose digits, and "
            "engines that flush such values make them zero",
        )


def _fill_zeros(values: torch.Tensor, least: float) -> torch.Tensor:
    return torch.where(values == 0, least, values).to(values.dtype)


def check_leftovers(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Tensors that nobody reads."""
    for name in checkpoint:
        if name.endswith(COMPUTED):
            yield Finding(
                Severity.WARNING,
                name,
                "follows from the configuration, readers may complain about it",
                Remedy("leave it out", dropped=frozenset({name})),
            )
    for module, ends in checkpoint.modules.items():
        if "qweight" in ends and "weight" in ends:
            yield Finding(
                Severity.WARNING,
                f"{module}.weight",
                "lies beside the packed weight of the same layer",
                Remedy("leave it out", dropped=frozenset({f"{module}.weight"})),
            )


def check_fused_layers(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Layers that engines run as one and that therefore must be packed alike."""
    for module in checkpoint.modules:
        parent, _, last = module.rpartition(".")
        members = next((names for names in FUSED_SETS.values() if names[0] == last), ())
        schemes = {}
        for member in members:
            name = f"{parent}.{member}"
            if name in checkpoint.modules:
                try:
                    found = checkpoint.describe(name)
                except CheckpointError:
                    continue  # `check_layers` tells it
                schemes[member] = None if found is None else (found.bits, found.group_size)
        if len(set(schemes.values())) > 1:
            told = ", ".join(
                f"{member} {'16 bits' if one is None else f'{one[0]} bits in groups of {one[1]}'}"
                for member, one in schemes.items()
            )
            problem = f"are run as one by engines, and differ: {told}"
            yield Finding(Severity.WARNING, parent, problem)


def check_awq_zero_points(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Zero points of GPTQ v1 under AWQ's label: all one below the middle."""
    if not isinstance(checkpoint.format, AwqFormat):
        return
    names = [name for name in checkpoint if name.endswith(".qzeros")]
    less_one = [name for name in names if bool((checkpoint.tensor(name) == 0x77777777).all())]
    if names and less_one == names:
        yield Finding(
            Severity.ERROR,
            "qzeros",
            "every zero point is 7: these are the words of a symmetric GPTQ v1 file, which mean 8",
            Remedy(
                "make them 8",
                tensors=dict.fromkeys(names, partial(torch.add, other=0x11111111)),
            ),
        )


def check_gptq(checkpoint: Checkpoint) -> Iterator[Finding]:
    """What GPTQ's versions disagree on."""
    if isinstance(checkpoint.format, GptqFormat):
        yield from check_zero_points(checkpoint, checkpoint.format)
        yield from check_group_index(checkpoint, checkpoint.format)


CHECKS: tuple[Check, ...] = (
    check_layers,
    check_values,
    check_leftovers,
    check_fused_layers,
    check_awq_zero_points,
    check_gptq,
)
