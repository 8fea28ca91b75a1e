"""An output head in 8 bits: stored beside a tied embedding, read by the judge and the server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.decoder import Decoder
from qserve.quant.errors import OptionError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.registry import OutputFormat
from qserve.quant.options import Head, Method, QuantizeOptions
from qserve.quant.pipeline import quantize
from qserve.quant.progress import ignore_progress
from qserve.serve.config import HeadDtype
from qserve.serve.weights import WeightReader

MakeLlama = Callable[..., Path]

HOLDERS = {
    "int4": QuantizeOptions(Method.INT4, num_samples=2, seq_len=32, head=Head.INT8),
    "awq as compressed-tensors": QuantizeOptions(
        Method.RTN, output=OutputFormat.COMPRESSED_TENSORS, head=Head.INT8
    ),
    "gptq": QuantizeOptions(Method.GPTQ, num_samples=2, seq_len=32, head=Head.INT8),
    "smoothquant": QuantizeOptions(Method.SMOOTHQUANT, num_samples=2, seq_len=32, head=Head.INT8),
}


@pytest.mark.parametrize("options", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "untied"])
def test_formats_that_hold_a_head_in_8_bits_give_it_back(
    options: QuantizeOptions, is_tied: bool, make_tiny_llama: MakeLlama, tmp_path: Path
) -> None:
    source = Checkpoint(make_tiny_llama(tie_word_embeddings=is_tied, num_hidden_layers=1))
    quantize(source, tmp_path, options, ignore_progress)
    written = Checkpoint(tmp_path)
    head = written.linear("lm_head")
    assert isinstance(head, GroupedWeight)
    assert (head.bits, head.group_size, head.is_symmetric) == (8, 64, True)
    assert written.config["tie_word_embeddings"] is False
    assert "lm_head.weight" not in written or written.dtype("lm_head.weight") == "I8"

    original = Decoder(source).head().weight
    steps = original.abs().amax(1, keepdim=True) / 127
    found = Decoder(written).head()
    assert bool(((found.weight - original).abs() <= 0.51 * steps).all())
    assert found.activations is written.activations
    embedding = written.tensor("model.embed_tokens.weight").float()
    assert torch.equal(embedding, source.tensor("model.embed_tokens.weight").half().float())


def test_the_server_runs_the_stored_head(make_tiny_llama: MakeLlama, tmp_path: Path) -> None:
    source = Checkpoint(make_tiny_llama(tie_word_embeddings=True, num_hidden_layers=1))
    quantize(source, tmp_path, HOLDERS["int4"], ignore_progress)
    written = Checkpoint(tmp_path)
    linear = WeightReader(written, head_dtype=HeadDtype.FLOAT).head("lm_head", (512, 64))
    assert linear.nbytes < 512 * 64 * 2  # bytes, not the 16 bits of a float head
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    expected = x @ Decoder(written).head().weight.T
    found = linear(x, torch.empty(3, 512))
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (Method.AWQ, "AWQ gemm holds 4-bit integer codes"),
        (Method.NF4, "bitsandbytes"),
        (Method.FLOAT8, "do not go with"),
        (Method.QOQ, "QoQ holds 4-bit codes"),
    ],
)
def test_formats_that_do_not_hold_it_are_refused_before_the_work(
    method: Method, reason: str, tiny_llama: Path, tmp_path: Path
) -> None:
    options = QuantizeOptions(method, head=Head.INT8)
    with pytest.raises(OptionError, match=reason):
        quantize(Checkpoint(tiny_llama), tmp_path, options, ignore_progress)
    assert not list(tmp_path.iterdir())
