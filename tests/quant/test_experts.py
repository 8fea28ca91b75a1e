"""Mixtures of experts: what each expert learns its codes from, what stays, what is stored."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM, Qwen2MoeForCausalLM

from qserve.quant.decoder import Block, Decoder
from qserve.quant.errors import OptionError
from qserve.quant.estimate import estimate
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.registry import OutputFormat
from qserve.quant.mixture import Mixer
from qserve.quant.options import Effort, Method, QuantizeOptions, TuneOptions
from qserve.quant.overrides import parse_override
from qserve.quant.pipeline import quantize
from qserve.quant.plan import Plan, block_name, make_plan
from qserve.quant.progress import Progress, ignore_progress
from qserve.quant.target import Target
from qserve.quant.walk import ScratchMemory, walk_
from qserve.quant.windows import windows_of_text

MakeLlama = Callable[..., Path]
HiddenStates = Callable[[Decoder], torch.Tensor]
NUM_EXPERTS = 4


@pytest.fixture(scope="session")
def mixtral(make_tiny_llama: MakeLlama) -> Path:
    """Two blocks of four experts."""
    return make_tiny_llama(model_class=MixtralForCausalLM, num_local_experts=NUM_EXPERTS)


@pytest.fixture(scope="session")
def qwen2(make_tiny_llama: MakeLlama) -> Path:
    """A block with a plain MLP, and one of four experts and one that is shared."""
    return make_tiny_llama(
        model_class=Qwen2MoeForCausalLM,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=96,
        mlp_only_layers=[0],
    )


def plan_for(folder: Path, **options: Any) -> Plan:
    return make_plan(Decoder(Checkpoint(folder)), QuantizeOptions(**options))


def mixture_inputs(block: Block, hidden: torch.Tensor) -> torch.Tensor:
    """What the experts of a block receive, ``[T, hidden_size]``."""
    seen: list[torch.Tensor] = []
    assert block.mixture is not None
    handle = block.mixture.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    block.run_(hidden.clone())
    handle.remove()
    return torch.cat(seen)


def test_an_expert_is_shown_its_tokens_as_heavy_as_their_outputs(
    qwen2: Path, hidden_states: HiddenStates
) -> None:
    decoder = Decoder(Checkpoint(qwen2))
    hidden = hidden_states(decoder)
    block = decoder.block(1, hidden.shape[1])
    inputs = mixture_inputs(block, hidden)
    assert block.mixture is not None
    likely = block.mixture.gate(inputs).softmax(-1)
    chosen = likely.topk(2).indices
    shown = {
        stage.linears[0].removeprefix("mlp."): torch.cat([seen.received for seen in windows])
        for stage, windows in walk_(block, hidden, ScratchMemory())
        if "mlp" in stage.linears[0]
    }
    for index, expert in enumerate(block.mixture.experts):
        tokens = (chosen == index).any(1).nonzero()[:, 0]
        weights = likely[tokens, index, None]
        expected = inputs[tokens] * weights
        torch.testing.assert_close(shown[f"experts.{index}.gate_proj"], expected)
        inner = block.mixture.members[index].inner(inputs[tokens]) * weights
        torch.testing.assert_close(shown[f"experts.{index}.down_proj"], inner)
        assert expert is block.mixture.members[index]
    weights = block.mixture.shared_expert_gate(inputs).sigmoid()
    torch.testing.assert_close(shown["shared_expert.gate_proj"], inputs * weights)


def test_an_expert_that_few_tokens_go_to_is_shown_those_that_came_nearest(
    mixtral: Path, hidden_states: HiddenStates
) -> None:
    decoder = Decoder(Checkpoint(mixtral))
    hidden = hidden_states(decoder)
    num_tokens = hidden.shape[0] * hidden.shape[1]
    block = decoder.block(0, hidden.shape[1])
    inputs = mixture_inputs(block, hidden)
    assert block.mixture is not None
    routing = block.mixture.route(inputs)
    found = {
        stage.name: (
            torch.cat([one.received for one in some]),
            sum(one.num_borrowed for one in some),
        )
        for stage, windows in walk_(block, hidden, ScratchMemory(), least_per_input=1)
        for some in [[replace(one, received=one.received.clone()) for one in windows]]
    }
    for index in range(NUM_EXPERTS):
        own = routing.chosen[:, index]
        rows, num_borrowed = found[f"expert {index} input"]
        num_own = int(own.sum())
        assert len(rows) == max(128, num_own) < num_tokens  # the wider of its layers has 128 inputs
        assert num_borrowed == max(128 - num_own, 0)
        near = routing.weights[:, index].masked_fill(own, 2).topk(len(rows)).indices.sort().values
        usual = routing.weights[own, index].mean()
        weights = torch.where(own, routing.weights[:, index], usual / 2)[near, None]
        torch.testing.assert_close(rows, inputs[near] * weights)


def test_no_expert_is_shown_what_does_not_count(mixtral: Path, hidden_states: HiddenStates) -> None:
    decoder = Decoder(Checkpoint(mixtral))
    hidden = hidden_states(decoder)
    counts = torch.arange(hidden.shape[1]).expand(len(hidden), -1) >= 30
    block = decoder.block(0, hidden.shape[1])
    inputs = mixture_inputs(block, hidden)
    assert block.mixture is not None
    routing = block.mixture.route(inputs)
    for least_per_input in (0, 1):
        walk = walk_(block, hidden.clone(), ScratchMemory(), None, least_per_input, counts)
        shown = {stage.name: torch.cat([one.received for one in some]) for stage, some in walk}
        assert len(shown["attention input"]) == len(shown["router"]) == int(counts.sum())
        for index in range(NUM_EXPERTS):
            own = routing.chosen[:, index] & counts.flatten()
            expected = inputs[own] * routing.weights[own, index, None]
            rows = shown[f"expert {index} input"]
            if least_per_input:
                assert len(rows) == min(max(128, int(own.sum())), int(counts.sum()))
            else:
                torch.testing.assert_close(rows, expected)


def test_both_models_of_a_walk_end_where_they_would_alone(
    qwen2: Path, hidden_states: HiddenStates
) -> None:
    decoder = Decoder(Checkpoint(qwen2))
    walked = hidden_states(decoder)
    exact = walked + 0.1 * torch.randn(walked.shape, generator=torch.Generator().manual_seed(2))
    expected, expected_exact = walked.clone(), exact.clone()
    decoder.block(1, walked.shape[1]).run_(expected_exact)
    block = decoder.block(1, walked.shape[1])
    for stage, windows in walk_(block, walked, ScratchMemory(), exact, least_per_input=1):
        for seen in windows:
            assert seen.exact is not None and seen.exact.shape == seen.received.shape
        for name in () if stage.is_router else stage.linears:
            block.linear(name).weight.mul_(1.1)
    block.run_(expected)
    torch.testing.assert_close(walked, expected)
    torch.testing.assert_close(exact, expected_exact)


def test_routers_stay_in_16_bits_and_are_named(qwen2: Path) -> None:
    names = [f"model.layers.1.mlp.{name}" for name in ("gate", "shared_expert_gate")]
    plan = plan_for(qwen2)
    assert [layer.name for layer in plan.skipped] == names
    assert all("routers are not quantized" in layer.reason for layer in plan.skipped)
    assert plan.notes == ()
    assert plan_for(qwen2, ignore=(r"mlp\.gate$",)) == plan
    asked = plan_for(qwen2, method=Method.INT4, overrides=(parse_override(r"mlp\.gate$=8"),))
    assert "mlp.gate, mlp.shared_expert_gate stay in 16 bits" in asked.notes[0]
    assert [layer.name for layer in asked.skipped] == names


def test_what_one_expert_gets_all_get_and_the_shared_one_is_free(qwen2: Path) -> None:
    overrides = tuple(map(parse_override, (r"experts\.2\.up_proj=8", "shared_expert.down_proj=16")))
    plan = plan_for(qwen2, method=Method.INT4, overrides=overrides, group_size=32)
    bits = {key: spec.levels.bits for key, spec in plan.specs.items()}
    assert bits == {
        **{(0, f"{part} {way}put"): 4 for part in ("attention", "mlp") for way in ("in", "out")},
        **{(1, f"attention {way}put"): 4 for way in ("in", "out")},
        (1, "experts"): 8,
        (1, "shared expert input"): 4,
    }
    assert "and 4 more are coded like mlp.experts.2.up_proj" in plan.notes[0]


def test_a_group_size_has_to_suit_every_expert(make_tiny_llama: MakeLlama) -> None:
    folder = make_tiny_llama(
        model_class=MixtralForCausalLM, num_local_experts=2, intermediate_size=96
    )
    assert plan_for(folder).group_size == 32
    with pytest.raises(OptionError, match=r"groups of 64 do not divide .*experts\.1\.w2 \(96\)"):
        plan_for(folder, group_size=64)


@pytest.mark.parametrize("output", [OutputFormat.AWQ, OutputFormat.COMPRESSED_TENSORS])
def test_each_expert_is_stored_on_its_own_under_the_names_of_the_source(
    output: OutputFormat, mixtral: Path, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    source = Checkpoint(mixtral)
    told: list[Progress] = []
    options = replace(tiny_options, output=output, effort=Effort.FAST, num_samples=6)
    report = quantize(source, tmp_path, options, told.append)
    result = Checkpoint(tmp_path)
    packed = {name for name in result.modules if result.describe(name) is not None}
    experts = {
        f"model.layers.{index}.block_sparse_moe.experts.{expert}.{part}"
        for index in range(2)
        for expert in range(NUM_EXPERTS)
        for part in ("w1", "w2", "w3")
    }
    assert experts < packed and len(packed - experts) == 2 * 4  # those of attention
    assert set(result.modules) == set(source.modules)
    routers = [f"model.layers.{index}.block_sparse_moe.gate" for index in range(2)]
    assert all(result.dtype(f"{router}.weight") == "F16" for router in routers)
    block = result.quantization_config
    assert block is not None
    ignored = block.get("modules_to_not_convert") or block["ignore"]
    assert set(routers) <= set(ignored)
    short = [layer for layer in report.layers if layer.num_borrowed]
    assert {layer.name for layer in short} <= experts
    assert report.num_short_of_text == len(short) == sum(step.num_short_of_text for step in told)


def test_a_limit_treats_all_experts_of_a_block_alike(
    qwen2: Path, tiny_options: QuantizeOptions
) -> None:
    decoder = Decoder(Checkpoint(qwen2))
    options = replace(tiny_options, method=Method.GPTQ, group_size=None, avg_bits=5.0)
    mixer = Mixer(decoder, options, make_plan(decoder, options))
    windows = torch.randint(3, 512, (4, 32), generator=torch.Generator().manual_seed(3))
    estimates = mixer.measure(windows_of_text(windows), ignore_progress)
    assert all(kl >= 0 for kls in estimates.values() for kl in kls)
    assert {key for key in estimates if key[0] == 1} == {
        (1, name)
        for name in (
            *("attention input", "attention output", "experts"),
            *("shared expert input", "shared expert output"),
        )
    }
    plan = mixer.plan(estimates)
    assert len({spec.levels.bits for spec in plan.specs.values()}) > 1


def test_a_plan_counts_every_expert(qwen2: Path, tiny_options: QuantizeOptions) -> None:
    decoder = Decoder(Checkpoint(qwen2))
    found = estimate(decoder, tiny_options)
    assert found.num_quantized_layers == 7 + 4 + 3 * (NUM_EXPERTS + 1)
    assert len(found.skipped) == 2
    assert found.refused_group_sizes[64] == ("mlp.shared_expert.down_proj",)


@pytest.mark.parametrize("output", [OutputFormat.AWQ, OutputFormat.GPTQ])
def test_experts_left_alone_are_named_as_engines_ask_for_them(
    output: OutputFormat, mixtral: Path, tmp_path: Path
) -> None:
    method = Method.RTN if output is OutputFormat.AWQ else Method.GPTQ
    options = QuantizeOptions(method=method, effort=Effort.PLAIN, ignore=(r"layers\.1\.block",))
    decoder = Decoder(Checkpoint(mixtral))
    plan = make_plan(decoder, options)
    schemes = {
        block_name(0, layer_set.name): plan.specs[0, layer_set.name].scheme(
            decoder.skeleton(0).linear(layer_set.linears[0])
        )
        for layer_set in decoder.skeleton(0).layer_sets
        if not layer_set.is_router
    }
    block = Target(options).writer.config_block(schemes, [layer.name for layer in plan.skipped])
    experts = "model.layers.1.block_sparse_moe.experts"
    if output is OutputFormat.AWQ:
        assert experts in block["modules_to_not_convert"]
        return
    left = [re.compile(rule.removeprefix("-:")) for rule in block["dynamic"]]
    for name in (experts, f"{experts}.3.w2", "model.layers.0.block_sparse_moe.gate"):
        assert any(rule.match(name) for rule in left), name
    for name in ("model.layers.0.block_sparse_moe.experts", "model.layers.1.self_attn.qkv_proj"):
        assert not any(rule.match(name) for rule in left), name


def test_the_scales_of_experts_learn(
    qwen2: Path, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    options = replace(tiny_options, effort=Effort.FAST, num_samples=4, tune=TuneOptions(steps=4))
    report = quantize(Checkpoint(qwen2), tmp_path, options, ignore_progress)
    assert report.tuning is not None and report.tuning.kept_step > 0
    assert report.tuning.kl_after < report.tuning.kl_before
