"""Tuning: scales and norms learn, codes stay, and the result is never worse."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Gemma2ForCausalLM

from qserve.quant.calibration import gather_calibration
from qserve.quant.decoder import Decoder
from qserve.quant.errors import CalibrationError, OptionError
from qserve.quant.evaluate import final_hidden
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.registry import OutputFormat, make_writer
from qserve.quant.methods import profile_of
from qserve.quant.options import CalibrationSource, Method, QuantizeOptions, TuneOptions
from qserve.quant.pipeline import quantize
from qserve.quant.progress import Progress, ProgressCallback, ignore_progress
from qserve.quant.report import TuningReport
from qserve.quant.tuning import session
from qserve.quant.tuning.divergence import Divergence
from qserve.quant.tuning.tuned_decoder import TunedDecoder
from qserve.quant.tuning.windows import MAX_HELD_BACK, TuningWindows, gather_windows
from qserve.quant.windows import Windows

MakeLlama = Callable[..., Path]
SCALES = ("scales", "weight_scale", "absmax", "nested_absmax", "SCB")
LENGTH = 24
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def options(text_file: Path) -> QuantizeOptions:
    return QuantizeOptions(calibration=text_file, num_samples=6, seq_len=LENGTH)


@pytest.fixture(scope="module")
def packed(
    tiny_llama: Path, options: QuantizeOptions, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny model as AWQ; not to be written to."""
    return pack(tiny_llama, options, tmp_path_factory.mktemp("packed"))


@dataclass(frozen=True, slots=True)
class Subject:
    """A float model, what was packed of it, and the text to tune that on.

    place: an empty folder to write to.
    """

    model: Path
    packed: Path
    options: QuantizeOptions
    windows: TuningWindows
    place: Path

    def tuned(
        self, limit: TuneOptions, progress: ProgressCallback = ignore_progress
    ) -> tuple[Path, TuningReport]:
        """A copy of what was packed that has been tuned, and what was done."""
        folder = self.place / f"tuned-{len(list(self.place.iterdir()))}"
        shutil.copytree(self.packed, folder)
        profile = profile_of(self.options)
        writer = make_writer(profile.output, "", activations=profile.activations)
        source = Checkpoint(self.model)
        return folder, session.tune(folder, source, self.windows, limit, writer, progress)

    def changed(self, folder: Path) -> set[str]:
        """The tensors that are others than in what was packed, all being of the same kind."""
        old, new = (load_file(one / WEIGHTS) for one in (self.packed, folder))
        assert {n: (t.dtype, t.shape) for n, t in old.items()} == {
            n: (t.dtype, t.shape) for n, t in new.items()
        }
        return {name for name in old if not torch.equal(old[name], new[name])}


@pytest.fixture
def subject(tiny_llama: Path, packed: Path, options: QuantizeOptions, tmp_path: Path) -> Subject:
    """The tiny model, with a few of the windows that there are."""
    found = gather_windows(Checkpoint(tiny_llama), options)
    windows = TuningWindows(found.learned[:24], found.learned[-16:])
    return Subject(tiny_llama, packed, options, windows, tmp_path)


def pack(model: Path, options: QuantizeOptions, out: Path) -> Path:
    quantize(Checkpoint(model), out, options, ignore_progress)
    return out


def test_tuning_brings_the_model_nearer_and_changes_scales_and_norms_alone(
    subject: Subject,
) -> None:
    folder, report = subject.tuned(TuneOptions(steps=12))
    assert (report.steps, report.num_windows) == (12, 12 * session.WINDOWS_AT_ONCE)
    assert 0 < report.kept_step <= 12
    assert report.kl_after < 0.99 * report.kl_before
    changed = subject.changed(folder)
    assert {name.rpartition(".")[2] for name in changed} == {"scales", "weight"}
    assert all("norm" in name for name in changed if name.endswith("weight"))
    assert len(changed) == 2 * 7 + 5


