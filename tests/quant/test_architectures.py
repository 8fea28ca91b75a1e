"""Every architecture of the table: computed as transformers does, scaled without changing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2ForCausalLM,
    GemmaForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    OlmoeForCausalLM,
    Phi3ForCausalLM,
    Qwen2ForCausalLM,
    Qwen2MoeForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
    SmolLM3ForCausalLM,
)

from qserve.quant.architecture import ARCHITECTURES
from qserve.quant.decoder import Decoder
from qserve.quant.errors import UnsupportedModelError
from qserve.quant.evaluate import evaluate
from qserve.quant.folding import fold_, sharing_of
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.options import Method, QuantizeOptions
from qserve.quant.pipeline import quantize
from qserve.quant.progress import ignore_progress
from qserve.quant.walk import ScratchMemory, walk_

MakeLlama = Callable[..., Path]
LENGTH = 40
WINDOW = 12

EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}

MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"model_class": MistralForCausalLM, "sliding_window": None},
    "mistral with windows": {"model_class": MistralForCausalLM, "sliding_window": WINDOW},
    "qwen2": {"model_class": Qwen2ForCausalLM},
    "qwen2 with windows": {
        "model_class": Qwen2ForCausalLM,
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "max_window_layers": 1,
    },
    "mixtral": {"model_class": MixtralForCausalLM, "num_local_experts": 4},
    "qwen2 with experts": {
        "model_class": Qwen2MoeForCausalLM,
        "shared_expert_intermediate_size": 96,
        "mlp_only_layers": [0],
        **EXPERTS,
    },
    "qwen3 with experts": {
        "model_class": Qwen3MoeForCausalLM,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        **EXPERTS,
    },
    "qwen3": {"model_class": Qwen3ForCausalLM, "head_dim": 32, "tie_word_embeddings": True},
    "smollm3": {"model_class": SmolLM3ForCausalLM, "no_rope_layers": [1, 0]},
    "phi3": {"model_class": Phi3ForCausalLM, "partial_rotary_factor": 0.5},
    "phi3 with long positions": {
        "model_class": Phi3ForCausalLM,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 32,
            "short_factor": [1.0] * 8,
            "long_factor": [1.5] * 8,
        },
    },
    "gemma": {"model_class": GemmaForCausalLM, "tie_word_embeddings": True},
    "gemma2": {
        "model_class": Gemma2ForCausalLM,
        "tie_word_embeddings": True,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "query_pre_attn_scalar": 24,
    },
    "gemma2 without caps": {
        "model_class": Gemma2ForCausalLM,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    },
}


@pytest.fixture(scope="session", params=MODELS, ids=lambda name: name.replace(" ", "-"))
def folder(request: pytest.FixtureRequest, make_tiny_llama: MakeLlama) -> Path:
    """A tiny model of each kind, with uneven norms and biases."""
    made = make_tiny_llama(**MODELS[request.param])
    state = load_file(made / "model.safetensors")
    draw = torch.Generator().manual_seed(3)
    for name, tensor in state.items():
        if tensor.dim() == 1:
            state[name] = tensor + 0.3 * torch.randn(tensor.shape, generator=draw).bfloat16()
    save_file(state, made / "model.safetensors", metadata={"format": "pt"})
    return made


def random_ids() -> torch.Tensor:
    return torch.randint(512, (3, LENGTH), generator=torch.Generator().manual_seed(0))


def test_the_table_is_tested_whole() -> None:
    made = {settings["model_class"].__name__ for settings in MODELS.values()}
    assert made | {"LlamaForCausalLM"} == set(ARCHITECTURES)


def test_blocks_compute_what_transformers_computes(folder: Path) -> None:
    ids = random_ids()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    decoder = Decoder(Checkpoint(folder))
    hidden = decoder.embed(ids)
    for index in range(decoder.num_blocks):
        decoder.block(index, LENGTH).run_(hidden)
    found = decoder.head().logits(decoder.final_norm()(hidden))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_walk_ends_where_a_run_does(folder: Path) -> None:
    decoder = Decoder(Checkpoint(folder))
    ran = decoder.embed(random_ids())
    walked = ran.clone()
    block = decoder.block(1, LENGTH)
    block.run_(ran)
    names = [name for stage, _ in walk_(block, walked, ScratchMemory()) for name in stage.linears]
    torch.testing.assert_close(walked, ran)
    linears = {name for name, module in block.layer.named_modules() if hasattr(module, "bias")}
    assert set(names) == linears  # every linear layer of the block belongs to a stage


def test_folding_scales_leaves_the_function_as_it_is(folder: Path) -> None:
    decoder = Decoder(Checkpoint(folder))
    before = decoder.embed(random_ids())
    after = before.clone()
    block = decoder.block(0, LENGTH)
    block.run_(before)
    draw = torch.Generator().manual_seed(1)
    for stage in block.stages:
        width = block.linear(stage.linears[0]).in_features
        scale = torch.randn(width, generator=draw).clamp(-2, 2).exp()
        sharing = sharing_of(block, stage)
        applied = fold_(block, stage, scale if sharing is None else sharing.share(scale))
        assert float(applied.max() / applied.min()) > 4, stage.name
    block.run_(after)
    assert float((after - before).abs().max() / before.abs().max()) < 1e-5


@pytest.mark.parametrize("folder", ["qwen2 with windows", "phi3", "gemma2"], indirect=True)
def test_quantizing_beats_rounding_to_nearest(
    folder: Path, text_file: Path, tmp_path: Path
) -> None:
    source = Checkpoint(folder)
    options = QuantizeOptions(group_size=32, calibration=text_file, num_samples=8, seq_len=LENGTH)
    divergences = {}
    for method in (Method.AWQ, Method.RTN):
        out = tmp_path / method.value
        out.mkdir()
        quantize(source, out, replace(options, method=method), ignore_progress)
        found = evaluate(Checkpoint(out), source, text_file.read_text(), 8, LENGTH, ignore_progress)
        divergences[method] = found.kl
    awq, rtn = divergences[Method.AWQ], divergences[Method.RTN]
    assert awq is not None and rtn is not None
    assert 0 < awq < 0.9 * rtn


def test_models_say_which_type_they_run_in(make_tiny_llama: MakeLlama, tmp_path: Path) -> None:
    stated = {}
    for name in ("gemma", "gemma2"):
        source = Checkpoint(make_tiny_llama(**MODELS[name], num_hidden_layers=1))
        (tmp_path / name).mkdir()
        quantize(source, tmp_path / name, QuantizeOptions(Method.RTN), ignore_progress)
        stated[name] = Checkpoint(tmp_path / name).config["dtype"]
    assert stated == {"gemma": "float16", "gemma2": "bfloat16"}


def test_another_mixture_of_experts_is_refused_as_one(make_tiny_llama: MakeLlama) -> None:
    folder = make_tiny_llama(model_class=OlmoeForCausalLM, num_experts=2)
    with pytest.raises(UnsupportedModelError, match="a mixture of experts of another kind"):
        Decoder(Checkpoint(folder))
