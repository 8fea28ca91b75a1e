"""Weights in pieces: all rows, in order, and the same codes as in one go."""

from __future__ import annotations

import pytest
import torch

from qserve.quant import stacked_rows
from qserve.quant.codes import Coder, join_rows
from qserve.quant.methods import profile_of
from qserve.quant.objective import GramMatrix
from qserve.quant.options import Method, QuantizeOptions
from qserve.quant.stacked_rows import pieces_of
from qserve.quant.steps import Steps

NUM_INPUTS = 64


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked_rows, "NUMBERS_AT_ONCE", 300 * NUM_INPUTS)


def layers() -> list[torch.Tensor]:
    """Weights of 100, 500 and 30 rows."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(rows, NUM_INPUTS, generator=draw) for rows in (100, 500, 30)]


def test_pieces_hold_all_rows_in_order() -> None:
    weights = layers()
    pieces = list(pieces_of(weights))
    assert [(piece.rows.start, piece.rows.stop) for piece in pieces] == [
        (0, 256),
        (256, 512),
        (512, 630),
    ]
    assert [(piece.layers, piece.sizes) for piece in pieces] == [
        ((0, 1), [100, 156]),
        ((1,), [256]),
        ((1, 2), [88, 30]),
    ]
    assert torch.equal(torch.cat([piece.read() for piece in pieces]), torch.cat(weights))


def test_a_whole_layer_may_be_asked_for() -> None:
    assert [piece.sizes for piece in pieces_of(layers(), whole=True)] == [[100], [500], [30]]


def test_what_is_written_to_a_piece_is_in_the_weights() -> None:
    weights = layers()
    expected = 2 * torch.cat(weights)
    for piece in pieces_of(weights):
        piece.write_(2 * piece.read())
    assert torch.equal(torch.cat(weights), expected)


@pytest.mark.parametrize(
    "method", [Method.AWQ, Method.GPTQ, Method.INT8, Method.QOQ, Method.FLOAT8]
)
def test_joined_pieces_are_the_layer_in_one_go(method: Method) -> None:
    weight, levels = layers()[1], profile_of(QuantizeOptions(method=method)).levels
    gram = GramMatrix(NUM_INPUTS)
    gram.add(torch.randn(400, NUM_INPUTS, generator=torch.Generator().manual_seed(1)))
    group_size = NUM_INPUTS if levels.bits == 8 else 32
    coder = Coder(gram.mean(), group_size, levels, Steps())
    whole = coder.choose(weight).pack()
    joined = join_rows([coder.choose(piece.read()).pack() for piece in pieces_of([weight])])
    assert torch.equal(joined.dequantize(), whole.dequantize())
    assert type(joined) is type(whole)
