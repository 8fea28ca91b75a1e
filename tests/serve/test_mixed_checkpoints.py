"""Checkpoints whose layers differ in width and groups: written, read, checked, judged, served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qserve.kernels.activations import Activations
from qserve.quant.checking import check_checkpoint
from qserve.quant.conversion import Conversion
from qserve.quant.decoder import Decoder
from qserve.quant.evaluate import evaluate
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.registry import OutputFormat
from qserve.quant.inspection import inspect_checkpoint
from qserve.quant.options import Method, QuantizeOptions
from qserve.quant.overrides import parse_override
from qserve.quant.pipeline import quantize
from qserve.quant.windows import python_topics
from qserve.serve.block_manager import BlockManager
from qserve.serve.config import EngineConfig, HeadDtype
from qserve.serve.messages import SamplingParams
from qserve.serve.model_runner import ModelRunner
from qserve.serve.scheduler import Scheduler
from qserve.serve.sequence import Sequence

PROMPT = tuple(range(40, 80))
MIXTURES = {
    "GPTQ": (Method.GPTQ, OutputFormat.GPTQ, ("q_proj=bits:8,group:32", "1.mlp.down_proj=3")),
    "compressed-tensors": (
        Method.AWQ,
        OutputFormat.COMPRESSED_TENSORS,
        ("gate_proj=8", r"0\.self_attn\.o_proj=group:32", r"1\.self_attn\.q_proj=16"),
    ),
    "AWQ": (Method.AWQ, OutputFormat.AWQ, (r"1\.mlp=16", "o_proj=16")),
}

Make = Callable[[str], Checkpoint]


@pytest.fixture(scope="module")
def make_mixed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The tiny model quantized by an entry of ``MIXTURES``."""
    text = tmp_path_factory.mktemp("text") / "prose.txt"
    text.write_text(python_topics()[:20_000], encoding="utf-8")
    made: dict[str, Checkpoint] = {}

    def make(name: str) -> Checkpoint:
        if name not in made:
            method, output, overrides = MIXTURES[name]
            options = QuantizeOptions(
                method=method,
                output=output,
                overrides=tuple(map(parse_override, overrides)),
                calibration=text,
                num_samples=4,
                seq_len=32,
            )
            folder = tmp_path_factory.mktemp("mixed")
            quantize(Checkpoint(tiny_llama), folder, options, lambda _: None)
            made[name] = Checkpoint(folder)
        return made[name]

    return make


def dequantized_logits(checkpoint: Checkpoint) -> torch.Tensor:
    """The next token's after ``PROMPT``, by transformers' modules on dequantized weights."""
    decoder = Decoder(checkpoint)
    hidden = decoder.embed(torch.tensor([PROMPT]))
    for index in range(decoder.num_blocks):
        decoder.block(index, len(PROMPT)).run_(hidden)
    last = decoder.final_norm()(hidden)[0, -1]
    return decoder.head().logits(last)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixed_checkpoint_is_served_as_its_dequantized_weights_say(
    name: str, make_mixed: Make
) -> None:
    checkpoint = make_mixed(name)
    exact = EngineConfig(
        max_model_len=128, activations=Activations.FLOAT32, head_dtype=HeadDtype.FLOAT
    )
    runner = ModelRunner(checkpoint, exact)
    scheduler = Scheduler(
        runner.limits, BlockManager(runner.plan.num_blocks, runner.plan.block_size)
    )
    scheduler.add(Sequence("0", PROMPT, SamplingParams(max_tokens=1)))
    found = runner.run(scheduler.schedule())[0]
    expected = dequantized_logits(checkpoint).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("GPTQ", {"0.self_attn.k_proj": (8, 32), "0.mlp.up_proj": (4, 64), "1.mlp.down": (3, 64)}),
        (
            "compressed-tensors",
            {"0.self_attn.o_proj": (4, 32), "1.self_attn.o_proj": (4, 64), "1.mlp.up": (8, 64)},
        ),
        ("AWQ", {"0.self_attn.q_proj": (4, 64), "0.mlp.down": (4, 64)}),
    ],
)
def test_every_layer_is_read_as_it_was_asked_for(
    name: str, expected: dict[str, tuple[int, int]], make_mixed: Make, tiny_llama: Path
) -> None:
    checkpoint = make_mixed(name)
    for part, settings in expected.items():
        (layer,) = [one for one in checkpoint.modules if f"layers.{part}" in one]
        packed = checkpoint.describe(layer)
        assert packed is not None and (packed.bits, packed.group_size) == settings
    assert check_checkpoint(checkpoint.folder)[1] == []
    formats = {layer.format for layer in inspect_checkpoint(checkpoint).layers}
    assert formats > {checkpoint.method}
    found = evaluate(
        checkpoint, Checkpoint(tiny_llama), python_topics()[:20_000], 2, 32, progress=lambda _: None
    )
    assert found.kl is not None and 0 < found.kl < 1


def test_a_mixture_moves_to_another_format_unchanged(make_mixed: Make, tmp_path: Path) -> None:
    source = make_mixed("GPTQ")
    conversion = Conversion(source, "compressed-tensors", "test:0")
    report = conversion.measure(lambda _: None)
    assert report.is_lossless
    conversion.write(tmp_path, report, lambda _: None)
    moved = Checkpoint(tmp_path)
    assert torch.equal(dequantized_logits(moved), dequantized_logits(source))
