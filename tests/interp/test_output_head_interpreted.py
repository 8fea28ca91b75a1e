"""The Triton search for the largest logits agrees with its definition, with heads of every kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qserve.kernels.activations import Activations
from qserve.kernels.dense_matmul import kernel as dense_kernel
from qserve.kernels.gpu_target import TARGETS
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.int4_matmul import kernel as int4_kernel
from qserve.kernels.int8_matmul import kernel as int8_kernel
from qserve.kernels.output_head import kernel, topk_head
from qserve.kernels.output_head.launch import head_launch
from qserve.kernels.packed_weight import PackedWeight

CPU = torch.device("cpu")
DTYPES = (torch.float16, torch.bfloat16)
NUM_OUTPUTS, NUM_INPUTS = 100, 160  # a tile and a part of one, a block and a part of one
KERNELS = (dense_kernel, int4_kernel, int8_kernel)


@pytest.fixture(autouse=True)
def target(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Chooses the target that launch rules see, at first one without inline assembly."""

    def choose(name: str) -> None:
        for module in KERNELS:
            monkeypatch.setattr(module, "gpu_target", lambda _: TARGETS[name])

    choose("gfx942")
    return choose


def make_weight(bits: int) -> GroupedWeight:
    """A random weight in groups of 32 whose codes use all values."""
    generator = torch.Generator().manual_seed(bits)
    shape, groups = (NUM_OUTPUTS, NUM_INPUTS), (NUM_OUTPUTS, NUM_INPUTS // 32)
    return GroupedWeight(
        codes=torch.randint(0, 1 << bits, shape, generator=generator).byte(),
        scales=(0.01 + 0.02 * torch.rand(groups, generator=generator)).half(),
        zero_points=torch.full(groups, 1 << (bits - 1)).byte(),
        bits=bits,
        group_size=32,
    )


def make_dense(dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(NUM_OUTPUTS, NUM_INPUTS, generator=generator).to(dtype)


def make_rows(num_rows: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, NUM_INPUTS, generator=generator).to(dtype)


HEADS: dict[str, Callable[[torch.dtype], PackedWeight]] = {
    "int4": lambda _: int4_kernel.prepare(make_weight(4), CPU, torch.linspace(-1, 1, NUM_OUTPUTS)),
    "int8": lambda _: int8_kernel.prepare(make_weight(8), CPU),
    "16-bit": lambda dtype: dense_kernel.prepare(make_dense(dtype), CPU),
}


def largest(
    x: torch.Tensor, head: PackedWeight, k: int, activations: Activations
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and logits by the product and a sort: what the op is defined as."""
    logits = torch.empty(x.shape[0], head.out_features, dtype=x.dtype)
    head.run(x, logits, activations)
    values, ids = logits.float().sort(dim=1, descending=True, stable=True)
    return ids[:, :k], values[:, :k]


def assert_same(
    x: torch.Tensor, head: PackedWeight, k: int, activations: Activations = Activations.FLOAT32
) -> None:
    ids, values = kernel.topk_head(x, head, k, activations)
    expected_ids, expected_values = largest(x, head, k, activations)
    assert torch.equal(values, expected_values)
    assert torch.equal(ids, expected_ids)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", HEADS)
def test_ids_and_logits_are_those_of_the_product(
    name: str, dtype: torch.dtype, target: Callable[[str], None]
) -> None:
    target("sm_80" if dtype is torch.float16 else "gfx942")
    head, x = HEADS[name](dtype), make_rows(2, dtype)
    for k in (1, 3):
        assert_same(x, head, k)


def test_rounded_rows_are_searched_as_well() -> None:
    head = int8_kernel.prepare(make_weight(8), CPU)
    assert_same(make_rows(2, torch.bfloat16), head, 3, Activations.INT8_TOKEN)


def test_more_logits_than_a_tile_has_outputs_are_found() -> None:
    head = dense_kernel.prepare(make_dense(torch.float16), CPU)
    assert_same(make_rows(1, torch.float16), head, 66)


def test_segments_are_added_by_one_thread_block() -> None:
    head = dense_kernel.prepare(make_dense(torch.float16), CPU)
    x = make_rows(2, torch.float16)
    assert head.arrange is not None
    product = head.arrange(x, Activations.FLOAT32)
    cut = replace(product.launch, num_segments=2, blocks_per_segment=1, parallel=True)
    ids, values = kernel.find_largest(product, head_launch(cut, 2), x.dtype)
    exact = x.double() @ make_dense(torch.float16).double().T
    assert torch.equal(ids, exact.topk(2).indices)
    assert torch.allclose(values.double(), exact.topk(2).values, rtol=2**-10)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_code_off_by_one_step_is_noticed(bits: int) -> None:
    pack = int4_kernel.prepare if bits == 4 else int8_kernel.prepare
    weight, x = make_weight(bits), torch.eye(NUM_INPUTS)[5:6].half()
    ids, values = kernel.topk_head(x, pack(weight, CPU), 1, Activations.FLOAT32)
    codes = weight.codes.clone()
    codes[int(ids), 5] -= 1
    changed = pack(replace(weight, codes=codes), CPU)
    assert float(kernel.topk_head(x, changed, 1, Activations.FLOAT32)[1]) < float(values)


def test_nan_comes_first_and_of_equals_the_lowest_id() -> None:
    weight = torch.zeros(NUM_OUTPUTS, NUM_INPUTS).half()
    weight[:, 0] = -1.0
    weight[[3, 70, 71, 99], 0] = 1.0
    weight[[5, 90], 0] = torch.tensor([-0.0, 0.0]).half()
    weight[[40, 80], 0] = torch.nan
    weight[60, 0] = torch.inf
    x = torch.eye(NUM_INPUTS).half()[:1]
    head = dense_kernel.prepare(weight, CPU)
    ids, values = kernel.topk_head(x, head, 10, Activations.FLOAT32)
    assert ids.tolist() == [[40, 80, 60, 3, 70, 71, 99, 5, 90, 0]]
    assert values[0, :2].isnan().all() and values[0, 2:].tolist() == [
        torch.inf,
        *[1.0] * 4,
        0,
        0,
        -1,
    ]


def test_minus_infinity_everywhere_gives_the_first_ids() -> None:
    weight = torch.zeros(NUM_OUTPUTS, NUM_INPUTS).half()
    weight[:, 0] = -torch.inf
    head = dense_kernel.prepare(weight, CPU)
    x = torch.eye(NUM_INPUTS).half()[:1]
    ids, _ = kernel.topk_head(x, head, 3, Activations.FLOAT32)
    assert ids.tolist() == [[0, 1, 2]]


def test_the_op_takes_a_head_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    head = dense_kernel.prepare(make_dense(torch.float16), CPU)
    monkeypatch.setattr("qserve.kernels.output_head.check_rows", lambda *_: None)
    x = make_rows(1, torch.float16)
    ids, _ = topk_head(x, head, 2)
    assert torch.equal(ids, largest(x, head, 2, Activations.FLOAT32)[0])
