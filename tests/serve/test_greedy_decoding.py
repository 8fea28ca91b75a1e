"""Greedy decoding against transformers, and that neither batch, chunks nor preemption change it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, MistralForCausalLM

from qserve.kernels.activations import Activations
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.kernels.kv_cache import KvFormat
from qserve.quant.formats import awq
from qserve.quant.formats.awq import AwqWriter
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.serve.config import EngineConfig, HeadDtype
from qserve.serve.engine import Engine
from qserve.serve.messages import AddRequest, NewTokens, SamplingParams

GROUP_SIZE = 32
NUM_TOKENS = 64
TIE = 1e-3  # a smaller gap between the two best logits is decided by rounding
EXACT = {"kv_format": KvFormat.FLOAT32, "activations": Activations.FLOAT32}
PROMPTS = [
    tuple(Random(length).choices(range(3, 512), k=length))
    for length in (1, 3, 7, 16, 17, 40, 5, 90)
]

DEMO_PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "The three most important rules of good writing are",
    "Water boils at",
    "In 1969, the first human",
    "My favourite recipe for bread:\n1.",
    "Question: What is 12 times 12?\nAnswer:",
)

MakeLlama = Callable[..., Path]
Generate = Callable[..., list[tuple[int, ...]]]


def load(folder: Path, **changes: Any) -> Engine:
    return Engine.from_checkpoint(folder, EngineConfig(**({"max_model_len": 256} | changes)))


def expect_tokens_of_transformers(
    folder: Path, found: list[tuple[int, ...]], prompts: list[tuple[int, ...]] = PROMPTS
) -> None:
    """Fail unless each token is transformers' choice, or was within a tie of it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for prompt, tokens in zip(prompts, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        behind = logits.amax(dim=1) - logits[range(len(tokens)), list(tokens)]
        assert float(behind.max()) < TIE, f"token {int(behind.argmax())} is {float(behind.max())}"


def round_to_awq(
    source: Path, out: Path, ignored: tuple[str, ...] = (), dequantized: bool = False
) -> Path:
    """A copy rounded to nearest, 4 bits in groups of 32; packed, or as the floats it stands for."""
    checkpoint = Checkpoint(source)
    tensors: dict[str, torch.Tensor] = {}
    for name in checkpoint:
        module = name.removesuffix(".weight")
        weight = checkpoint.tensor(name)
        if not name.endswith("_proj.weight") or module.endswith(ignored or ("nothing",)):
            tensors[name] = weight
            continue
        rounded = round_to_nearest(weight.float())
        if dequantized:
            tensors[name] = rounded.dequantize()
        else:
            parts = AwqWriter().encode(rounded)
            tensors |= {f"{module}.{key}": value for key, value in parts.items()}
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    if not dequantized:
        config = json.loads((out / "config.json").read_text())
        config["quantization_config"] = awq.config_block(GROUP_SIZE, list(ignored))
        (out / "config.json").write_text(json.dumps(config))
    return out


def round_to_nearest(weight: torch.Tensor) -> GroupedWeight:
    groups = weight.unflatten(1, (-1, GROUP_SIZE))
    low, high = groups.amin(2), groups.amax(2)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales).round().clamp(0, 15)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    return GroupedWeight(codes.flatten(1).byte(), scales, zeros.byte(), 4, GROUP_SIZE)


@pytest.fixture(scope="module")
def tiny_awq(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return round_to_awq(tiny_llama, tmp_path_factory.mktemp("awq") / "packed")


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"num_key_value_heads": 4, "head_dim": 32},
        {"num_key_value_heads": 1},
        {"head_dim": 8},
        {"head_dim": 80},
        {"head_dim": 96, "num_key_value_heads": 1},
        {"model_class": MistralForCausalLM, "sliding_window": 7},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
            }
        },
    ],
    ids=[
        "plain",
        "tied",
        "bias",
        "multi-head",
        "multi-query",
        "narrow",
        "80",
        "96",
        "window",
        "linear-rope",
        "llama3-rope",
        "yarn-rope",
    ],
)
def test_a_16_bit_model_gives_the_tokens_of_transformers(
    make_tiny_llama: MakeLlama, variant: dict[str, Any], generate: Generate
) -> None:
    folder = make_tiny_llama(**variant)
    found = generate(load(folder, kv_format=KvFormat.FLOAT32), PROMPTS, NUM_TOKENS)
    expect_tokens_of_transformers(folder, found)
    assert len(set(found)) > 4, "the model says the same whatever it is asked"