def test_what_the_report_says_is_what_the_file_gives(subject: Subject) -> None:
    folder, report = subject.tuned(TuneOptions(steps=3))
    base, tuned = Decoder(Checkpoint(subject.model)), Decoder(Checkpoint(folder))
    token_ids = subject.windows.held_back.token_ids
    expected, hidden = (final_hidden(d, token_ids, lambda: None) for d in (base, tuned))
    measured = Divergence(base, tuned, torch.float32).mean(expected, hidden)
    assert measured == pytest.approx(report.kl_after, rel=1e-6)


def test_the_same_number_of_steps_gives_the_same_bytes(subject: Subject) -> None:
    folders = [subject.tuned(TuneOptions(steps=3))[0] for _ in range(2)]
    first, second = ((folder / WEIGHTS).read_bytes() for folder in folders)
    assert first == second != (subject.packed / WEIGHTS).read_bytes()


def test_a_run_that_the_clock_ended_repeats_by_its_steps(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        seconds = count()
        patched.setattr(time, "perf_counter", lambda: next(seconds))
        folder, timed = subject.tuned(TuneOptions(minutes=0.5))
    assert 0 < timed.kept_step == timed.steps < session.STEPS_BETWEEN_JUDGEMENTS
    other, counted = subject.tuned(TuneOptions(steps=timed.steps))
    assert replace(counted, seconds=timed.seconds) == timed
    assert (folder / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()


def test_nothing_changes_when_nothing_is_better(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SCALE_RATE", -0.05)  # learns to be worse
    monkeypatch.setattr(session, "STEPS_BETWEEN_JUDGEMENTS", 1)
    folder, report = subject.tuned(TuneOptions(steps=50))
    assert (report.steps, report.kept_step) == (session.PATIENCE, 0)
    assert report.kl_after == report.kl_before
    assert not subject.changed(folder)


def test_minutes_that_are_over_before_the_first_step_change_nothing(subject: Subject) -> None:
    folder, report = subject.tuned(TuneOptions(minutes=1e-6))
    assert report.steps == 0
    assert "give more minutes" in str(report)
    assert not subject.changed(folder)


@pytest.mark.parametrize(
    ("method", "output"),
    [
        (Method.GPTQ, None),
        (Method.GPTQ, OutputFormat.COMPRESSED_TENSORS),
        (Method.NF4, None),
        (Method.LLM_INT8, None),
        (Method.FLOAT8_WEIGHT, None),
    ],
)
def test_every_format_keeps_its_codes(
    method: Method,
    output: OutputFormat | None,
    subject: Subject,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    falling = count(0, -1)
    monkeypatch.setattr(Divergence, "mean", lambda *_: next(falling))
    options = replace(subject.options, method=method, output=output)
    packed = pack(subject.model, options, tmp_path_factory.mktemp("packed"))
    other = replace(subject, packed=packed, options=options)
    changed = other.changed(other.tuned(TuneOptions(steps=2))[0])
    assert {n for n in changed if not n.endswith(SCALES)} == {n for n in changed if "norm" in n}
    assert any(name.endswith(SCALES) for name in changed)


def gradients(
    subject: Subject, windows: Windows
) -> tuple[dict[str, torch.Tensor], Callable[[dict[str, torch.Tensor]], float]]:
    """The gradient of the divergence by ``learn``, and the divergence as a function of a state."""
    tuned = TunedDecoder(Checkpoint(subject.packed), torch.float32)
    base = Decoder(Checkpoint(subject.model))
    divergence = Divergence(base, tuned, torch.float32)
    target = final_hidden(base, windows.token_ids, lambda: None)
    start = tuned.unmoved()

    def measure(state: dict[str, torch.Tensor]) -> float:
        leaves = {name: share.requires_grad_() for name, share in state.items()}
        return tuned.learn(windows, target, divergence, leaves)

    measure(start)
    found = {}
    for name, share in start.items():
        assert share.grad is not None
        found[name] = share.grad
    return found, measure


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_the_gradient_is_that_of_the_divergence(
    kind: str, subject: Subject, make_tiny_llama: MakeLlama, tmp_path: Path
) -> None:
    if kind == "gemma2":
        caps = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 5.0}
        model = make_tiny_llama(model_class=Gemma2ForCausalLM, tie_word_embeddings=True, **caps)
        packed = pack(model, subject.options, tmp_path)
        subject = replace(subject, model=model, packed=packed)
    found, measure = gradients(subject, subject.windows.learned[:1])
    names = ["model.norm.weight", *(n for n in found if n.startswith("model.layers.0."))]
    assert len(names) == 1 + 7 + (4 if kind == "gemma2" else 2)
    for name in names:
        direction = found[name] / found[name].norm()
        moved = [
            {n: torch.zeros_like(g) for n, g in found.items()} | {name: step * direction}
            for step in (-0.01, 0.01)
        ]
        slope = (measure(moved[1]) - measure(moved[0])) / 0.02
        assert slope == pytest.approx(float(found[name].norm()), rel=0.02), name


def test_progress_is_told_in_steps_or_in_seconds(subject: Subject) -> None:
    told: list[Progress] = []
    for limit in (TuneOptions(steps=2), TuneOptions(steps=1, minutes=5)):
        subject.tuned(limit, told.append)
    assert [(step.done, step.total) for step in told[:2]] == [(1, 2), (2, 2)]
    assert [step.total for step in told[2:]] == [300] * 3
    assert told[2].done == 0 and told[2].kl is None
    assert all(step.kl is not None and step.kl > 0 for step in (*told[:2], *told[3:]))


def test_windows_to_tune_on_are_those_that_quantization_leaves(
    tiny_llama: Path, options: QuantizeOptions
) -> None:
    found = gather_windows(Checkpoint(tiny_llama), options)
    assert found.learned.token_ids.shape[1] == found.held_back.token_ids.shape[1] == LENGTH
    assert len(found.held_back) == MAX_HELD_BACK
    taken = gather_calibration(Decoder(Checkpoint(tiny_llama)), options).windows.token_ids
    for window in (found.learned.token_ids[0], found.held_back.token_ids[-1]):
        assert not any(torch.equal(window, other) for other in taken)


def test_a_text_with_nothing_left_is_refused(tiny_llama: Path, options: QuantizeOptions) -> None:
    few = gather_windows(Checkpoint(tiny_llama), replace(options, seq_len=10 * LENGTH))
    assert 1 <= len(few.held_back) < MAX_HELD_BACK
    with pytest.raises(CalibrationError, match="leaves 0 windows to tune"):
        gather_windows(Checkpoint(tiny_llama), replace(options, num_samples=10_000))


def test_tuning_needs_an_end_and_more_text_than_a_model_writes() -> None:
    with pytest.raises(OptionError, match="give minutes or steps"):
        TuneOptions()
    for wrong in ({"minutes": 0.0}, {"minutes": -1.0}, {"steps": 0}):
        with pytest.raises(OptionError, match="expected"):
            TuneOptions(**wrong)
    with pytest.raises(OptionError, match="give a text file"):
        QuantizeOptions(calibration=CalibrationSource.SELF, tune=TuneOptions(steps=1))


def test_only_what_counts_is_learned_from(subject: Subject) -> None:
    some = subject.windows.learned[:2]
    counts = torch.arange(LENGTH).expand(2, -1) < LENGTH // 2
    others = torch.where(counts, some.token_ids, some.token_ids.flip(1))
    first, second, whole = (
        gradients(subject, one)[0]["model.layers.0.mlp.up_proj"]
        for one in (Windows(some.token_ids, counts), Windows(others, counts), some)
    )
    assert torch.equal(first, second)
    assert not torch.allclose(first, whole)
