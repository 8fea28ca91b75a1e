"""One block through everything, with every method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qserve.quant import smoke
from qserve.quant.errors import CheckpointError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.options import Method, QuantizeOptions
from qserve.quant.smoke import TOLERANCE, try_block


@pytest.mark.parametrize("method", list(Method))
def test_a_block_is_quantized_saved_read_and_run(
    tiny_llama: Path, tiny_options: QuantizeOptions, tmp_path: Path, method: Method
) -> None:
    options = replace(tiny_options, method=method, group_size=None)
    found = try_block(Checkpoint(tiny_llama), options, tmp_path)
    assert found.block == 0 and len(found.checks) == 7
    assert all(check.saved == 0 and 0 < check.ran < TOLERANCE for check in found.checks)


def test_a_kernel_that_computes_something_else_is_noticed(
    tiny_llama: Path,
    tiny_options: QuantizeOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = lambda inputs, weight, activations: torch.ones(len(inputs), 1)  # noqa: E731
    monkeypatch.setattr(smoke, "multiply", wrong)
    options = replace(tiny_options, method=Method.RTN, ignore=(r"\.0\.",))
    with pytest.raises(CheckpointError, match=r"model.layers.1.self_attn.q_proj: .*qserve doctor"):
        try_block(Checkpoint(tiny_llama), options, tmp_path)