@pytest.mark.parametrize("ignored", [(), ("k_proj", "up_proj", "layers.0.mlp.down_proj")])
def test_an_awq_model_gives_the_tokens_of_its_dequantized_weights(
    tiny_llama: Path, tmp_path: Path, ignored: tuple[str, ...], generate: Generate
) -> None:
    packed = round_to_awq(tiny_llama, tmp_path / "packed", ignored)
    plain = round_to_awq(tiny_llama, tmp_path / "plain", ignored, dequantized=True)
    found = generate(load(packed, head_dtype=HeadDtype.FLOAT, **EXACT), PROMPTS, NUM_TOKENS)
    expect_tokens_of_transformers(plain, found)


def test_the_defaults_of_a_quantized_model_stay_close_to_exact_arithmetic(tiny_awq: Path) -> None:
    exact = load(tiny_awq, head_dtype=HeadDtype.FLOAT, **EXACT)
    rounded = load(tiny_awq)
    for prompt in PROMPTS:
        expected, found = (first_logprobs(engine, prompt) for engine in (exact, rounded))
        close = [abs(expected[token] - found[token]) for token in expected]
        assert 0.0 < max(close) < 0.5


def first_logprobs(engine: Engine, prompt: tuple[int, ...]) -> dict[int, float]:
    params = SamplingParams(max_tokens=1, temperature=0.0, num_logprobs=512)
    engine.add(AddRequest("a", prompt, params, 0.0))
    (output,) = engine.step()
    assert isinstance(output, NewTokens)
    return dict(output.logprobs[0].top)


@pytest.fixture(params=["16-bit", "awq"])
def either(request: pytest.FixtureRequest, tiny_llama: Path, tiny_awq: Path) -> Path:
    """Both kinds of model, with the defaults of their kind."""
    return tiny_awq if request.param == "awq" else tiny_llama


def test_a_prompt_alone_gives_the_tokens_it_gives_in_a_batch(
    either: Path, generate: Generate
) -> None:
    engine = load(either)
    together = generate(engine, PROMPTS, NUM_TOKENS)
    assert [generate(engine, [prompt], NUM_TOKENS)[0] for prompt in PROMPTS] == together


@pytest.mark.parametrize("format", [KvFormat.FLOAT8, KvFormat.INT8, KvFormat.INT4])
def test_a_quantized_cache_gives_the_same_tokens_alone_and_in_chunks(
    format: KvFormat, tiny_awq: Path, generate: Generate
) -> None:
    engine = load(tiny_awq, kv_format=format)
    together = generate(engine, PROMPTS, NUM_TOKENS)
    assert [generate(engine, [prompt], NUM_TOKENS)[0] for prompt in PROMPTS] == together
    chunked = load(tiny_awq, kv_format=format, max_num_batched_tokens=8, max_num_seqs=8)
    assert generate(chunked, PROMPTS, NUM_TOKENS) == together


@pytest.mark.parametrize(
    ("format", "bound"),
    [(KvFormat.FLOAT16, 0.01), (KvFormat.INT8, 0.2), (KvFormat.FLOAT8, 0.5), (KvFormat.INT4, 2.0)],
)
def test_a_smaller_cache_changes_log_probabilities_by_its_rounding(
    format: KvFormat, bound: float, tiny_llama: Path
) -> None:
    exact = load(tiny_llama, kv_format=KvFormat.FLOAT32)
    rounded = load(tiny_llama, kv_format=format)
    farthest = 0.0
    for prompt in PROMPTS:
        expected, found = (first_logprobs(engine, prompt) for engine in (exact, rounded))
        farthest = max(farthest, *(abs(expected[token] - found[token]) for token in expected))
    assert bound / 20 < farthest < bound


