"""The objective is the output error itself, computed without the outputs."""

from __future__ import annotations

import torch

from qserve.quant.objective import GramMatrix, diagonal_blocks, output_errors


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal values from a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(inputs: torch.Tensor) -> torch.Tensor:
    """The Gram matrix of inputs given in one piece."""
    gram = GramMatrix(inputs.shape[-1])
    gram.add(inputs)
    return gram.mean()


def test_inputs_in_pieces_give_their_mean_outer_product() -> None:
    inputs = normal(5, 40, 600)  # wider than two tiles, and not a multiple of one
    gram = GramMatrix(600)
    for piece in inputs:
        gram.add(piece)
    rows = inputs.flatten(0, 1).double()
    torch.testing.assert_close(gram.mean().double(), rows.T @ rows / 200, rtol=1e-5, atol=1e-5)


def test_output_errors_are_those_of_the_outputs() -> None:
    inputs, weight, replaced = normal(300, 64), normal(700, 64, seed=1), normal(700, 64, seed=2)
    outputs = inputs.double() @ (replaced - weight).double().T
    expected = outputs.square().mean(0)
    found = output_errors(replaced - weight, gram_of(inputs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_an_input_that_never_fires_counts_as_an_average_one() -> None:
    inputs = normal(100, 8)
    inputs[:, 3] = 0
    gram = gram_of(inputs)
    alive = torch.cat([gram.diagonal()[:3], gram.diagonal()[4:]])
    assert torch.isclose(gram[3, 3], alive.mean())
    assert gram[3].count_nonzero() == 1


def test_inputs_that_are_all_zero_count_alike() -> None:
    assert torch.equal(gram_of(torch.zeros(10, 4)), torch.eye(4))


def test_diagonal_blocks_are_the_gram_matrices_of_the_groups() -> None:
    inputs = normal(50, 12)
    blocks = diagonal_blocks(gram_of(inputs), 4)
    for index, block in enumerate(blocks):
        torch.testing.assert_close(block, gram_of(inputs[:, 4 * index : 4 * index + 4]))
