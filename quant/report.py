"""What a quantization run did and what it cost, written beside the checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qserve.quant.plan import SkippedLayer

FILE_NAME = "quantization_report.json"


@dataclass(frozen=True, slots=True)
class ScaleReport:
    """The scale chosen for a layer's inputs, ``rms(x)^input_exponent / rms(w)^weight_exponent``.

    Both exponents are 0 when no scaling was best.
    """

    input_exponent: float
    weight_exponent: float
    smallest: float
    largest: float


def relative_error(error: float, energy: float) -> float:
    """Squared error over squared norm; 0.0 for a layer of zeros, which is stored as it is."""
    return error / energy if energy else 0.0


@dataclass(frozen=True, slots=True)
class LayerReport:
    """One quantized linear layer.

    bits: of a code. group_size: inputs that share a scale; as many as there are for a whole row.
    rounded_error, error: relative squared error of rounding to nearest, and of what was stored.
        For AWQ of the layer's outputs on the calibration text, ``|X (V - W)^T|^2 / |X W^T|^2``,
        with the inputs X that the quantized model has there; for RTN, which reads no text, of the
        weights.
    clipped_share: share of the weights that lie beyond the range of their group.
    scale: None where none was searched.
    reason: why its bits or groups differ from the others'; '' when they do not.
    rounding: ``nearest`` or ``feedback``; too little text for a wide layer leaves it at nearest.
    num_tokens: of the calibration text, those that its codes were chosen by; 0 for RTN.
    num_borrowed: how many of them do not go to this expert, which saw too few of its own.
    """

    name: str
    in_features: int
    out_features: int
    bits: int
    group_size: int
    reason: str
    rounded_error: float
    error: float
    clipped_share: float
    scale: ScaleReport | None
    rounding: str
    num_tokens: int = 0
    num_borrowed: int = 0


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """The text that was looked at.

    source: the file's name, ``built-in``, ``self``, or the data set as it was asked for.
    sha256: of the UTF-8 text, of the documents where there are conversations; of the token ids
        (int64, little-endian) for self-generated windows.
    tokens_sha256: of the token ids of the windows (int64, little-endian).
    num_text_tokens: tokens of the whole text the windows are taken from.
    num_taken_tokens: of these in the windows, which may hold padding and BOS beside them.
    num_counted_tokens: positions of the windows that decide anything.
    num_windows: fewer than asked for when the text is short.
    num_documents: texts and conversations in it; windows, for self-generated ones.
    num_conversations: of the documents. num_cut: conversations that lost their end.
    num_distinct_tokens: entries of the vocabulary that occur among what counts.
    """

    source: str
    sha256: str
    tokens_sha256: str
    num_text_tokens: int
    num_taken_tokens: int
    num_counted_tokens: int
    num_windows: int
    num_windows_asked: int
    seq_len: int
    num_documents: int
    num_conversations: int
    num_cut: int
    num_distinct_tokens: int

    @property
    def coverage(self) -> float:
        """The share of the text that was looked at."""
        return self.num_taken_tokens / max(self.num_text_tokens, 1)

    def __str__(self) -> str:
        few = self.num_windows < self.num_windows_asked
        asked = f" ({self.num_windows_asked:,} asked for)" if few else ""
        what = (
            f"{self.source}: {self.num_windows} windows{asked}, {self.num_taken_tokens:,} of "
            f"{self.num_text_tokens:,} tokens ({100 * self.coverage:.0f} %), "
            f"{self.num_documents} documents, {self.num_distinct_tokens:,} different tokens"
        )
        if not self.num_conversations:
            return what
        return (
            f"{what}; {self.num_cut} of {self.num_conversations} conversations cut, "
            f"{self.num_counted_tokens:,} tokens count"
        )


@dataclass(frozen=True, slots=True)
class TuningReport:
    """What scales and norms learned after packing.

    steps: of the optimizer; as many again give the same tensors. kept_step: after which the state
    was best and was kept, 0 when nothing was changed. num_windows: learned from, those seen twice
    counted twice. num_held_back: windows that it was judged on. kl_before, kl_after: divergence
    from the float model on these, in nats, as packed and as it is now. arithmetic: the type of
    products while learning; judging is in float32.
    """

    steps: int
    kept_step: int
    num_windows: int
    num_held_back: int
    kl_before: float
    kl_after: float
    arithmetic: str
    seconds: float

    def __str__(self) -> str:
        if not self.steps:
            return f"no step: getting ready took {self.seconds:.0f} s, give more minutes"
        if not self.kept_step:
            return (
                f"KL {self.kl_before:.4f} on held-back text, none of {self.steps} steps was better"
            )
        change = f"KL {self.kl_before:.4f} to {self.kl_after:.4f} on held-back text"
        return f"{change} after {self.kept_step} of {self.steps} steps, {self.seconds:.0f} s"


@dataclass(frozen=True, slots=True)
class SizeReport:
    """Bytes of tensors on disk. bits_per_weight: of the quantized layers, with scales and zeros."""

    source_bytes: int
    quantized_bytes: int
    bits_per_weight: float


@dataclass(frozen=True, slots=True)
class QuantizationReport:
    """The whole run.

    effort: full, fast or plain. head: how the output head is stored, 16 bits or int8.
    bits, group_size: of most layers; -1 for one scale a row.
    block_errors: for each block, the squared difference its quantization makes to its output,
        relative to what the block adds to the hidden states; empty for RTN.
    bfloat16_tensors: tensors with values that float16 cannot hold, stored in bfloat16.
    peak_memory_bytes: resident memory of the process at its highest.
    versions: of this package and of those the result depends on.
    retries: what was done about a KL above the limit, in words, try by try. kl: in the end; None
        without a limit.
    """

    model: str
    architecture: str
    method: str
    effort: str
    bits: int
    group_size: int
    head: str
    seed: int
    calibration: CalibrationReport | None
    tuning: TuningReport | None
    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedLayer, ...]
    block_errors: tuple[float, ...]
    bfloat16_tensors: tuple[str, ...]
    sizes: SizeReport
    seconds: float
    peak_memory_bytes: int
    versions: dict[str, str]
    retries: tuple[str, ...] = ()
    kl: float | None = None

    @property
    def num_short_of_text(self) -> int:
        """Layers of experts that too few tokens go to."""
        return sum(layer.num_borrowed > 0 for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, in a fixed order."""
        return asdict(self)

    def write(self, folder: Path) -> None:
        """Write ``quantization_report.json`` into a folder."""
        text = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
        (folder / FILE_NAME).write_text(text + "\n", encoding="utf-8")
