"""Every format of the native panels against its reference: ragged shapes, rounding of activations,
instruction sets, biases, orders of inputs.

Between the two lies nothing but the order of float32 sums: the largest relative error, by the sum
of the magnitudes of the terms, is ``(K + 8) * 2^-23``; see ``product_bound``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qserve.kernels import native
from qserve.kernels.activations import Activations, round_activations
from qserve.kernels.backend import Backend
from qserve.kernels.codebook_matmul import reference as codebook_reference
from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.float8_matmul import reference as float8_reference
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.int4_matmul import reference as grouped_reference
from qserve.kernels.linear_weight import prepare_linear
from qserve.kernels.packed_weight import PackedWeight, multiply

Bound = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Coded = GroupedWeight | CodebookWeight | Float8Weight
CPU = torch.device("cpu")

NF4 = [-1.0, -0.696, -0.525, -0.395, -0.284, -0.185, -0.091, 0.0]
NF4 += [0.08, 0.161, 0.246, 0.338, 0.441, 0.563, 0.723, 1.0]

FORMS = ["int2", "int3", "int4", "int8", "float8", "codebook"]

# (rows, outputs, inputs, group): every remainder of 8 rows, outputs that do not fill a panel of 16,
# groups of 32 and more, and of rows that are no multiple of 32.
SHAPES = [
    (1, 16, 32, 32),
    (3, 40, 192, 64),
    (7, 1, 128, 128),
    (6, 33, 192, 96),
    (21, 50, 576, 64),
    (9, 24, 100, 100),
    (2, 20, 7, 7),
]


def random_weight(form: str, shape: tuple[int, int, int], generator: torch.Generator) -> Coded:
    """Codes over their whole range, scales of either sign."""
    num_outputs, num_inputs, group = shape
    scales = torch.randn(num_outputs, num_inputs // group, generator=generator) * 0.02 + 0.001
    if form == "float8":
        values = torch.randn(num_outputs, num_inputs, generator=generator).to(torch.float8_e4m3fn)
        return Float8Weight(values, scales, (1, group))
    top = {"int2": 4, "int3": 8, "int8": 256}.get(form, 16)
    codes = torch.randint(0, top, (num_outputs, num_inputs), generator=generator, dtype=torch.uint8)
    if form == "codebook":
        return CodebookWeight(codes, torch.tensor(NF4), scales.abs().flatten(), group)
    zeros = torch.randint(0, top, scales.shape, generator=generator, dtype=torch.uint8)
    return GroupedWeight(codes, scales.half(), zeros, int(form[-1]), group)


def reference_of(weight: Coded, bias: torch.Tensor | None = None) -> PackedWeight:
    if isinstance(weight, GroupedWeight):
        return grouped_reference.prepare(weight, CPU, bias)
    if isinstance(weight, Float8Weight):
        return float8_reference.prepare(weight, CPU, bias)
    return codebook_reference.prepare(weight, CPU, bias)


@pytest.mark.parametrize("activations", Activations)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("isa")
def test_the_native_product_is_the_reference(
    form: str,
    shape: tuple[int, int, int, int],
    activations: Activations,
    product_bound: Bound,
    generator: torch.Generator,
) -> None:
    num_rows, *sizes = shape
    weight = random_weight(form, (sizes[0], sizes[1], sizes[2]), generator)
    x = torch.randn(num_rows, weight.in_features, generator=generator)
    packed = prepare_linear(weight)
    assert packed.backend is Backend.CPU
    y = multiply(x, packed, activations=activations)
    expected = multiply(x, reference_of(weight), activations=activations)
    limit = product_bound(round_activations(x, activations), weight.dequantize())
    assert ((y - expected).abs() <= limit).all()


@pytest.mark.parametrize("activations", Activations)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("isa")
def test_one_step_of_any_code_exceeds_the_tolerance(
    form: str, activations: Activations, product_bound: Bound, generator: torch.Generator
) -> None:
    weight = random_weight(form, (20, 96, 32), generator)
    # Every place in a group of 32 inputs, over the outputs of two panels and the three groups.
    rows = torch.arange(96) % 20
    shifted = replace_codes(weight, rows)
    x = torch.eye(96) + 0.01
    right = multiply(x, prepare_linear(weight), activations=activations)
    wrong = multiply(x, prepare_linear(shifted), activations=activations)
    limit = product_bound(round_activations(x, activations), weight.dequantize())
    exceeded = (wrong - right).abs() > limit
    assert exceeded[torch.arange(96), rows].all()


def replace_codes(weight: Coded, rows: torch.Tensor) -> Coded:
    """The weight with the code of input ``k`` of output ``rows[k]`` moved by one."""
    columns = torch.arange(len(rows))
    if isinstance(weight, Float8Weight):
        bits = weight.values.view(torch.uint8).clone()
        bits[rows, columns] ^= 1
        return replace(weight, values=bits.view(torch.float8_e4m3fn))
    codes = weight.codes.clone()
    codes[rows, columns] ^= 1
    return replace(weight, codes=codes)


@pytest.mark.parametrize("activations", Activations)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("isa", "restored_threads")
def test_a_row_has_the_same_bits_alone_and_in_a_batch_of_32_on_any_number_of_threads(
    form: str, activations: Activations, generator: torch.Generator
) -> None:
    packed = prepare_linear(random_weight(form, (100, 192, 64), generator))
    x = torch.randn(32, 192, generator=generator)
    native.set_num_threads(3)
    together = multiply(x, packed, activations=activations)
    native.set_num_threads(1)
    assert torch.equal(multiply(x, packed, activations=activations), together)
    for row in range(0, 32, 5):
        alone = multiply(x[row : row + 1], packed, activations=activations)
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("activations", Activations)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("isa")
def test_a_bias_is_added_to_every_row(
    form: str, activations: Activations, generator: torch.Generator
) -> None:
    weight = random_weight(form, (40, 64, 32), generator)
    bias = torch.randn(40, generator=generator)
    x = torch.randn(11, 64, generator=generator)
    plain = multiply(x, prepare_linear(weight), activations=activations)
    biased = multiply(x, prepare_linear(weight, bias=bias), activations=activations)
    assert torch.equal(biased, plain + bias)


@pytest.mark.parametrize("activations", Activations)
@pytest.mark.parametrize("form", ["int2", "int3", "int4", "int8"])
@pytest.mark.usefixtures("isa")
def test_inputs_in_another_order_and_outer_scales_are_those_of_the_reference(
    form: str, activations: Activations, product_bound: Bound, generator: torch.Generator
) -> None:
    weight = random_weight(form, (40, 192, 64), generator)
    assert isinstance(weight, GroupedWeight)
    weight = replace(
        weight,
        scales=torch.randint(1, 100, weight.scales.shape, generator=generator).half(),
        input_order=torch.randperm(192, generator=generator),
        channel_scales=torch.rand(40, generator=generator) * 1e-3,
    )
    x = torch.randn(13, 192, generator=generator)
    packed = prepare_linear(weight)
    assert packed.backend is Backend.CPU
    y = multiply(x, packed, activations=activations)
    expected = multiply(x, reference_of(weight), activations=activations)
    limit = product_bound(x, weight.dequantize())
    assert ((y - expected).abs() <= limit).all()
    if activations is Activations.FLOAT32:
        assert ((y - x @ weight.dequantize().T).abs() <= limit).all()


@pytest.mark.parametrize("activations", Activations)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("isa")
def test_a_nan_shows_in_its_row_and_no_other(
    form: str, activations: Activations, generator: torch.Generator
) -> None:
    packed = prepare_linear(random_weight(form, (24, 96, 32), generator))
    x = torch.randn(9, 96, generator=generator)
    x[4, 40] = torch.nan
    y = multiply(x, packed, activations=activations)
    assert y[4].isnan().all()
    assert torch.cat([y[:4], y[5:]]).isfinite().all()
    assert not multiply(torch.zeros(1, 96), packed, activations=activations).any()


@pytest.mark.parametrize("activations", [Activations.INT8, Activations.INT8_TOKEN])
@pytest.mark.parametrize("form", ["int2", "int3", "int4", "int8", "codebook"])
@pytest.mark.usefixtures("isa")
def test_extreme_codes_and_inputs_do_not_overflow(
    form: str, activations: Activations, product_bound: Bound, generator: torch.Generator
) -> None:
    weight = random_weight(form, (16, 4096, 4096), generator)
    assert isinstance(weight, GroupedWeight | CodebookWeight)
    highest = {"int2": 3, "int3": 7, "int8": 255}.get(form, 15)
    weight.codes.fill_(highest)
    weight.codes[8:] = 0
    if isinstance(weight, GroupedWeight):
        weight.zero_points.copy_(highest - weight.codes[:, :1])
    x = torch.full((3, 4096), 3.0)
    x[1, ::2] = -3.0
    x[2] = -3.0
    y = multiply(x, prepare_linear(weight), activations=activations)
    expected = multiply(x, reference_of(weight), activations=activations)
    assert ((y - expected).abs() <= product_bound(x, weight.dequantize())).all()


@pytest.mark.parametrize("block", [(128, 128), (40, 576), (1, 576), (7, 64)])
@pytest.mark.usefixtures("isa")
def test_float8_scales_of_blocks_channels_and_tensors_are_taken(
    block: tuple[int, int], product_bound: Bound, generator: torch.Generator
) -> None:
    values = (torch.randn(40, 576, generator=generator) * 100).to(torch.float8_e4m3fn)
    shape = (-(-40 // block[0]), -(-576 // block[1]))
    weight = Float8Weight(values, torch.rand(shape, generator=generator) + 0.5, block)
    x = torch.randn(5, 576, generator=generator)
    packed = prepare_linear(weight)
    assert packed.backend is Backend.CPU
    dense = weight.dequantize()
    assert ((multiply(x, packed) - x @ dense.T).abs() <= product_bound(x, dense)).all()


@pytest.mark.usefixtures("isa")
def test_every_float8_is_known_to_the_bit() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    bits[[127, 255]] = 0  # NaN
    values = bits.view(torch.float8_e4m3fn)[None].expand(16, 256).contiguous()
    packed = prepare_linear(Float8Weight(values, torch.ones(1, 1), (16, 256)))
    products = multiply(torch.eye(256), packed)
    assert torch.equal(products, values.float().T)


@pytest.mark.usefixtures("isa")
def test_activations_rounded_to_float8_are_those_of_the_definition(
    generator: torch.Generator,
) -> None:
    identity = Float8Weight(torch.eye(64).to(torch.float8_e4m3fn), torch.ones(1, 1), (64, 64))
    magnitudes = 2.0 ** (torch.rand(50, 64, generator=generator) * 24 - 12)
    x = magnitudes * torch.randn(50, 64, generator=generator).sign()
    halves = torch.arange(64) * 0.5  # ties between two float8
    x = torch.cat([x, halves[None] * 14, -halves[None]])
    y = multiply(x, prepare_linear(identity), activations=Activations.FLOAT8_TOKEN)
    assert torch.equal(y, round_activations(x, Activations.FLOAT8_TOKEN))


def test_weights_that_do_not_fit_panels_run_on_the_reference(
    product_bound: Bound, generator: torch.Generator
) -> None:
    crossing = CodebookWeight(
        torch.randint(0, 16, (6, 96), generator=generator, dtype=torch.uint8),
        torch.tensor(NF4),
        torch.rand(9, generator=generator),
        64,
    )
    narrow = random_weight("int8", (6, 96, 8), generator)
    broken = torch.randn(6, 96, generator=generator).to(torch.float8_e4m3fn)
    broken.view(torch.uint8)[3, 5] = 127
    x = torch.randn(3, 96, generator=generator)
    for weight in (crossing, narrow):
        packed, dense = prepare_linear(weight), weight.dequantize()
        assert packed.backend is Backend.REFERENCE
        assert ((multiply(x, packed) - x @ dense.T).abs() <= product_bound(x, dense)).all()
    with_nan = prepare_linear(Float8Weight(broken, torch.ones(1, 1), (6, 96)))
    assert multiply(x, with_nan)[:, 3].isnan().all()


@pytest.mark.parametrize("block_size", [64, 192, 384])
def test_blocks_of_a_codebook_may_be_rows_or_parts_and_multiples_of_rows(
    block_size: int, product_bound: Bound, generator: torch.Generator
) -> None:
    codes = torch.randint(0, 16, (6, 192), generator=generator, dtype=torch.uint8)
    scales = torch.rand(-(-codes.numel() // block_size), generator=generator)
    weight = CodebookWeight(codes, torch.tensor(NF4), scales, block_size)
    packed, dense = prepare_linear(weight), weight.dequantize()
    x = torch.randn(3, 192, generator=generator)
    assert packed.backend is Backend.CPU
    assert ((multiply(x, packed) - x @ dense.T).abs() <= product_bound(x, dense)).all()


def test_a_codebook_rounded_to_int8_moves_by_at_most_half_a_step() -> None:
    codes, step = codebook_reference.round_codebook(torch.tensor(NF4))
    assert codes.dtype is torch.int8 and step == 1 / 127
    assert ((codes * step - torch.tensor(NF4)).abs() <= step / 2).all()
