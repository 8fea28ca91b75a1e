"""A limit on the divergence: layers get more until it is kept, or nothing is left to give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qserve.quant.errors import OptionError
from qserve.quant.evaluate import Evaluation, evaluate
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.registry import OutputFormat
from qserve.quant.options import Method, QuantizeOptions
from qserve.quant.quality_limit import MAX_RETRIES, quantize_within
from qserve.quant.report import QuantizationReport


@pytest.fixture
def options(text_file: Path) -> QuantizeOptions:
    return QuantizeOptions(
        method=Method.HQQ,
        output=OutputFormat.COMPRESSED_TENSORS,
        calibration=text_file,
        num_samples=8,
        seq_len=48,
    )


def run(
    folder: Path, out: Path, text_file: Path, options: QuantizeOptions, **changes: Any
) -> tuple[QuantizationReport, list[float]]:
    """The report, and the KL of every try."""
    source, found = Checkpoint(folder), []

    def judge(checkpoint: Path) -> Evaluation:
        text = text_file.read_text()
        result = evaluate(Checkpoint(checkpoint), source, text, 4, 48, lambda _: None)
        assert result.kl is not None
        found.append(result.kl)
        return result

    out.mkdir()
    chosen = replace(options, **changes)
    return quantize_within(source, out, chosen, judge, lambda _: None)[0], found


def test_the_worst_layers_get_more_until_the_limit_is_kept(
    tiny_llama: Path, tmp_path: Path, text_file: Path, options: QuantizeOptions
) -> None:
    _, (usual,) = run(tiny_llama, tmp_path / "loose", text_file, options, max_kl=9.0)
    report, found = run(tiny_llama, tmp_path / "out", text_file, options, max_kl=usual / 3)
    assert found[0] == usual and found[-1] == report.kl
    assert report.kl is not None and report.kl <= usual / 3
    assert 1 <= len(report.retries) <= MAX_RETRIES
    assert report.retries[0].startswith(f"KL {usual:.4g} above {usual / 3:g}: more bits or smaller")
    raised = [layer for layer in report.layers if layer.reason]
    assert len(raised) > 0
    assert all(layer.bits > 4 or layer.group_size < 64 for layer in raised)
    reasons = {layer.reason for layer in raised}
    assert reasons == {f"raised to keep the KL below {usual / 3:g}"}
    sizes = [sum(f.stat().st_size for f in (tmp_path / n).iterdir()) for n in ("loose", "out")]
    assert sizes[0] < sizes[1]


def test_it_ends_when_the_format_holds_no_more(
    tiny_llama: Path, tmp_path: Path, text_file: Path, options: QuantizeOptions
) -> None:
    report, found = run(tiny_llama, tmp_path / "out", text_file, options, max_kl=1e-9)
    assert report.kl is not None and report.kl > 1e-9
    assert found == [report.kl] and report.retries == ()


def test_a_limit_on_the_size_contradicts_it(options: QuantizeOptions) -> None:
    with pytest.raises(OptionError, match="max_kl may need more"):
        replace(options, max_kl=0.1, avg_bits=4.5)
    with pytest.raises(OptionError, match="max_kl 0"):
        replace(options, max_kl=0)
