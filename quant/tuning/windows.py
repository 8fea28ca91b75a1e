"""The tokens that tuning learns from and is judged on: those that quantization did not use."""

from __future__ import annotations

from dataclasses import dataclass

from qserve.quant.errors import CalibrationError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.options import QuantizeOptions
from qserve.quant.window_text import read_window_text
from qserve.quant.windows import Windows

HELD_BACK_SHARE = 1 / 16
MAX_HELD_BACK = 8
MIN_WINDOWS = 2


@dataclass(frozen=True, slots=True)
class TuningWindows:
    """Windows of tokens: to learn from, and held back to judge by."""

    learned: Windows
    held_back: Windows


def gather_windows(model: Checkpoint, options: QuantizeOptions) -> TuningWindows:
    """The windows that quantization leaves of the same text.

    The last ones are held back: what is learned is judged on other pages. model: whose tokenizer
    counts. Raises ``CalibrationError`` for a text that is too short.
    """
    text = read_window_text(model.folder, options)
    unused = text.left
    if len(unused) < MIN_WINDOWS:
        raise CalibrationError(
            f"the text has {text.num_tokens} tokens, {options.num_samples} windows of "
            f"{options.seq_len} are for quantization; that leaves {len(unused)} windows to tune "
            "on: give a longer text or fewer samples"
        )
    num_held_back = min(MAX_HELD_BACK, max(1, round(HELD_BACK_SHARE * len(unused))))
    return TuningWindows(unused[:-num_held_back], unused[-num_held_back:])
