"""The Triton products of experts are those of each row with the expert it is sent to."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from qserve.kernels.activations import Activations, round_activations
from qserve.kernels.expert_matmul import kernel
from qserve.kernels.gpu_target import TARGETS
from qserve.kernels.grouped_weight import GroupedWeight

CPU = torch.device("cpu")
NUM_OUTPUTS = 40
IDS = torch.tensor([[2, 0], [2, 3], [3, 2]]).int()  # no row for expert 1


def make_experts(bits: int, group_size: int) -> list[GroupedWeight]:
    generator = torch.Generator().manual_seed(bits)
    groups = (NUM_OUTPUTS, 128 // group_size)
    return [
        GroupedWeight(
            codes=torch.randint(0, 1 << bits, (NUM_OUTPUTS, 128), generator=generator).byte(),
            scales=(0.001 + 0.002 * torch.rand(groups, generator=generator)).half(),
            zero_points=torch.full(groups, 1 << (bits - 1)).byte(),
            bits=bits,
            group_size=group_size,
        )
        for _ in range(4)
    ]


def run_product(
    x: torch.Tensor, experts: Sequence[GroupedWeight], how: Activations = Activations.FLOAT32
) -> torch.Tensor:
    """The products in a tensor full of NaN: what the kernel does not write cannot pass."""
    out = torch.full((*IDS.shape, NUM_OUTPUTS), float("nan"), dtype=x.dtype)
    kernel.ExpertProduct(experts, CPU).run(x, IDS, out, how)
    return out


def is_close(out: torch.Tensor, x: torch.Tensor, experts: Sequence[GroupedWeight]) -> bool:
    """Whether ``out`` are the products: exact to 2^-20, then rounded once to their dtype."""
    dense = torch.stack([expert.dequantize() for expert in experts]).double()[IDS.long()]
    rows = (x[:, None] if x.dim() == 2 else x).double()[..., None, :]
    expected = (rows * dense).sum(-1)
    magnitude = (rows * dense).abs().sum(-1)
    allowed = torch.finfo(out.dtype).eps / 2 * expected.abs() + 2**-20 * magnitude
    return bool(((out.double() - expected).abs() <= allowed).all())


@pytest.fixture(autouse=True)
def _target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "gpu_target", lambda _: TARGETS["sm_80"])


@pytest.mark.parametrize(("bits", "group_size"), [(4, 64), (8, 32), (8, 128)])
@pytest.mark.parametrize("shape", [(3, 128), (3, 2, 128)])
def test_each_row_meets_its_expert(shape: tuple[int, ...], bits: int, group_size: int) -> None:
    experts = make_experts(bits, group_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = run_product(x, experts)
    assert is_close(out, x, experts)
    assert not is_close(out, x, [*experts[1:], experts[0]])


def test_rounded_rows_keep_their_scales() -> None:
    experts = make_experts(8, 128)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).half()
    x *= torch.tensor([[1.0], [4.0], [0.25]])
    out = run_product(x, experts, Activations.INT8_TOKEN)
    assert is_close(out, round_activations(x, Activations.INT8_TOKEN), experts)


def test_a_code_off_by_one_step_is_noticed() -> None:
    experts = make_experts(4, 64)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    out = run_product(x, experts)
    experts[3].codes[39, 127] ^= 1
    assert not is_close(out, x, experts)
