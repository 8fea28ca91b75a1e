"""Mixtures of experts: every row against the product with its expert alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from qserve.kernels import int8_matmul, native
from qserve.kernels.activations import Activations
from qserve.kernels.backend import Backend
from qserve.kernels.expert_matmul import (
    combine_experts,
    expert_matmul,
    prepare,
    reference,
    route_tokens,
)
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.linear_weight import NeutralWeight, prepare_linear
from qserve.kernels.packed_weight import multiply
from qserve.kernels.program import Program

MakeWeight = Callable[..., GroupedWeight]
MakeExperts = Callable[..., Sequence[NeutralWeight]]
NUM_EXPERTS = 6


@pytest.fixture
def make_experts(make_weight: MakeWeight, generator: torch.Generator) -> MakeExperts:
    def make(bits: int, num_outputs: int, num_inputs: int) -> Sequence[NeutralWeight]:
        if bits == 4:
            return [make_weight(num_outputs, num_inputs, 32) for _ in range(NUM_EXPERTS)]
        floats = torch.randn(NUM_EXPERTS, num_outputs, num_inputs, generator=generator)
        if bits == 8:
            return [int8_matmul.round_weight(weight) for weight in floats]
        return list(floats.bfloat16())

    return make


def one_by_one(
    x: torch.Tensor,
    experts: Sequence[NeutralWeight],
    ids: torch.Tensor,
    activations: Activations,
) -> torch.Tensor:
    packed = [prepare_linear(expert) for expert in experts]
    rows, top_k = ids.shape
    return torch.stack(
        [
            torch.cat(
                [
                    multiply(
                        x[m : m + 1] if x.dim() == 2 else x[m, j : j + 1],
                        packed[int(ids[m, j])],
                        activations=activations,
                    )
                    for j in range(top_k)
                ]
            )
            for m in range(rows)
        ]
    )


# Rows, outputs, inputs, experts of a row: one row; a few; more than are gathered at a time.
@pytest.mark.parametrize("shape", [(1, 40, 64, 2), (7, 33, 96, 3), (300, 20, 32, 2)], ids=str)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.usefixtures("isa")
def test_every_row_has_the_bits_of_the_product_with_its_expert_alone(
    bits: int,
    shape: tuple[int, int, int, int],
    make_experts: MakeExperts,
    generator: torch.Generator,
) -> None:
    rows, num_outputs, num_inputs, top_k = shape
    experts = make_experts(bits, num_outputs, num_inputs)
    packed = prepare(experts)
    assert packed.backend is Backend.CPU
    ids = torch.randint(NUM_EXPERTS, (rows, top_k), generator=generator, dtype=torch.int32)
    ids[: rows // 2] = 1  # one expert has most rows, and some row the same expert twice
    shared = torch.randn(rows, num_inputs, generator=generator)
    own = torch.randn(rows, top_k, num_inputs, generator=generator)
    for x in (shared, own):
        for activations in (Activations.INT8, Activations.FLOAT32, Activations.INT8_TOKEN):
            y = expert_matmul(x, packed, ids, activations=activations)
            assert torch.equal(y, one_by_one(x, experts, ids, activations))
            wide = torch.zeros(rows, top_k, num_outputs + 5)
            expert_matmul(x, packed, ids, out=wide[..., 2:-3], activations=activations)
            assert torch.equal(wide[..., 2:-3], y)
            assert not wide[..., :2].any() and not wide[..., -3:].any()


@pytest.mark.parametrize("bits", [4, 8])
def test_the_native_products_are_those_of_the_dequantized_weights(
    bits: int,
    make_experts: MakeExperts,
    product_bound: Callable[..., torch.Tensor],
    generator: torch.Generator,
) -> None:
    experts = make_experts(bits, 48, 64)
    ids = torch.tensor([[0, 5], [3, 3], [5, 1]], dtype=torch.int32)
    x = torch.randn(3, 64, generator=generator)
    y = expert_matmul(x, prepare(experts), ids, activations=Activations.FLOAT32)
    for m in range(3):
        for j in range(2):
            expert = experts[int(ids[m, j])]
            assert isinstance(expert, GroupedWeight)
            weight, row = expert.dequantize(), x[m : m + 1]
            assert ((y[m, j] - row @ weight.T).abs() <= product_bound(row, weight)).all()
    expert = experts[5]
    assert isinstance(expert, GroupedWeight)
    bound = product_bound(x, expert.dequantize())
    expert.codes[7, 3] ^= 1
    wrong = expert_matmul(x, prepare(experts), ids, activations=Activations.FLOAT32)
    assert ((wrong - y).abs()[0, 1] > bound[0])[7], "a code off by one stays within the tolerance"


@pytest.mark.usefixtures("isa", "restored_threads")
def test_a_row_alone_and_in_a_batch_of_32_has_the_same_bits_on_any_number_of_threads(
    make_experts: MakeExperts, generator: torch.Generator
) -> None:
    packed = prepare(make_experts(4, 520, 96))
    x = torch.randn(32, 96, generator=generator)
    ids = torch.randint(NUM_EXPERTS, (32, 2), generator=generator, dtype=torch.int32)
    native.set_num_threads(2)
    together = expert_matmul(x, packed, ids)
    native.set_num_threads(1)
    for row in range(32):
        alone = expert_matmul(x[row : row + 1], packed, ids[row : row + 1])
        assert torch.equal(alone[0], together[row])


@pytest.mark.usefixtures("isa")
def test_outputs_are_weighted_and_summed_in_order(generator: torch.Generator) -> None:
    y, weights = torch.randn(40, 3, 77, generator=generator), torch.rand(40, 3, generator=generator)
    expected = (y.double() * weights.double()[..., None]).sum(1)
    magnitude = (y.abs() * weights[..., None]).sum(1)
    found, by_reference = combine_experts(y, weights), torch.empty(40, 77)
    reference.combine_experts(y, weights, by_reference)
    for z in (found, by_reference):  # three products, two sums: a few units of 2^-24
        assert ((z - expected).abs() <= 4 * 2.0**-24 * magnitude).all()
    assert torch.equal(combine_experts(y[5:6], weights[5:6])[0], found[5])


@pytest.mark.parametrize("renormalize", [True, False])
def test_rows_go_to_their_most_likely_experts(
    renormalize: bool, generator: torch.Generator
) -> None:
    logits = torch.randn(50, 9, generator=generator) * 3
    ids, weights = route_tokens(logits, 4, renormalize=renormalize)
    chosen = logits.double().softmax(1).topk(4)
    expected = chosen.values
    if renormalize:
        expected = expected / expected.sum(1, keepdim=True)
    assert torch.equal(ids, chosen.indices.int())
    assert ((weights - expected).abs() <= 1e-6 * expected).all()
    by_reference = torch.empty_like(ids), torch.empty_like(weights)
    reference.route_tokens(logits, renormalize, *by_reference)
    assert torch.equal(by_reference[0], ids)
    assert torch.allclose(by_reference[1], weights, rtol=1e-5, atol=0)


def test_of_equally_likely_experts_the_first_are_taken_and_nan_shows() -> None:
    logits = torch.zeros(2, 8)
    logits[1, 6] = torch.nan
    ids, weights = route_tokens(logits, 3)
    assert ids[0].tolist() == [0, 1, 2]
    assert ids[1, 0] == 6 and weights[1].isnan().all()
    assert route_tokens(torch.randn(3, 4), 4)[0].sort(1).values.tolist() == [[0, 1, 2, 3]] * 3


def test_a_recorded_layer_reads_where_rows_go_when_it_runs(make_experts: MakeExperts) -> None:
    packed = prepare(make_experts(4, 32, 64))
    x, logits = torch.randn(2, 64), torch.zeros(2, NUM_EXPERTS)
    ids, weights = torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, 2)
    y, z = torch.zeros(2, 2, 32), torch.zeros(2, 32)

    def layer() -> None:
        route_tokens(logits, 2, out=(ids, weights))
        expert_matmul(x, packed, ids, out=y)
        combine_experts(y, weights, out=z)

    program = Program(layer)
    assert len(program) == 3 and not z.any()
    for seed in range(2):
        logits.copy_(torch.randn(2, NUM_EXPERTS, generator=torch.Generator().manual_seed(seed)))
        program.run()
        chosen, shares = route_tokens(logits, 2)
        assert torch.equal(z, combine_experts(expert_matmul(x, packed, chosen), shares))


@pytest.mark.parametrize("expert", [-1, NUM_EXPERTS])
def test_an_expert_that_is_not_there_is_refused(expert: int, make_experts: MakeExperts) -> None:
    packed = prepare(make_experts(8, 16, 64))
    ids = torch.tensor([[0, expert]], dtype=torch.int32)
    with pytest.raises(ValueError, match="expert"):
        expert_matmul(torch.zeros(1, 64), packed, ids)


def test_operands_that_do_not_fit_are_refused(make_experts: MakeExperts) -> None:
    packed, ids = prepare(make_experts(8, 16, 64)), torch.zeros(3, 2, dtype=torch.int32)
    for x in (torch.zeros(3, 63), torch.zeros(2, 64), torch.zeros(3, 1, 64)):
        with pytest.raises(ValueError, match="expected"):
            expert_matmul(x, packed, ids)
    with pytest.raises(TypeError, match="int32"):
        expert_matmul(torch.zeros(3, 64), packed, ids.long())
    with pytest.raises(ValueError, match="expected"):
        expert_matmul(torch.zeros(3, 64), packed, ids, out=torch.zeros(3, 16))
    with pytest.raises(ValueError, match="expected"):
        prepare([])
    with pytest.raises(ValueError, match="expected one"):
        prepare([torch.zeros(4, 8), torch.zeros(8, 8)])
    with pytest.raises(ValueError, match="expected"):
        combine_experts(torch.zeros(3, 2, 8), torch.zeros(3, 3))
    with pytest.raises(ValueError, match="expected"):
        route_tokens(torch.zeros(2, 4), 5)
