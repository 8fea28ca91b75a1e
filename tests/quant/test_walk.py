"""A block walked stage by stage computes what it computes in one go, for two models at once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qserve.kernels.activations import Activations
from qserve.quant.decoder import Block, Decoder
from qserve.quant.walk import ScratchMemory, walk_

HiddenStates = Callable[[Decoder], torch.Tensor]


def test_a_walk_ends_where_a_run_does_and_shows_the_inputs_of_every_stage(
    decoder: Decoder, hidden_states: HiddenStates
) -> None:
    hidden = hidden_states(decoder)
    block = decoder.block(1, hidden.shape[1])
    shown: dict[str, torch.Tensor] = {}
    names = [name for stage in block.stages for name in stage.linears]
    hooks = [
        block.linear(name).register_forward_pre_hook(
            lambda _, args, name=name: shown.update({name: args[0]})
        )
        for name in names
    ]
    expected = hidden.clone()
    block.run_(expected)  # the hooks keep the inputs of the last window
    last = dict(shown)
    for hook in hooks:
        hook.remove()
    for stage, windows in walk_(block, hidden, ScratchMemory()):
        *_, seen = windows
        for name in stage.linears:
            torch.testing.assert_close(seen.received, last.pop(name)[0])
    assert last == {}
    torch.testing.assert_close(hidden, expected)


def test_later_stages_see_weights_replaced_on_the_way(
    decoder: Decoder, hidden_states: HiddenStates
) -> None:
    walked = hidden_states(decoder)
    expected = walked.clone()
    block = decoder.block(0, walked.shape[1])
    for stage, _ in walk_(block, walked, ScratchMemory()):
        for name in stage.linears:
            block.linear(name).weight.mul_(1.1)
    block.run_(expected)
    torch.testing.assert_close(walked, expected)


def received_by(block: Block, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """What every stage receives for all windows ``[S, T, K]``; ``hidden`` becomes the output."""
    return {
        stage.name: torch.stack([seen.received.clone() for seen in windows])
        for stage, windows in walk_(block, hidden, ScratchMemory())
    }


def test_the_float_model_is_shown_beside_and_ends_where_it_does_alone(
    decoder: Decoder, hidden_states: HiddenStates
) -> None:
    hidden = hidden_states(decoder)
    exact = hidden + 0.1 * hidden.flip(0)
    expected = exact.clone()
    float_inputs = received_by(decoder.block(0, hidden.shape[1]), expected)

    block = decoder.block(0, hidden.shape[1])
    block.round_inputs_([name for s in block.stages for name in s.linears], Activations.INT8_TOKEN)
    alone = hidden.clone()
    quantized_inputs = received_by(block, alone)
    together = hidden.clone()
    for stage, windows in walk_(block, together, ScratchMemory(), exact):
        for seen in windows:
            assert seen.exact is not None
            assert torch.equal(seen.exact, float_inputs[stage.name][seen.index]), stage.name
            assert torch.equal(seen.received, quantized_inputs[stage.name][seen.index]), stage.name
            assert (seen.hidden is not None) == block.adds(stage)
    assert torch.equal(together, alone)
    assert torch.equal(exact, expected)


def test_weights_replaced_on_the_way_do_not_reach_the_float_model(
    decoder: Decoder, hidden_states: HiddenStates
) -> None:
    hidden = hidden_states(decoder)
    exact, expected = hidden.clone(), hidden.clone()
    block = decoder.block(0, hidden.shape[1])
    for stage, windows in walk_(block, hidden, ScratchMemory(), exact):
        assert len(list(windows)) == len(hidden)
        for name in stage.linears:
            block.linear(name).weight.mul_(1.1)
    decoder.block(0, hidden.shape[1]).run_(expected)
    torch.testing.assert_close(exact, expected)
    assert not torch.allclose(hidden, expected, rtol=1e-3)