@pytest.mark.parametrize("chunk", [8, 16, 64])
def test_prompts_in_chunks_give_the_same_tokens(
    either: Path, chunk: int, generate: Generate
) -> None:
    whole = generate(load(either), PROMPTS, NUM_TOKENS)
    chunked = load(either, max_num_batched_tokens=chunk, max_num_seqs=8)
    assert generate(chunked, PROMPTS, NUM_TOKENS) == whole


@pytest.mark.parametrize("block_size", [1, 4, 64])
def test_blocks_of_any_size_give_the_same_tokens(
    either: Path, block_size: int, generate: Generate
) -> None:
    expected = generate(load(either), PROMPTS, NUM_TOKENS)
    assert generate(load(either, block_size=block_size), PROMPTS, NUM_TOKENS) == expected


def test_preempted_requests_give_the_same_tokens(either: Path, generate: Generate) -> None:
    expected = generate(load(either), PROMPTS, NUM_TOKENS)
    block_bytes = 16 * 2 * 2 * 2 * 16 * 2  # tokens, k and v, layers, heads, head_dim, float16
    scarce = load(either, max_model_len=160, kv_cache_bytes=12 * block_bytes)
    assert generate(scarce, PROMPTS, NUM_TOKENS) == expected
    assert scarce.stats().num_preemptions > 2


def test_a_seeded_request_draws_the_same_alone_and_in_a_batch(
    either: Path, generate: Generate
) -> None:
    engine = load(either)
    params: dict[str, Any] = {"temperature": 0.9, "top_p": 0.95, "seed": 11}
    together = generate(engine, PROMPTS, NUM_TOKENS, **params)
    assert [generate(engine, [prompt], NUM_TOKENS, **params)[0] for prompt in PROMPTS] == together
    assert generate(engine, PROMPTS, NUM_TOKENS, **(params | {"seed": 12})) != together


def test_a_request_that_aborts_midway_does_not_disturb_the_others(
    either: Path, generate: Generate
) -> None:
    engine = load(either)
    expected = generate(engine, PROMPTS[:3], NUM_TOKENS)
    params = SamplingParams(max_tokens=100, temperature=0.0, ignore_eos=True)
    engine.add(AddRequest("leaves", PROMPTS[5], params, 0.0))
    engine.step()
    for i, prompt in enumerate(PROMPTS[:3]):
        settings = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        engine.add(AddRequest(str(i), prompt, settings, 0.0))
    found: dict[str, tuple[int, ...]] = {}
    for step in range(200):
        if step == 5:
            engine.abort("leaves")
        for output in engine.step():
            assert isinstance(output, NewTokens)
            found[output.request_id] = found.get(output.request_id, ()) + output.token_ids
    assert [found[str(i)] for i in range(3)] == expected


def test_the_models_end_tokens_come_from_both_of_its_configs(tiny_llama: Path) -> None:
    engine = load(tiny_llama)
    for token in (0, 2):
        force = SamplingParams(max_tokens=9, logit_bias=((token, 100.0),))
        engine.add(AddRequest("a", (5,), force, 0.0))
        (output,) = engine.step()
        assert isinstance(output, NewTokens)
        assert output.token_ids == (token,)
        assert output.finish_reason is not None


@pytest.mark.slow
def test_the_demo_model_gives_the_tokens_of_transformers(
    demo_model: Path, generate: Generate
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    prompts = [tuple(tokenizer(text)["input_ids"]) for text in DEMO_PROMPTS]
    engine = load(demo_model)
    found = generate(engine, prompts, NUM_TOKENS)
    expect_tokens_of_transformers(demo_model, found, prompts)
    assert [generate(engine, [prompt], NUM_TOKENS)[0] for prompt in prompts] == found
    for chunk in (16, 64):
        chunked = load(demo_model, max_num_batched_tokens=chunk, max_num_seqs=8)
        assert generate(chunked, prompts, NUM_TOKENS) == found
