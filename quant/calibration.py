"""The tokens that quantization looks at: a text's, or the model's own."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qserve.quant.decoder import Decoder
from qserve.quant.errors import CalibrationError
from qserve.quant.options import CalibrationSource, QuantizeOptions
from qserve.quant.report import CalibrationReport
from qserve.quant.silence import silenced
from qserve.quant.window_text import WindowText, read_window_text
from qserve.quant.windows import Windows, windows_of_text

SEQUENCES_AT_ONCE = 16
"""Self-generated windows written in one batch."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Windows of tokens, and where they come from."""

    windows: Windows
    report: CalibrationReport

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {
            "token_ids": self.windows.token_ids.tolist(),
            "counts": self.windows.counts.int().tolist(),
            "report": asdict(self.report),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        """What ``to_dict`` gave."""
        token_ids, counts = (torch.tensor(values[name]) for name in ("token_ids", "counts"))
        return cls(Windows(token_ids, counts.bool()), CalibrationReport(**values["report"]))


def gather_calibration(decoder: Decoder, options: QuantizeOptions) -> Calibration:
    """The calibration windows that the options ask for.

    Raises ``CalibrationError`` when the text cannot be read or is shorter than one window, or when
    a window is longer than the model's context.
    """
    check_calibration(decoder, options)
    if options.calibration is CalibrationSource.SELF:
        text = _generate(decoder, options)
    else:
        text = read_window_text(decoder.checkpoint.folder, options)
    windows = text.taken
    report = CalibrationReport(
        source=options.calibration_name,
        sha256=text.sha256,
        tokens_sha256=_hash_tokens(windows.token_ids),
        num_text_tokens=text.num_tokens,
        num_taken_tokens=text.num_taken_tokens,
        num_counted_tokens=int(windows.counts.sum()),
        num_windows=len(windows),
        num_windows_asked=options.num_samples,
        seq_len=options.seq_len,
        num_documents=text.num_documents,
        num_conversations=text.num_conversations,
        num_cut=text.num_cut,
        num_distinct_tokens=len(windows.token_ids[windows.counts].unique()),
    )
    return Calibration(windows, report)


def check_calibration(decoder: Decoder, options: QuantizeOptions) -> None:
    """Raise ``CalibrationError`` for what is wrong with the calibration before any of it is read:
    a file that is not there, windows longer than the model's context."""
    longest = decoder.config.max_position_embeddings
    if options.seq_len > longest:
        raise CalibrationError(
            f"windows of {options.seq_len} tokens, the model was made for {longest}: "
            "use a smaller seq_len"
        )
    if isinstance(options.calibration, Path):
        try:
            options.calibration.stat()
        except OSError as error:
            raise CalibrationError(
                f"{options.calibration} cannot be read ({error.strerror}): give a text file"
            ) from None


def _generate(decoder: Decoder, options: QuantizeOptions) -> WindowText:
    """Text that the model writes itself, each window from a random first token, at temperature 1.

    The whole model is in memory for this, in the type of the checkpoint.
    (LLM-QAT, Liu et al. 2023, section 3.1: a model's own text covers what it has learned.)
    """
    with silenced():
        model: Any = AutoModelForCausalLM.from_pretrained(
            decoder.checkpoint.folder, local_files_only=True, dtype="auto"
        ).eval()
    with torch.random.fork_rng(devices=()), silenced():
        torch.manual_seed(options.seed)
        first = torch.randint(decoder.config.vocab_size, (options.num_samples, 1))
        batches = [
            model.generate(
                start,
                attention_mask=torch.ones_like(start),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=options.seq_len - 1,
                max_new_tokens=options.seq_len - 1,
            )
            for start in first.split(SEQUENCES_AT_ONCE)
        ]
    token_ids = torch.cat(batches)
    return WindowText(
        taken=windows_of_text(token_ids),
        left=windows_of_text(token_ids[:0]),
        sha256=_hash_tokens(token_ids),
        num_tokens=token_ids.numel(),
        num_taken_tokens=token_ids.numel(),
        num_documents=len(token_ids),
        num_conversations=0,
        num_cut=0,
    )


def _hash_tokens(token_ids: torch.Tensor) -> str:
    return hashlib.sha256(token_ids.numpy().astype("<i8").tobytes()).hexdigest()
