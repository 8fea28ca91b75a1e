"""Folding a scale changes the weights of a block and not what it computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qserve.quant.decoder import Block, Decoder
from qserve.quant.folding import fold_, settle_, sharing_of
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.options import QuantizeOptions
from qserve.quant.plan import make_plan

STAGES = ("attention input", "attention output", "mlp input", "mlp output")
HiddenStates = Callable[[Decoder], torch.Tensor]


def random_scale(block: Block, stage_name: str) -> torch.Tensor:
    """A scale of 1/20 to 20 for the inputs of a stage, shared where it must be."""
    stage = next(s for s in block.stages if s.name == stage_name)
    width = block.linear(stage.linears[0]).in_features
    scale = torch.randn(width, generator=torch.Generator().manual_seed(0)).clamp(-3, 3).exp()
    sharing = sharing_of(block, stage)
    return scale if sharing is None else sharing.share(scale)


def block_with_biases(make_tiny_llama: Callable[..., Path]) -> tuple[Decoder, Block]:
    """A block with random biases, two query heads to a value head, and uneven norms."""
    decoder = Decoder(
        Checkpoint(make_tiny_llama(attention_bias=True, mlp_bias=True, num_hidden_layers=1))
    )
    block = decoder.block(0, 48)
    draw = torch.Generator().manual_seed(2)
    for name, parameter in block.layer.named_parameters():
        if name.endswith("bias") or "layernorm" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return decoder, block


@pytest.mark.parametrize("stage_name", STAGES)
def test_a_folded_block_computes_the_same(
    make_tiny_llama: Callable[..., Path], hidden_states: HiddenStates, stage_name: str
) -> None:
    decoder, block = block_with_biases(make_tiny_llama)
    hidden = hidden_states(decoder)
    before, after = hidden.clone(), hidden.clone()
    block.run_(before)
    stage = next(s for s in block.stages if s.name == stage_name)
    weights = [block.linear(name).weight.clone() for name in stage.linears]
    applied = fold_(block, stage, random_scale(block, stage_name))
    block.run_(after)
    # The function is the same but for float32 rounding: 1e-5 of the largest value.
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5
    for name, weight in zip(stage.linears, weights, strict=True):
        torch.testing.assert_close(block.linear(name).weight, weight * applied)
    assert float(applied.max() / applied.min()) > 10


def test_a_scale_behind_a_norm_leaves_a_norm_that_float16_holds(
    make_tiny_llama: Callable[..., Path],
) -> None:
    _, block = block_with_biases(make_tiny_llama)
    scale = random_scale(block, "mlp input")
    applied = fold_(block, block.stages[2], scale)
    norm = block.module("post_attention_layernorm").get_parameter("weight")
    assert torch.equal(norm, norm.half().float())
    torch.testing.assert_close(applied, scale, rtol=2**-10, atol=0)


def test_a_norm_weight_of_zero_is_left_alone(make_tiny_llama: Callable[..., Path]) -> None:
    _, block = block_with_biases(make_tiny_llama)
    norm = block.module("input_layernorm").get_parameter("weight")
    norm[5] = 0
    applied = fold_(block, block.stages[0], random_scale(block, "attention input"))
    assert float(applied[5]) == 1.0
    assert bool(torch.isfinite(applied).all())


def test_settled_parameters_are_what_a_reader_will_see(
    make_tiny_llama: Callable[..., Path],
) -> None:
    decoder, block = block_with_biases(make_tiny_llama)
    plan = make_plan(decoder, QuantizeOptions(group_size=32, ignore=("o_proj",)))
    block.linear("self_attn.o_proj").weight.mul_(1.2345)
    kept = block.linear("mlp.up_proj").weight.mul_(1.2345).clone()
    settle_(block, plan)
    for name, parameter in block.layer.named_parameters():
        if name.endswith("bias") or "norm" in name or "o_proj" in name:
            assert torch.equal(parameter, parameter.half().float()), name
    assert torch.equal(block.linear("mlp.up_proj").weight, kept)
