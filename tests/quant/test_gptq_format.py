"""GPTQ's formats: words as their owners pack them, zero points of every writer, act-order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.errors import CheckpointError, UnsupportedModelError
from qserve.quant.formats import auto_round, gptq
from qserve.quant.formats.awq import AwqFormat
from qserve.quant.formats.gptq import GptqFormat, GptqWriter, ZeroPoints
from qserve.quant.formats.gptq_dynamic import Scheme
from qserve.quant.formats.layer_format import PackedLayer, in_memory
from qserve.quant.formats.writer import Coding, LayerScheme, scheme_of

Tensors = dict[str, torch.Tensor]
WORD = 1 << 32


def signed(*words: int) -> torch.Tensor:
    """Words as a file has them: int32 ``[1, n]``."""
    values = [word - WORD if word >= WORD // 2 else word for word in words]
    return torch.tensor(values, dtype=torch.int32)[None]


def config(bits: int = 4, group_size: int = 32, **changes: Any) -> dict[str, Any]:
    """A configuration of GPTQ v1."""
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size, **changes}


def random_weight(
    bits: int, *, symmetric: bool, order: torch.Tensor | None = None, group_size: int = 32
) -> GroupedWeight:
    """64 outputs and 96 inputs; codes and zero points over their whole range."""
    draw = torch.Generator().manual_seed(bits)
    groups = (64, 96 // group_size)
    high = 1 << bits
    zero_points = torch.randint(0, high, groups, generator=draw, dtype=torch.uint8)
    if symmetric:
        zero_points.fill_(high // 2)
    scales = (torch.rand(groups, generator=draw) + 0.01).half()
    return GroupedWeight(
        codes=torch.randint(0, high, (64, 96), generator=draw, dtype=torch.uint8),
        scales=torch.where(scales > 0.9, -scales, scales),  # AutoRound writes negative ones too
        zero_points=zero_points,
        bits=bits,
        group_size=group_size,
        input_order=order,
    )


def assert_same(read: GroupedWeight, weight: GroupedWeight) -> None:
    """Bit for bit."""
    for name in ("codes", "scales", "zero_points"):
        assert torch.equal(getattr(read, name), getattr(weight, name)), name
    assert (read.bits, read.group_size) == (weight.bits, weight.group_size)
    assert torch.equal(read.dequantize(), weight.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version_2", [False, True])
@pytest.mark.parametrize("group_size", [32, 96])
def test_reading_gives_back_what_was_written(bits: int, version_2: bool, group_size: int) -> None:
    weight = random_weight(bits, symmetric=not version_2, group_size=group_size)
    writer = GptqWriter("test", version_2)
    block = writer.config_block({"layer": scheme_of(weight)}, [])
    assert block["group_size"] == (-1 if group_size == 96 else 32)
    read = GptqFormat.from_config(block).read(
        "layer", in_memory(GptqWriter("test", version_2).encode(weight))
    )
    assert_same(read, weight)
    assert read.input_order is None


@pytest.mark.parametrize(
    ("bits", "v1", "v2"),
    [
        (2, [0x55555555], [0xAAAAAAAA]),
        (3, [0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D], [0x24924924, 0x49249249, 0x92492492]),
        (4, [0x77777777], [0x88888888]),
        (8, [0x7F7F7F7F], [0x80808080]),
    ],
)
def test_symmetric_zero_points_are_the_words_of_autogptq(
    bits: int, v1: list[int], v2: list[int]
) -> None:
    weight = random_weight(bits, symmetric=True)
    for version_2, words in ((False, v1), (True, v2)):
        stored = GptqWriter("test", version_2).encode(weight)["qzeros"]
        expected = signed(*words).repeat(3, 64 * bits // 32 // len(words))
        assert torch.equal(stored, expected)


def test_codes_run_along_the_inputs_from_the_low_end() -> None:
    weight = random_weight(4, symmetric=True)
    codes = weight.codes.clone()
    codes[0, :8] = torch.tensor([1, 15, 7, 8, 0, 3, 12, 9])
    packed = GptqWriter("test").encode(
        GroupedWeight(codes, weight.scales, weight.zero_points, 4, 32)
    )
    assert packed["qweight"][0, 0] == 0x9C3087F1 - WORD
    codes[0, :32] = torch.arange(32) % 8
    wide = GroupedWeight(codes % 8, weight.scales, weight.zero_points // 2, 3, 32)
    words = GptqWriter("test", True).encode(wide)["qweight"][:3, 0]
    assert torch.equal(words[None], signed(0x88FAC688, 0xC688FAC6, 0xFAC688FA))


@pytest.mark.parametrize(
    ("bits", "codes", "words"),
    [
        (3, [i % 8 for i in range(32)], [0xE4E4E4E4, 0xE4E4E4E4, 0xF0F0F0F0]),
        (5, range(32), [0x76543210, 0xFEDCBA98, 0x76543210, 0xFEDCBA98, 0xFFFF0000]),
    ],
)
def test_planar_codes_are_read(bits: int, codes: list[int], words: list[int]) -> None:
    assert gptq.unpack_planes(signed(*words), bits, 32).tolist() == [list(codes)]


@pytest.mark.parametrize(("bits", "version"), [(5, "gptq_v2"), (6, "gptq_p"), (3, "gptq_p")])
def test_planar_layers_become_codes_of_a_width_that_runs(bits: int, version: str) -> None:
    draw = torch.Generator().manual_seed(0)
    words = torch.randint(-(1 << 31), 1 << 31, (bits, 32), generator=draw).to(torch.int32)
    tensors = {
        "qweight": words,
        "qzeros": words[:1, :bits].contiguous(),
        "scales": torch.ones(1, 32).half(),
    }
    reader = GptqFormat.from_config(config(bits, 32, checkpoint_format=version, sym=False))
    read = reader.read("layer", in_memory(tensors))
    codes = gptq.unpack_planes(words.T.contiguous(), bits, 32).float()
    zeros = gptq.unpack_planes(words[:1, :bits].contiguous(), bits, 32).float()
    assert read.bits == (3 if bits == 3 else 8)
    assert torch.equal(read.dequantize(), codes - zeros.T)


ZERO_POINTS = [5, 0, 9, 1, 2, 15, 7, 4]


@pytest.mark.parametrize(
    ("block", "word"),
    [
        (config(checkpoint_format="gptq_v2"), 0x47F21905),
        (config(meta={"quantizer": ["gptqmodel:7.7.0"]}), 0x36E107F4),
        (config(checkpoint_format="gptq"), 0x36E108F4),
        (config(), 0x36E108F4),
        ({"bits": 4, "group_size": 32, "packing_format": "auto_round"}, 0x47F21905),
    ],
    ids=["v2", "word less one", "fields less one", "no version is v1", "AutoRound"],
)
def test_zero_points_are_read_by_who_wrote_them(block: dict[str, Any], word: int) -> None:
    read = auto_round.from_config if "packing_format" in block else GptqFormat.from_config
    reader = read(block)
    assert isinstance(reader, GptqFormat)
    found = reader.read_zero_points(signed(word), PackedLayer(8, 32, 4, 32))
    assert found.tolist() == [ZERO_POINTS]


def test_worked_zero_points_of_autogptq() -> None:
    reader = GptqFormat.from_config(config())
    found = reader.read_zero_points(signed(0x36E10824), PackedLayer(8, 32, 4, 32))
    assert found.tolist() == [[5, 3, 9, 1, 2, 15, 7, 4]]


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_activation_order_becomes_an_order_of_the_inputs(bits: int) -> None:
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    weight = random_weight(bits, symmetric=True, order=order)
    tensors = GptqWriter("test").encode(weight)
    assert tensors["g_idx"][order[0]] == 0
    assert tensors["g_idx"][order[95]] == 2
    read = GptqFormat.from_config(config(bits, desc_act=True)).read("layer", in_memory(tensors))
    assert read.input_order is not None
    assert torch.equal(read.dequantize(), weight.dequantize())
    # As its owner defines it: each input has the scale of its group.
    natural = torch.empty_like(weight.codes)
    natural[:, order] = weight.codes
    groups = tensors["g_idx"].long()
    middle = 1 << (bits - 1)
    expected = (natural.float() - middle) * weight.scales.float()[:, groups]
    assert torch.equal(read.dequantize(), expected)


def test_groups_in_their_natural_order_need_no_order_of_the_inputs() -> None:
    tensors = GptqWriter("test").encode(random_weight(4, symmetric=True))
    read = GptqFormat.from_config(config(desc_act=True)).read("layer", in_memory(tensors))
    assert read.input_order is None
    del tensors["g_idx"]
    assert GptqFormat.from_config(config()).read("layer", in_memory(tensors)).input_order is None


def test_layers_may_differ_by_rule() -> None:
    rules = {"-:^lm_head$": {}, "+:.*down": {"bits": 8, "group_size": 64}, ".*": {"bits": 2}}
    reader = GptqFormat.from_config(config(sym=True, dynamic=rules))
    assert reader.scheme_of("mlp.down") == Scheme(8, 64, True)
    assert reader.scheme_of("mlp.up") == Scheme(2, 32, True)
    schemes = {
        name: LayerScheme(64, 96, Coding.INTEGER, bits, 32)
        for name, bits in {"a.b": 8, "a.c": 4, "a.d": 4}.items()
    }
    written = GptqWriter("test").config_block(schemes, ["head"])
    assert list(written["dynamic"]) == ["-:^head$", r"+:^a\.b$"]
    reader = GptqFormat.from_config(written)
    assert (reader.scheme_of("a.b").bits, reader.scheme_of("a.c").bits) == (8, 4)
    assert reader.scheme_of("a.b.c").bits == 4


def test_rules_for_layers_that_vllm_runs_as_one_match_the_name_it_gives_them() -> None:
    common = LayerScheme(64, 96, Coding.INTEGER, 4, 32)
    wide = replace(common, bits=8)
    names = [f"model.layers.{i}.mlp.{part}_proj" for i in (0, 1, 12) for part in ("gate", "up")]
    schemes = dict.fromkeys(names, wide) | {"model.layers.1.self_attn.k_proj": wide}
    schemes |= {f"model.layers.{i}.mlp.down_proj": common for i in range(20)}
    left = [f"model.layers.3.self_attn.{part}_proj" for part in "qkv"]
    rules = GptqWriter("test").config_block(schemes, left)["dynamic"]
    assert list(rules) == [
        r"-:^model\.layers\.3\.self_attn\.(?:q_proj|k_proj|v_proj|qkv_proj)$",
        r"+:^model\.layers\.(?:0|1|12)\.mlp\.(?:gate_proj|up_proj|gate_up_proj)$",
        r"+:^model\.layers\.1\.self_attn\.k_proj$",  # alone, so no engine fuses it
    ]


def test_autoround_names_layers_with_their_own_scheme() -> None:
    extra = {"a.b": {"bits": 8}, ".*gate": {"group_size": 64}, "lm_head": {"bits": 16}}
    block = {"bits": 4, "group_size": 32, "sym": True, "extra_config": extra}
    block["packing_format"] = "auto_round:auto_gptq"
    reader = auto_round.from_config(block)
    assert isinstance(reader, GptqFormat)
    assert reader.name == "auto-round"
    assert reader.zero_points is ZeroPoints.LESS_ONE
    assert reader.scheme_of("a.b") == Scheme(8, 32, True)
    assert reader.scheme_of("x.gate") == Scheme(4, 64, True)
    assert reader.scheme_of("a.bc") == Scheme(4, 32, True)
    awq = auto_round.from_config(block | {"packing_format": "auto_round:auto_awq"})
    assert awq == AwqFormat(32, name="auto-round")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 9}, "9 bits: expected one of 2, 3"),
        ({"bits": True}, "True bits"),
        ({"group_size": 0}, "group_size 0"),
        ({"group_size": "32"}, "group_size '32'"),
        ({"is_marlin_format": True}, "'marlin' layout"),
        ({"checkpoint_format": "bitblas"}, "'bitblas' layout"),
        ({"dynamic": []}, "expected an object of patterns"),
        ({"dynamic": {"(": {}}}, "is no pattern"),
        ({"dynamic": {".*": 8}}, "object of settings"),
        ({"dynamic": {".*": {"bits": 1}}}, "1 bits"),
    ],
)
def test_other_kinds_of_gptq_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        GptqFormat.from_config(config() | changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("qzeros"), "layer: qzeros missing"),
        (lambda t: t.pop("g_idx"), "layer: g_idx missing"),
        (lambda t: t.update(scales=t["scales"][:2]), "do not fit 4 bits in groups of 32"),
        (lambda t: t.update(qweight=t["qweight"][:11]), "a shorter last group is not read"),
        (lambda t: t.update(qzeros=t["qzeros"][:, :3]), "do not fit"),
        (lambda t: t.update(qweight=t["qweight"].long()), "qweight I64: expected qweight I32"),
        (lambda t: t.update(g_idx=t["g_idx"][:5]), "do not fit"),
        (lambda t: t["g_idx"].fill_(3), r"g_idx spans \[3, 3\], expected groups 0 to 2"),
        (lambda t: t["g_idx"][5:6].fill_(-1), r"g_idx spans \[-1, 2\]"),
        (lambda t: t["g_idx"][5:6].fill_(2), "different numbers of inputs"),
        (lambda t: t["scales"][1].fill_(float("inf")), "the file is damaged"),
        (lambda t: t["qzeros"].add_(0x11111111), "as checkpoint_format 'gptq_v2' would"),
        (lambda t: t["qzeros"].sub_(0x11111111), "2 different ones|not all 8"),
        (lambda t: t["qzeros"][0, :1].fill_(0x12345678), "8 different ones, as with sym false"),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(
    damage: Callable[[Tensors], object], message: str
) -> None:
    tensors = GptqWriter("test").encode(random_weight(4, symmetric=True))
    damage(tensors)
    with pytest.raises(CheckpointError, match=message):
        reader = GptqFormat.from_config(config(sym=True, desc_act=True))
        reader.read("layer", in_memory(tensors))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (lambda: random_weight(4, symmetric=False), "take gptq-v2"),
        (lambda: split(random_weight(4, symmetric=True), 48), "multiples of 32"),
        (lambda: scaled(random_weight(4, symmetric=True), 1e9), "zero, infinite or NaN"),
        (lambda: scaled(random_weight(4, symmetric=True), 1e-9), "zero, infinite or NaN"),
    ],
)
def test_weights_that_the_format_cannot_hold_are_refused(
    weight: Callable[[], GroupedWeight], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GptqWriter("test").encode(weight())


def split(weight: GroupedWeight, rows: int) -> GroupedWeight:
    """The first rows of a weight."""
    parts = (weight.codes[:rows], weight.scales[:rows], weight.zero_points[:rows])
    return GroupedWeight(*parts, weight.bits, weight.group_size)


def scaled(weight: GroupedWeight, factor: float) -> GroupedWeight:
    """The weight with other scales."""
    scales = weight.scales.float() * factor
    return GroupedWeight(weight.codes, scales, weight.zero_points, weight.bits, weight.group_size)
