"""AutoAWQ's formats: words as their owner packs them, and tensors that contradict each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.packing import pack_words
from qserve.quant.errors import CheckpointError, UnsupportedModelError
from qserve.quant.formats import awq
from qserve.quant.formats.awq import AwqFormat, AwqWriter, Layout
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.layer_format import in_memory

Tensors = dict[str, torch.Tensor]


def random_weight(out_features: int = 64, in_features: int = 96) -> GroupedWeight:
    """Codes and zero points over their whole range, in groups of 32."""
    draw = torch.Generator().manual_seed(0)
    groups = (out_features, in_features // 32)
    return GroupedWeight(
        codes=torch.randint(0, 16, (out_features, in_features), generator=draw, dtype=torch.uint8),
        scales=(torch.rand(groups, generator=draw) + 0.01).half(),
        zero_points=torch.randint(0, 16, groups, generator=draw, dtype=torch.uint8),
        bits=4,
        group_size=32,
    )


def test_unpacking_gives_back_what_was_packed() -> None:
    weight = random_weight()
    read = AwqFormat(32).read("layer", in_memory(AwqWriter().encode(weight)))
    assert torch.equal(read.codes, weight.codes)
    assert torch.equal(read.zero_points, weight.zero_points)
    assert torch.equal(read.scales, weight.scales)


def test_words_are_those_of_autoawq() -> None:
    codes = torch.tensor([1, 15, 7, 8, 0, 3, 12, 9] * 4, dtype=torch.uint8)[:, None]
    weight = GroupedWeight(
        codes=codes.expand(32, 32).contiguous(),
        scales=torch.ones(32, 1),
        zero_points=(torch.arange(32) % 8)[:, None].to(torch.uint8),
        bits=4,
        group_size=32,
    )
    tensors = AwqWriter().encode(weight)
    # Both words were computed with AutoAWQ 0.2.9: 0x938FC071 and 0x75316420.
    assert tensors["qweight"].unique().tolist() == [-1819295631]
    assert tensors["qzeros"].tolist() == [[0x75316420] * 4]
    assert tensors["qweight"].shape == (32, 4)
    assert tensors["scales"].dtype == torch.float16


@pytest.mark.parametrize(("group_size", "num_words"), [(32, 4), (64, 2), (128, 1)])
def test_gemv_rows_are_read(group_size: int, num_words: int) -> None:
    draw = torch.Generator().manual_seed(1)
    num_groups = 256 // group_size
    codes = torch.randint(0, 16, (32, 256), generator=draw, dtype=torch.uint8)
    zeros = torch.randint(0, 16, (32, num_groups), generator=draw, dtype=torch.uint8)
    scales = torch.rand(32, num_groups, generator=draw).half() + 0.5
    unused = num_words * 8 - num_groups
    tensors = {
        "qweight": pack_words(codes, 4),
        "qzeros": pack_words(torch.nn.functional.pad(zeros, (0, unused)), 4),
        "scales": torch.nn.functional.pad(scales, (0, unused)),
    }
    read = AwqFormat(group_size, Layout.GEMV).read("layer", in_memory(tensors))
    assert torch.equal(read.codes, codes)
    assert torch.equal(read.zero_points, zeros)
    assert torch.equal(read.scales, scales)


@pytest.mark.parametrize("zeros_name", ["qzeros", "scaled_zeros"])
def test_gemv_fast_words_are_those_of_autoawq(zeros_name: str) -> None:
    codes = (torch.arange(32)[:, None] + torch.arange(128)) % 16
    words = torch.zeros(8, 128, dtype=torch.int16)
    for n in range(32):  # index by index, as the kernel of llm-awq walks
        for k in range(128):
            tile, k_half, nibble, j = k // 64, k % 64 // 32, k % 32 // 8, k % 8
            place = tile * 64 + n % 4 * 16 + k_half * 8 + j
            value = int(words[n // 4, place]) & 0xFFFF | int(codes[n, k]) << (4 * nibble)
            words[n // 4, place] = value - (1 << 16 if value >= 1 << 15 else 0)
    # Computed with AutoAWQ 0.2.9.
    assert [int(word) & 0xFFFF for word in words[0, :4]] == [0x8080, 0x9191, 0xA2A2, 0xB3B3]
    scales = torch.zeros(8, 32).half()
    scales[0] = 0.0123  # the other rows fill up the words of zero points
    zeros = torch.arange(32).remainder(16).expand(8, 32)
    tensors = {"qweight": words, "scales": scales, zeros_name: -(scales * zeros)}
    read = AwqFormat(128, Layout.GEMV_FAST).read("layer", in_memory(tensors))
    assert torch.equal(read.codes, codes.to(torch.uint8))
    assert read.zero_points.flatten().tolist() == [n % 16 for n in range(32)]
    assert torch.equal(read.scales, scales[:1].T)


@pytest.mark.parametrize("layout", [Layout.GEMV, Layout.GEMV_FAST])
def test_gemm_tensors_under_another_name_are_refused(layout: Layout) -> None:
    with pytest.raises(CheckpointError, match="layer: .*(do not fit|expected qweight I16)"):
        AwqFormat(32, layout).read("layer", in_memory(AwqWriter().encode(random_weight())))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda: random_weight(out_features=48), "multiple of 32 outputs, got 48"),
        (lambda: changed(random_weight(), bits=8), "4-bit integer codes, got 8"),
        (lambda: changed(random_weight(), scale=1e-9), "zero, infinite or NaN"),
        (lambda: changed(random_weight(), scale=1e9), "zero, infinite or NaN"),
        (lambda: changed(random_weight(), code=16), r"\[0, 15\]"),
    ],
)
def test_weights_that_the_format_cannot_hold_are_refused(
    weight: Callable[[], GroupedWeight], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        AwqWriter().encode(weight())


def changed(
    weight: GroupedWeight, bits: int = 4, scale: float | None = None, code: int | None = None
) -> GroupedWeight:
    """The weight with one thing wrong."""
    codes, scales = weight.codes.clone(), weight.scales.float()
    if scale is not None:
        scales[0, 0] = scale
    if code is not None:
        codes[0, 0] = code
    return GroupedWeight(codes, scales, weight.zero_points, bits, weight.group_size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("qzeros"), "layer: qzeros missing"),
        (lambda t: t.update(scales=t["scales"][:2]), "do not fit groups of 32"),
        (lambda t: t.update(scales=t["scales"].T), "do not fit"),
        (lambda t: t.update(qzeros=t["qzeros"][:, :4]), "do not fit"),
        (lambda t: t.update(qweight=t["qweight"][:90]), "do not fit"),
        (lambda t: t.update(qweight=t["qweight"][:0]), "do not fit"),
        (lambda t: t.update(qweight=t["qweight"].flatten()), "do not fit"),
        (lambda t: t.update(qweight=t["qweight"].to(torch.int64)), "qweight I64: expected .* I32"),
        (lambda t: t.update(scales=t["scales"].int()), "scales I32: expected scales F16"),
        (lambda t: t["scales"][1].fill_(float("nan")), "the file is damaged"),
        (lambda t: t["scales"][1].fill_(0), "the file is damaged"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(
    damage: Callable[[Tensors], object], message: str
) -> None:
    tensors = AwqWriter().encode(random_weight())
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        AwqFormat(32).read("layer", in_memory(tensors))


@pytest.mark.parametrize(
    "block",
    [
        {"bits": 4, "group_size": 64, "version": "gemm"},
        {"w_bit": 4, "q_group_size": 64, "version": "GEMM"},
        {"bits": 4, "group_size": 64, "format": "gemm"},
        {"bits": 4, "group_size": 64, "version": None},
    ],
)
def test_all_spellings_of_the_group_size_are_read(block: dict[str, object]) -> None:
    assert AwqFormat.from_config(block) == AwqFormat(64)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"bits": 8, "group_size": 64}, "8 bits"),
        ({"bits": 4, "group_size": 64, "version": "marlin"}, "'marlin' layout"),
        ({"bits": 4, "group_size": 0}, "group_size 0"),
        ({"bits": 4, "group_size": "64"}, "group_size '64'"),
        ({"bits": 4, "group_size": True}, "group_size True"),
        ({"bits": 4}, "group_size None"),
    ],
)
def test_other_kinds_of_awq_are_refused(block: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        AwqFormat.from_config(block)


def test_checkpoint_gives_packed_and_float_layers(tmp_path: Path) -> None:
    weight = random_weight()
    tensors = {f"a.{key}": value for key, value in AwqWriter().encode(weight).items()}
    save_file(tensors | {"b.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    config = {"quantization_config": awq.config_block(32, ["b"])}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(tmp_path)
    packed = checkpoint.linear("a")
    assert isinstance(packed, GroupedWeight)
    assert torch.equal(packed.dequantize(), weight.dequantize())
    assert isinstance(checkpoint.linear("b"), torch.Tensor)
