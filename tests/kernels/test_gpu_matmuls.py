"""The Triton matmuls of every format against their definitions on a real GPU, as the engine calls
them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qserve.kernels.activations import Activations, round_activations
from qserve.kernels.backend import Backend
from qserve.kernels.codebook_weight import CodebookWeight
from qserve.kernels.dense_matmul import prepare as prepare_dense
from qserve.kernels.expert_matmul import expert_matmul
from qserve.kernels.expert_matmul import prepare as prepare_experts
from qserve.kernels.float8_weight import Float8Weight
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.linear_weight import prepare_linear
from qserve.kernels.output_head import topk_head
from qserve.kernels.packed_weight import multiply

pytestmark = pytest.mark.gpu

Weight = GroupedWeight | CodebookWeight | Float8Weight

SHAPE = (1536, 2048)
ROWS = (1, 17, 64, 300)
ROUNDED = (Activations.FLOAT32, Activations.INT8_TOKEN, Activations.FLOAT8_TOKEN)


def make_grouped(bits: int, group_size: int, asymmetric: bool, ordered: bool) -> GroupedWeight:
    generator = torch.Generator().manual_seed(bits + group_size)
    groups = (SHAPE[0], SHAPE[1] // group_size)
    zero_points = torch.full(groups, 1 << (bits - 1)).byte()
    if asymmetric:
        zero_points = torch.randint(0, 1 << bits, groups, generator=generator).byte()
    return GroupedWeight(
        codes=torch.randint(0, 1 << bits, SHAPE, generator=generator).byte(),
        scales=((0.5 + torch.rand(groups, generator=generator)) * 2.0 ** (-4 - bits)).half(),
        zero_points=zero_points,
        bits=bits,
        group_size=group_size,
        input_order=torch.randperm(SHAPE[1], generator=generator) if ordered else None,
    )


def make_progressive() -> GroupedWeight:
    generator = torch.Generator().manual_seed(0)
    groups = (SHAPE[0], SHAPE[1] // 128)
    return GroupedWeight(
        codes=torch.randint(0, 16, SHAPE, generator=generator).byte(),
        scales=torch.randint(1, 9, groups, generator=generator).half(),
        zero_points=torch.randint(0, 16, groups, generator=generator).byte(),
        bits=4,
        group_size=128,
        channel_scales=0.001 + 0.001 * torch.rand(SHAPE[0], generator=generator),
    )


def make_float8(block: tuple[int, int]) -> Float8Weight:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(SHAPE, generator=generator).to(torch.float8_e4m3fn)
    shape = (-(-SHAPE[0] // block[0]), -(-SHAPE[1] // block[1]))
    return Float8Weight(values, 0.01 + 0.01 * torch.rand(shape, generator=generator), block)


def make_codebook() -> CodebookWeight:
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, SHAPE, generator=generator).byte()
    levels = torch.linspace(-1, 1, 16)
    return CodebookWeight(codes, levels.half().float(), torch.rand(codes.numel() // 64), 64)


WEIGHTS: dict[str, Callable[[], Weight]] = {
    "int4 g128": lambda: make_grouped(4, 128, asymmetric=True, ordered=False),
    "int4 g32 ordered": lambda: make_grouped(4, 32, asymmetric=True, ordered=True),
    "int4 progressive": make_progressive,
    "int8 channels": lambda: make_grouped(8, SHAPE[1], asymmetric=False, ordered=False),
    "int8 g64 zero points": lambda: make_grouped(8, 64, asymmetric=True, ordered=True),
    "float8 channels": lambda: make_float8((1, SHAPE[1])),
    "float8 blocks": lambda: make_float8((128, 128)),
    "codebook": make_codebook,
}


@pytest.fixture
def device() -> torch.device:
    """The GPU that the tests run on."""
    return torch.device("cuda", torch.cuda.current_device())


def make_rows(num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, SHAPE[1], generator=generator).to(dtype)


def is_close(out: torch.Tensor, rows: torch.Tensor, dense: torch.Tensor) -> bool:
    """One rounding of the result; weights may be rounded to 16 bits after scaling; float32 sums.

    float8 products are summed with 14 bits on sm_90, for 128 inputs in a row. bfloat16 rounds the
    values of a codebook by 2^-9.
    """
    expected = rows.double() @ dense.double().T
    magnitude = rows.double().abs() @ dense.double().abs().T
    step = 2**-9 if out.dtype is torch.bfloat16 else 2**-11
    allowed = torch.finfo(out.dtype).eps / 2 * expected.abs() + step * magnitude
    return bool(((out.double() - expected).abs() <= allowed).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activations", ROUNDED)
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_matmul_computes_what_the_weight_stands_for(
    name: str, activations: Activations, dtype: torch.dtype, device: torch.device
) -> None:
    weight = WEIGHTS[name]()
    packed = prepare_linear(weight, device)
    assert packed.backend is Backend.TRITON
    for num_rows in ROWS:
        x = make_rows(num_rows, dtype)
        out = multiply(x.to(device), packed, activations=activations).cpu()
        assert is_close(out, round_activations(x, activations), weight.dequantize())


@pytest.mark.parametrize("activations", ROUNDED)
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_row_is_the_same_in_every_batch(
    name: str, activations: Activations, device: torch.device
) -> None:
    packed = prepare_linear(WEIGHTS[name](), device)
    x = make_rows(300, torch.bfloat16).to(device)
    row = multiply(x[:1], packed, activations=activations)
    for num_rows in ROWS[1:]:
        assert torch.equal(multiply(x[:num_rows], packed, activations=activations)[:1], row)


@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (8, SHAPE[1])])
@pytest.mark.parametrize("num_rows", [1, 40])
def test_rows_meet_their_experts(
    num_rows: int, bits: int, group_size: int, device: torch.device
) -> None:
    experts = [make_grouped(bits, group_size, False, False) for _ in range(8)]
    for number, expert in enumerate(experts):
        expert.codes.copy_(expert.codes.roll(number, 1))
    packed = prepare_experts(experts, device)
    assert packed.backend is Backend.TRITON
    generator = torch.Generator().manual_seed(3)
    ids = torch.rand(num_rows, 8, generator=generator).argsort(1)[:, :2].int()
    x = make_rows(num_rows, torch.bfloat16)
    out = expert_matmul(x.to(device), packed, ids.to(device), activations=Activations.FLOAT32)
    for number, expert in enumerate(experts):
        rows, places = (ids == number).nonzero(as_tuple=True)
        assert is_close(out.cpu()[rows, places], x[rows], expert.dequantize())


@pytest.mark.parametrize("name", [*WEIGHTS, "dense"])
@pytest.mark.parametrize("k", [1, 20])
def test_the_largest_logits_are_those_of_the_product(
    k: int, name: str, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(4)
    dense = torch.randn(*SHAPE, generator=generator).bfloat16()
    head = (
        prepare_dense(dense, device) if name == "dense" else prepare_linear(WEIGHTS[name](), device)
    )
    assert head.arrange is not None
    for num_rows in ROWS:
        x = make_rows(num_rows, torch.bfloat16).to(device)
        ids, values = topk_head(x, head, k)
        logits = multiply(x, head).float()
        assert torch.equal(values, logits.sort(1, descending=True).values[:, :k])
        assert torch.equal(logits.gather(1, ids), values)
