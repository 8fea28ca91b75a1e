"""The evaluation of a model agrees with the definition, computed by transformers in one go."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

from qserve.kernels.activations import Activations, round_activations
from qserve.quant.decoder import Decoder
from qserve.quant.errors import CalibrationError, CheckpointError
from qserve.quant.evaluate import Evaluation, compare, evaluate
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.options import KvCache, Method, QuantizeOptions
from qserve.quant.pipeline import quantize
from qserve.quant.progress import Phase, Progress, ignore_progress
from qserve.quant.windows import tokenize

NUM_WINDOWS, SEQ_LEN = 5, 150  # more positions than are compared at once


@pytest.fixture(scope="module")
def other_llama(make_tiny_llama: Callable[..., Path]) -> Path:
    """The tiny model with its last block all but switched off: alike, and different."""
    return make_tiny_llama(rms_norm_eps=0.3)


@pytest.fixture(scope="module")
def text(text_file: Path) -> str:
    return text_file.read_text()


def expected_windows(folder: Path, text: str) -> torch.Tensor:
    ids = tokenize(folder, text)
    starts = [i * (len(ids) - SEQ_LEN) // (NUM_WINDOWS - 1) for i in range(NUM_WINDOWS)]
    return torch.tensor([ids[start : start + SEQ_LEN] for start in starts])


def log_probs(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """``[S, T - 1, V]``, float64."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(ids, use_cache=False).logits
    return logits[:, :-1].double().log_softmax(-1)


def test_figures_are_those_of_the_definition(
    tiny_llama: Path, other_llama: Path, text: str
) -> None:
    found = evaluate(
        Checkpoint(other_llama),
        Checkpoint(tiny_llama),
        text,
        NUM_WINDOWS,
        SEQ_LEN,
        ignore_progress,
    )
    ids = expected_windows(tiny_llama, text)
    base, model = log_probs(tiny_llama, ids), log_probs(other_llama, ids)
    targets = ids[:, 1:, None]
    kl = (base.exp() * (base - model)).sum(-1).mean(1)
    agreement = (base.argmax(-1) == model.argmax(-1)).double().mean(1)
    expected = Evaluation(
        num_windows=NUM_WINDOWS,
        seq_len=SEQ_LEN,
        perplexity=math.exp(-model.gather(2, targets).mean()),
        base_perplexity=math.exp(-base.gather(2, targets).mean()),
        kl=float(kl.mean()),
        kl_standard_error=float(kl.std() / math.sqrt(NUM_WINDOWS)),
        top1=float(agreement.mean()),
        top1_standard_error=float(agreement.std() / math.sqrt(NUM_WINDOWS)),
        activations=None,
        kv_cache=None,
        seconds=found.seconds,
    )
    assert expected.kl is not None and expected.kl > 0.01
    assert found.activations is None and found.kv_cache is None
    for field in set(Evaluation.__slots__) - {"activations", "kv_cache"}:
        assert getattr(found, field) == pytest.approx(getattr(expected, field), rel=1e-4), field


def test_every_decoder_is_judged_against_the_first(tiny_llama: Path, other_llama: Path) -> None:
    decoders = [Decoder(Checkpoint(path)) for path in (tiny_llama, other_llama, tiny_llama)]
    other, same = compare(decoders, torch.arange(60).view(3, 20), ignore_progress)
    assert other.kl is not None and other.kl > 0.01
    assert (same.kl, same.top1, same.perplexity) == (0, 1, other.base_perplexity)


def test_without_a_base_there_is_a_perplexity_alone(tiny_llama: Path, text: str) -> None:
    alone = evaluate(Checkpoint(tiny_llama), None, text, NUM_WINDOWS, SEQ_LEN, ignore_progress)
    both = evaluate(
        Checkpoint(tiny_llama), Checkpoint(tiny_llama), text, NUM_WINDOWS, SEQ_LEN, ignore_progress
    )
    assert alone.perplexity == both.perplexity == both.base_perplexity
    assert (both.kl, both.top1) == (0.0, 1.0)
    assert alone == replace(
        alone,
        base_perplexity=None,
        kl=None,
        kl_standard_error=None,
        top1=None,
        top1_standard_error=None,
    )


@pytest.mark.parametrize("method", [Method.SMOOTHQUANT, Method.FLOAT8])
def test_what_was_made_for_quantized_activations_is_judged_with_them(
    method: Method, tiny_llama: Path, text: str, tmp_path: Path
) -> None:
    options = QuantizeOptions(method=method, num_samples=8, seq_len=64)
    quantize(Checkpoint(tiny_llama), tmp_path, options, ignore_progress)
    written, base = Checkpoint(tmp_path), Checkpoint(tiny_llama)
    found = evaluate(written, base, text, NUM_WINDOWS, SEQ_LEN, ignore_progress)
    assert written.activations is not None
    assert found.activations == written.activations.value

    model = filled(tiny_llama, written)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and written.describe(name) is not None:
            module.register_forward_pre_hook(_rounding(written.activations))
    ids = expected_windows(tiny_llama, text)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
    # Rounding is a step: sums in another order move a few values to the next code.
    assert found.kl == pytest.approx(divergence(tiny_llama, ids, logits), rel=0.02)


