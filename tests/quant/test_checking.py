"""Checkpoints with one thing wrong each: what is found, and whether the mended copy is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.checking import check_checkpoint
from qserve.quant.errors import CheckpointError
from qserve.quant.findings import Severity
from qserve.quant.formats.checkpoint import INDEX, Checkpoint
from qserve.quant.formats.registry import OutputFormat, make_writer
from qserve.quant.formats.writer import scheme_of
from qserve.quant.repair import repair

Tensors = dict[str, torch.Tensor]
Block = dict[str, Any]
ATTENTION = "model.layers.0.self_attn"
SECOND = "model-00002-of-00002.safetensors"
LAYERS = tuple(f"{ATTENTION}.{name}_proj" for name in "qkv")
UP = LAYERS[0]
ORDER = torch.randperm(128, generator=torch.Generator().manual_seed(5))


def weight(*, symmetric: bool = True, order: torch.Tensor | None = None) -> GroupedWeight:
    """64 outputs, 128 inputs, groups of 32; zero points from 1 to 14."""
    draw = torch.Generator().manual_seed(0)
    zero_points = torch.randint(1, 15, (64, 4), generator=draw, dtype=torch.uint8)
    return GroupedWeight(
        codes=torch.randint(0, 16, (64, 128), generator=draw, dtype=torch.uint8),
        scales=(torch.rand(64, 4, generator=draw) + 0.01).half(),
        zero_points=zero_points.fill_(8) if symmetric else zero_points,
        bits=4,
        group_size=32,
        input_order=order,
    )


def write(
    folder: Path,
    output: OutputFormat,
    damage: Callable[[Tensors, Block], object],
    source: GroupedWeight | None = None,
) -> Path:
    """A model of three such layers in two shards, damaged."""
    source = source or weight()
    writer = make_writer(output, "test:0")
    tensors = {
        f"{name}.{key}": value.clone()
        for name in LAYERS
        for key, value in writer.encode(source).items()
    }
    tensors["model.norm.weight"] = torch.ones(64).half()
    block = writer.config_block(dict.fromkeys(LAYERS, scheme_of(source)), [])
    damage(tensors, block)
    config = {"architectures": ["LlamaForCausalLM"], "quantization_config": block}
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:4]}
    shards[SECOND] = names[4:]
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {
        "metadata": {"total_size": size},
        "weight_map": {name: file for file, held in shards.items() for name in held},
    }
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def each(tensors: Tensors, end: str, change: Callable[[torch.Tensor], object]) -> None:
    """Change the tensors of every layer."""
    for name, tensor in tensors.items():
        if name.endswith(end):
            change(tensor)


def nothing(tensors: Tensors, block: Block) -> None:
    """No damage."""


AWQ, GPTQ, V2 = OutputFormat.AWQ, OutputFormat.GPTQ, OutputFormat.GPTQ_V2
PACKED = OutputFormat.COMPRESSED_TENSORS


@pytest.mark.parametrize("output", [AWQ, GPTQ, V2, PACKED])
def test_a_checkpoint_in_order_has_no_findings(tmp_path: Path, output: OutputFormat) -> None:
    assert check_checkpoint(write(tmp_path, output, nothing))[1] == []


MENDABLE: dict[str, tuple[OutputFormat, Callable[[Tensors, Block], object], str]] = {
    "v2 zero points labelled v1": (
        GPTQ,
        lambda t, b: each(t, "qzeros", lambda x: x.add_(0x11111111)),
        "labelled as another version, it is gptq_v2",
    ),
    "v1 zero points labelled v2": (
        V2,
        lambda t, b: each(t, "qzeros", lambda x: x.sub_(0x11111111)),
        "labelled as another version, it is gptq",
    ),
    "g_idx out of range": (
        GPTQ,
        lambda t, b: t[f"{UP}.g_idx"].fill_(9),
        "g_idx spans [9, 9]",
    ),
    "g_idx of unequal groups": (
        GPTQ,
        lambda t, b: t[f"{UP}.g_idx"][:5].fill_(3),
        "different numbers of inputs",
    ),
    "desc_act for nothing": (
        GPTQ,
        lambda t, b: b.update(desc_act=True),
        "desc_act is true, but no g_idx orders",
    ),
    "zero points of GPTQ in AWQ": (
        AWQ,
        lambda t, b: each(t, "qzeros", lambda x: x.sub_(0x11111111)),
        "every zero point is 7",
    ),
    "leftover rotary frequencies": (
        AWQ,
        lambda t, b: t.update({f"{ATTENTION}.rotary_emb.inv_freq": torch.ones(8)}),
        "follows from the configuration",
    ),
    "leftover float weight": (
        AWQ,
        lambda t, b: t.update({f"{UP}.weight": torch.ones(64, 128).half()}),
        "beside the packed weight",
    ),
}


@pytest.mark.parametrize(("output", "damage", "message"), MENDABLE.values(), ids=MENDABLE)
def test_what_can_be_mended_is_found_and_mended(
    tmp_path: Path, output: OutputFormat, damage: Callable[[Tensors, Block], object], message: str
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    checkpoint, findings = check_checkpoint(write(tmp_path / "in", output, damage))
    assert [finding for finding in findings if finding.remedy is None] == []
    assert len(findings) == 1
    assert message in findings[0].problem
    assert repair(checkpoint, findings, tmp_path / "out") == []
    mended = Checkpoint(tmp_path / "out")
    for name in LAYERS:
        read = mended.linear(name)
        assert isinstance(read, GroupedWeight)
        assert torch.equal(read.dequantize(), weight().dequantize())


def test_an_order_that_the_config_denies_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    source = weight(order=ORDER)
    folder = write(tmp_path, GPTQ, lambda t, b: b.update(desc_act=False), source)
    checkpoint, findings = check_checkpoint(folder)
    assert [finding.severity for finding in findings] == [Severity.ERROR]
    assert "engines that believe it" in findings[0].problem
    repair(checkpoint, findings, tmp_path / "out")
    mended = Checkpoint(tmp_path / "out")
    assert mended.config["quantization_config"]["desc_act"] is True
    assert torch.equal(mended.linear(UP).dequantize(), source.dequantize())


def test_an_asymmetric_file_that_says_sym_is_relabelled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    source = weight(symmetric=False)
    folder = write(tmp_path, V2, lambda t, b: b.update(sym=True), source)
    with pytest.raises(CheckpointError, match="--check` explains and --repair mends it"):
        Checkpoint(folder).linear(UP)
    checkpoint, findings = check_checkpoint(folder)
    assert "3 of 3 layers have other zero points than the middle" in findings[0].problem
    repair(checkpoint, findings, tmp_path / "out")
    assert torch.equal(Checkpoint(tmp_path / "out").linear(UP).dequantize(), source.dequantize())


def test_scales_of_zero_become_the_smallest(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    folder = write(tmp_path, GPTQ, lambda t, b: t[f"{UP}.scales"][0].zero_())
    with pytest.raises(CheckpointError, match="the file is damaged"):
        Checkpoint(folder).linear(UP)
    checkpoint, findings = check_checkpoint(folder)
    assert "64 of 256 scales are zero" in findings[0].problem
    left = repair(checkpoint, findings, tmp_path / "out")
    assert "subnormal" in left[0].problem
    assert float(Checkpoint(tmp_path / "out").linear(UP).dequantize()[:, :32].abs().max()) < 1e-6


HOPELESS: dict[str, tuple[OutputFormat, Callable[[Tensors, Block], object], str]] = {
    "missing scales": (GPTQ, lambda t, b: t.pop(f"{UP}.scales"), "scales missing"),
    "missing zero points": (AWQ, lambda t, b: t.pop(f"{UP}.qzeros"), "qzeros missing"),
    "missing words": (PACKED, lambda t, b: t.pop(f"{UP}.weight_scale"), "weight_scale missing"),
    "wrong type": (
        AWQ,
        lambda t, b: t.update({f"{UP}.qweight": t[f"{UP}.qweight"].long()}),
        "qweight I64",
    ),
    "impossible shape": (
        GPTQ,
        lambda t, b: t.update({f"{UP}.qweight": t[f"{UP}.qweight"][:5]}),
        "do not fit 4 bits",
    ),
    "another group size": (AWQ, lambda t, b: b.update(group_size=64), "do not fit groups of 64"),
    "NaN scales": (
        AWQ,
        lambda t, b: t[f"{UP}.scales"][0].fill_(float("nan")),
        "64 of 256 values are infinite or NaN",
    ),
    "infinite norm": (
        AWQ,
        lambda t, b: t["model.norm.weight"][3:4].fill_(float("inf")),
        "1 of 64 values",
    ),
    "g_idx out of range with an order": (
        GPTQ,
        lambda t, b: (b.update(desc_act=True), t[f"{UP}.g_idx"].fill_(9)),
        "g_idx spans",
    ),
    "zero points that AutoGPTQ overwrote": (
        GPTQ,
        lambda t, b: (b.update(sym=False), t[f"{UP}.qzeros"][0, :1].fill_(-12)),
        "AutoGPTQ overwrote what lay above",
    ),
    "a layer that the config ignores": (
        PACKED,
        lambda t, b: b.update(ignore=[UP]),
        "config.json ignores it",
    ),
}


@pytest.mark.parametrize(("output", "damage", "message"), HOPELESS.values(), ids=HOPELESS)
def test_what_cannot_be_mended_is_explained_and_no_copy_is_written(
    tmp_path: Path, output: OutputFormat, damage: Callable[[Tensors, Block], object], message: str
) -> None:
    checkpoint, findings = check_checkpoint(write(tmp_path, output, damage))
    hopeless = [one for one in findings if one.severity is Severity.ERROR and one.remedy is None]
    assert any(message in one.problem for one in hopeless), findings
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="cannot be mended"):
        repair(checkpoint, findings, tmp_path / "out")


WARNED: dict[str, tuple[OutputFormat, Callable[[Tensors, Block], object], str]] = {
    "subnormal scales": (
        AWQ,
        lambda t, b: t[f"{UP}.scales"][0].fill_(1e-6),
        "64 of 256 scales are subnormal",
    ),
    "a zero point of 0 in v1": (
        GPTQ,
        lambda t, b: (b.update(sym=False), t[f"{UP}.qzeros"][0, :1].fill_(0x71717F77)),
        "1 zero points are 0 in an asymmetric v1 file",
    ),
    "fused layers that differ": (
        GPTQ,
        lambda t, b: (
            [t.pop(f"{LAYERS[1]}.{key}") for key in ("qweight", "qzeros", "scales", "g_idx")],
            t.update({f"{LAYERS[1]}.weight": torch.ones(64, 128).half()}),
        ),
        "k_proj 16 bits",
    ),
}


@pytest.mark.parametrize(("output", "damage", "message"), WARNED.values(), ids=WARNED)
def test_doubts_are_warnings(
    tmp_path: Path, output: OutputFormat, damage: Callable[[Tensors, Block], object], message: str
) -> None:
    _, findings = check_checkpoint(write(tmp_path, output, damage))
    assert [finding.severity for finding in findings] == [Severity.WARNING]
    assert message in findings[0].problem


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the index file."""
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: edit_index(f, lambda i: i["weight_map"].update({f"{UP}.qweight": SECOND})),
            "and it does not",
        ),
        (lambda f: (f / INDEX).write_text("{"), "not valid JSON"),
        (
            lambda f: edit_index(f, lambda i: i["metadata"].update(total_size=5)),
            "total_size says 5",
        ),
    ],
)
def test_a_wrong_index_is_written_anew(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = write(tmp_path, AWQ, nothing)
    damage(folder)
    checkpoint, findings = check_checkpoint(folder)
    assert len(findings) == 1
    assert message in findings[0].problem
    (tmp_path / "out").mkdir()
    assert repair(checkpoint, findings, tmp_path / "out") == []
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == set(checkpoint)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / SECOND).unlink(), "lacks model-00002"),
        (
            lambda f: (f / SECOND).write_bytes(b"\x08"),
            "truncated or damaged",
        ),
        (
            lambda f: edit_index(f, lambda i: i["weight_map"].update(gone=SECOND)),
            "holds gone, and it does not",
        ),
    ],
)
def test_what_is_not_there_is_no_fault_of_the_index(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = write(tmp_path, AWQ, nothing)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(folder)
