"""The largest logits of a head, against the product and a sort, to the bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qserve.kernels import dense_matmul, int4_matmul, int8_matmul, native
from qserve.kernels.activations import Activations
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.output_head import argmax_head, reference, topk_head
from qserve.kernels.packed_weight import PackedWeight, multiply

MakeWeight = Callable[..., GroupedWeight]
MODES = (Activations.INT8, Activations.FLOAT32)
# Vocabularies: less than a panel, of no whole panel, of several pieces, of several tasks.
SHAPES = [(1, 5, 64), (3, 33, 96), (2, 700, 64), (17, 5003, 64), (150, 300, 32)]


@pytest.fixture
def heads(make_weight: MakeWeight, generator: torch.Generator) -> Callable[..., list[PackedWeight]]:
    """Heads of one shape in every format."""

    def make(num_outputs: int, num_inputs: int) -> list[PackedWeight]:
        weight = torch.randn(num_outputs, num_inputs, generator=generator)
        return [
            int4_matmul.prepare(make_weight(num_outputs, num_inputs, 32)),
            int8_matmul.quantize_int8(weight),
            dense_matmul.prepare(weight.bfloat16()),
            dense_matmul.prepare(weight.half()),
        ]

    return make


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("isa")
def test_ids_and_logits_are_those_of_the_product(
    shape: tuple[int, int, int],
    heads: Callable[..., list[PackedWeight]],
    generator: torch.Generator,
) -> None:
    num_rows, num_outputs, num_inputs = shape
    x = torch.randn(num_rows, num_inputs, generator=generator)
    for head in heads(num_outputs, num_inputs):
        for activations in MODES:
            logits = multiply(x, head, activations=activations)
            for k in (1, 3, 5):
                ids, values = topk_head(x, head, k, activations=activations)
                assert torch.equal(values, logits.sort(1, descending=True).values[:, :k])
                assert torch.equal(logits.gather(1, ids), values)
            best, value = argmax_head(x, head, activations=activations)
            assert torch.equal(best, ids[:, 0]) and torch.equal(value, values[:, 0])


@pytest.mark.usefixtures("isa", "restored_threads")
def test_a_row_alone_and_in_a_batch_of_32_gives_the_same_on_any_number_of_threads(
    heads: Callable[..., list[PackedWeight]], generator: torch.Generator
) -> None:
    x = torch.randn(32, 64, generator=generator)
    for head in heads(3001, 64):
        native.set_num_threads(2)
        ids, values = topk_head(x, head, 4, activations=Activations.INT8)
        native.set_num_threads(1)
        for row in range(32):
            one, logit = topk_head(x[row : row + 1], head, 4, activations=Activations.INT8)
            assert torch.equal(one[0], ids[row]) and torch.equal(logit[0], values[row])


def one_hot_head(logits: torch.Tensor) -> PackedWeight:
    """A head that gives these logits for an input of 1, 0, 0, ..."""
    weight = torch.zeros(logits.numel(), 64)
    weight[:, 0] = logits
    return dense_matmul.prepare(weight)


@pytest.mark.usefixtures("isa")
def test_of_equals_the_lowest_id_is_taken() -> None:
    logits = torch.zeros(4000)
    logits[[3, 700, 701, 3999]] = 1.0
    ids, values = topk_head(torch.eye(64)[:1], one_hot_head(logits), 6)
    assert ids.tolist() == [[3, 700, 701, 3999, 0, 1]]
    assert values.tolist() == [[1.0, 1.0, 1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize("topk", [topk_head, reference.topk_head], ids=["native", "reference"])
@pytest.mark.usefixtures("isa")
def test_nan_is_larger_than_every_number(topk: Callable[..., tuple[torch.Tensor, ...]]) -> None:
    logits = torch.arange(2000.0)
    logits[[40, 1500]] = torch.nan
    logits[900] = torch.inf
    operands = (torch.eye(64)[:1], one_hot_head(logits))
    native_arguments = {"activations": Activations.FLOAT32}
    ids, values = topk(*operands, 4, **native_arguments)
    assert ids.tolist() == [[40, 1500, 900, 1999]]
    assert values[0, :2].isnan().all()


@pytest.mark.usefixtures("isa")
def test_minus_infinity_everywhere_gives_the_first_ids() -> None:
    head = one_hot_head(torch.full((600,), -torch.inf))
    assert topk_head(torch.eye(64)[:1] + 1e-30, head, 3)[0].tolist() == [[0, 1, 2]]


def test_one_step_of_a_code_shows_in_the_logit(generator: torch.Generator) -> None:
    weight = int8_matmul.round_weight(torch.randn(64, 64, generator=generator))
    x = torch.rand(1, 64, generator=generator) + 1.0
    best, value = argmax_head(x, int8_matmul.prepare(weight))
    weight.codes[int(best), 5] -= 1
    changed = topk_head(x, int8_matmul.prepare(weight), 64)
    place = changed[0][0].tolist().index(int(best))
    assert changed[1][0, place] < value[0]


def test_what_is_found_is_written_where_it_is_wanted() -> None:
    ids, values = torch.empty(1, dtype=torch.int64), torch.empty(1)
    head = one_hot_head(torch.tensor([1.0, 4.0, 3.0]))
    found = argmax_head(torch.eye(64)[:1], head, out=(ids, values))
    assert (ids.tolist(), values.tolist()) == ([1], [4.0])
    assert found[0].data_ptr() == ids.data_ptr() and found[1].data_ptr() == values.data_ptr()


def test_arguments_that_do_not_fit_are_refused() -> None:
    head = dense_matmul.prepare(torch.ones(4, 8))
    with pytest.raises(ValueError, match="expected contiguous"):
        argmax_head(torch.zeros(1, 8), head, out=(torch.zeros(2).long(), torch.zeros(2)))
    with pytest.raises(TypeError, match="expected torch.int64"):
        argmax_head(torch.zeros(1, 8), head, out=(torch.zeros(1), torch.zeros(1)))
    for k in (0, 5):
        with pytest.raises(ValueError, match="expected 1 to 4"):
            topk_head(torch.zeros(1, 8), head, k)
    with pytest.raises(ValueError, match="expected"):
        argmax_head(torch.zeros(1, 9), head)
