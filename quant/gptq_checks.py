"""What goes wrong with GPTQ alone: zero points of the other version, the order of the inputs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from qserve.quant.errors import CheckpointError
from qserve.quant.findings import Finding, Remedy, Severity
from qserve.quant.formats.channel_order import group_index, order_by_group
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.gptq import GptqFormat, ZeroPoints
from qserve.quant.formats.layer_format import PackedLayer

VERSIONS = {-1: "gptq", 1: "gptq_v2"}
"""How far zero points are off the middle -> the version that they would be right in."""


def check_zero_points(checkpoint: Checkpoint, reader: GptqFormat) -> Iterator[Finding]:
    """Zero points that contradict ``sym`` or ``checkpoint_format``, and those that are lost."""
    shifts: dict[str, int | None] = {}
    for name, packed in _layers(checkpoint):
        words = checkpoint.tensor(f"{name}.qzeros")
        zero_points = reader.read_zero_points(words, packed)
        if reader.scheme_of(name).symmetric is True:
            values = zero_points.unique().tolist()
            middle = 1 << (packed.bits - 1)
            shifts[name] = values[0] - middle if len(values) == 1 else None
        elif reader.zero_points is not ZeroPoints.PLAIN:
            yield from _check_wrapped(name, words, packed, reader)
    wrong = {name: shift for name, shift in shifts.items() if shift != 0}
    if wrong:
        yield _explain_symmetric(wrong, len(shifts))


def check_group_index(checkpoint: Checkpoint, reader: GptqFormat) -> Iterator[Finding]:
    """``g_idx`` that names no group, or that contradicts ``desc_act``."""
    orders: list[str] = []
    for name, packed in _layers(checkpoint):
        if f"{name}.g_idx" not in checkpoint:
            continue
        try:
            order = order_by_group(name, checkpoint.tensor(f"{name}.g_idx"), packed.group_size)
        except CheckpointError as error:
            yield _explain_damaged(name, packed, reader, str(error))
            continue
        if order is not None:
            orders.append(name)
    if orders and not reader.activation_order:
        yield Finding(
            Severity.ERROR,
            orders[0],
            f"g_idx of {len(orders)} layers orders the inputs, but desc_act is false: engines that "
            "believe it compute nonsense",
            Remedy("set desc_act to true", config={"desc_act": True}),
        )
    if reader.activation_order and not orders:
        yield Finding(
            Severity.WARNING,
            "config.json",
            "desc_act is true, but no g_idx orders the inputs: engines refuse it for nothing",
            Remedy("set desc_act to false", config={"desc_act": False}),
        )


def _layers(checkpoint: Checkpoint) -> Iterator[tuple[str, PackedLayer]]:
    """The packed layers whose headers are in order."""
    for name in checkpoint.modules:
        try:
            packed = checkpoint.describe(name)
        except CheckpointError:
            continue
        if packed is not None:
            yield name, packed


def _explain_symmetric(wrong: dict[str, int | None], num_layers: int) -> Finding:
    """One finding for all layers: the label is one for the whole file."""
    kinds = set(wrong.values())
    where = next(iter(wrong))
    version = VERSIONS.get(kinds.pop() or 0) if len(kinds) == 1 else None
    if version is not None and len(wrong) == num_layers:
        return Finding(
            Severity.ERROR,
            where,
            f"sym is true, but every zero point is off by one, here and in all {num_layers} "
            f"layers: the file is labelled as another version, it is {version}",
            Remedy(
                f"set checkpoint_format to {version}",
                config={"checkpoint_format": version, "format": version},
            ),
        )
    return Finding(
        Severity.ERROR,
        where,
        f"sym is true, but {len(wrong)} of {num_layers} layers have other zero points than the "
        "middle: engines that believe it ignore them",
        Remedy("set sym to false", config={"sym": False}),
    )


def _check_wrapped(
    name: str, words: torch.Tensor, packed: PackedLayer, reader: GptqFormat
) -> Iterator[Finding]:
    """v1 stores zero points less one, and a zero wraps around: writers disagree on the rest."""
    max_code = (1 << packed.bits) - 1
    plain = GptqFormat(reader.scheme, ZeroPoints.PLAIN, planar_bits=reader.planar_bits)
    fields = plain.read_zero_points(words, packed)
    wrapped = fields == max_code
    if not bool(wrapped.any()):
        return
    per_word = 32 // packed.bits
    by_word = wrapped.reshape(len(fields), -1, per_word) if 32 % packed.bits == 0 else None
    if by_word is not None:
        above = by_word.flip(-1).cumprod(-1).flip(-1).bool()  # this field and all above it
        lost = int((above[..., : per_word // 2].any(-1) & ~by_word.all(-1)).sum())
        if lost:
            yield Finding(
                Severity.ERROR,
                name,
                f"{lost} words of zero points end in a run of {max_code}: AutoGPTQ overwrote what "
                "lay above a zero point of 0, and it is lost; quantize the float model again",
            )
            return
    yield Finding(
        Severity.WARNING,
        name,
        f"{int(wrapped.sum())} zero points are 0 in an asymmetric v1 file, which readers take for "
        "0 or 16; `qserve convert --to gptq-v2` removes the doubt",
    )


def _explain_damaged(name: str, packed: PackedLayer, reader: GptqFormat, problem: str) -> Finding:
    remedy = None
    if not reader.activation_order:
        natural = group_index(packed.in_features, packed.group_size, None)
        remedy = Remedy(
            "number the groups in the order of the inputs, as desc_act false says",
            tensors={f"{name}.g_idx": partial(_replace, by=natural)},
        )
    return Finding(Severity.ERROR, name, problem.removeprefix(f"{name}: "), remedy)


def _replace(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    return by