class RoundedCache(DynamicCache):
    """Keeps int8 keys and values by the scales of a checkpoint, a tensor a layer and kind."""

    def __init__(self, scales: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self._scales = scales

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Round, and keep what is left."""

        def rounded(kind: str, rows: torch.Tensor) -> torch.Tensor:
            scale = self._scales[f"model.layers.{layer_idx}.self_attn.{kind}_scale"]
            return (rows / scale).round().clamp(-127, 127) * scale

        found: tuple[torch.Tensor, torch.Tensor] = super().update(
            rounded("k", key_states), rounded("v", value_states), layer_idx
        )
        return found


@pytest.mark.parametrize("per_head", [True, False])
def test_stored_scales_round_keys_and_values(
    per_head: bool, tiny_llama: Path, text: str, tmp_path: Path
) -> None:
    options = QuantizeOptions(method=Method.INT8, kv_cache=KvCache.INT8, num_samples=8, seq_len=64)
    quantize(Checkpoint(tiny_llama), tmp_path, options, ignore_progress)
    state = load_file(tmp_path / "model.safetensors")
    scales = {n: 8 * s for n, s in state.items() if n.endswith(("k_scale", "v_scale"))}
    if not per_head:  # as llm-compressor writes them
        scales = {name: scale.amax().view(1) for name, scale in scales.items()}
        config = json.loads((tmp_path / "config.json").read_text())
        config["quantization_config"]["kv_cache_scheme"]["strategy"] = "tensor"
        (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state | scales, tmp_path / "model.safetensors", metadata={"format": "pt"})

    written, base = Checkpoint(tmp_path), Checkpoint(tiny_llama)
    found = evaluate(written, base, text, NUM_WINDOWS, SEQ_LEN, ignore_progress)
    assert found.kv_cache == f"int8, a scale for each {'head' if per_head else 'layer'}"
    ids = expected_windows(tiny_llama, text)
    with torch.no_grad():
        logits = filled(tiny_llama, written)(ids, past_key_values=RoundedCache(scales)).logits
    assert found.kl == pytest.approx(divergence(tiny_llama, ids, logits), rel=0.02)


def filled(folder: Path, packed: Checkpoint) -> Any:
    """The float model with the weights that a packed checkpoint of it stands for."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, module in model.named_modules():
        if ".layers." in name and hasattr(module, "weight"):
            stored = packed.linear(name)
            weight = stored if isinstance(stored, torch.Tensor) else stored.dequantize()
            module.weight.data = weight.float()
    return model


def divergence(folder: Path, ids: torch.Tensor, logits: torch.Tensor) -> float:
    """The mean KL of predictions from those of the float model in a folder."""
    base, model = log_probs(folder, ids), logits[:, :-1].double().log_softmax(-1)
    return float((base.exp() * (base - model)).sum(-1).mean())


def _rounding(activations: Activations) -> Callable[..., tuple[torch.Tensor]]:
    def round_inputs(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        rows = inputs[0].flatten(0, 1)
        return (round_activations(rows, activations).view_as(inputs[0]),)

    return round_inputs


def test_a_short_text_is_judged_on_fewer_windows(tiny_llama: Path, text: str) -> None:
    found = evaluate(Checkpoint(tiny_llama), None, text[:800], 48, SEQ_LEN, ignore_progress)
    assert 1 <= found.num_windows < 48
    assert found.num_windows == len(tokenize(tiny_llama, text[:800])) // SEQ_LEN


def test_progress_counts_every_step_to_its_end(
    tiny_llama: Path, other_llama: Path, text: str
) -> None:
    seen: list[Progress] = []
    evaluate(Checkpoint(other_llama), Checkpoint(tiny_llama), text, 3, 32, seen.append)
    assert [progress.done for progress in seen] == [1, 2, 3, 4, 5, 6, 7]
    assert {(progress.total, progress.phase) for progress in seen} == {(7, Phase.EVALUATE)}
    assert seen[-1].seconds_left == 0


@pytest.mark.parametrize("seq_len", [1, 513])
def test_windows_must_fit_the_context(tiny_llama: Path, text: str, seq_len: int) -> None:
    with pytest.raises(CalibrationError, match=r"expected 2 to 512, the model's context"):
        evaluate(Checkpoint(tiny_llama), None, text, 2, seq_len, ignore_progress)


def test_models_of_different_vocabularies_cannot_be_compared(
    make_tiny_llama: Callable[..., Path], tiny_llama: Path, text: str
) -> None:
    other = make_tiny_llama(vocab_size=544, num_hidden_layers=1)
    with pytest.raises(CheckpointError, match="vocabularies of"):
        evaluate(Checkpoint(other), Checkpoint(tiny_llama), text, 2, 32, ignore_progress)
