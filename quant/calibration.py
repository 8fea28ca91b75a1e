"""The tokens that quantization looks at: a file's, the package's texts, or the model's own."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qserve.quant.calibration_text import texts
from qserve.quant.decoder import Decoder
from qserve.quant.documents import read_documents
from qserve.quant.errors import CalibrationError
from qserve.quant.options import CalibrationSource, QuantizeOptions
from qserve.quant.report import CalibrationReport
from qserve.quant.silence import silenced
from qserve.quant.windows import spread_windows, tokenize

SEQUENCES_AT_ONCE = 16
"""Self-generated windows written in one batch."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Windows of tokens, ``[num_windows, seq_len]``, and where they come from."""

    token_ids: torch.Tensor
    report: CalibrationReport

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return {"token_ids": self.token_ids.tolist(), "report": asdict(self.report)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        """What ``to_dict`` gave."""
        return cls(torch.tensor(values["token_ids"]), CalibrationReport(**values["report"]))


def gather_calibration(decoder: Decoder, options: QuantizeOptions) -> Calibration:
    """The calibration windows that the options ask for.

    Raises ``CalibrationError`` when the text cannot be read or is shorter than one window, or when
    a window is longer than the model's context.
    """
    longest = decoder.config.max_position_embeddings
    if options.seq_len > longest:
        raise CalibrationError(
            f"windows of {options.seq_len} tokens, the model was made for {longest}: "
            "use a smaller seq_len"
        )
    if options.calibration is CalibrationSource.SELF:
        return _generate(decoder, options)
    if isinstance(options.calibration, Path):
        name = options.calibration.name
        documents = read_documents(options.calibration, decoder.checkpoint.folder)
    else:
        name, documents = options.calibration.value, list(texts())
    text = "\n\n".join(documents)
    ids = tokenize(decoder.checkpoint.folder, text)
    windows = spread_windows(ids, options.num_samples, options.seq_len)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return _calibration(windows, options, name, digest, len(ids), len(documents))


def _generate(decoder: Decoder, options: QuantizeOptions) -> Calibration:
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
    name = CalibrationSource.SELF.value
    return _calibration(
        token_ids, options, name, _hash_tokens(token_ids), token_ids.numel(), len(token_ids)
    )


def _calibration(
    windows: torch.Tensor,
    options: QuantizeOptions,
    source: str,
    sha256: str,
    num_tokens: int,
    num_documents: int,
) -> Calibration:
    """Windows in which every token counts."""
    report = CalibrationReport(
        source=source,
        sha256=sha256,
        tokens_sha256=_hash_tokens(windows),
        num_text_tokens=num_tokens,
        num_windows=len(windows),
        num_windows_asked=options.num_samples,
        seq_len=options.seq_len,
        num_documents=num_documents,
        num_distinct_tokens=len(windows.unique()),
    )
    return Calibration(windows, report)


def _hash_tokens(token_ids: torch.Tensor) -> str:
    return hashlib.sha256(token_ids.numpy().astype("<i8").tobytes()).hexdigest()
