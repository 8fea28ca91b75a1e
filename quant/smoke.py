"""One block of a model through everything: quantized, saved, read again, run by the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qserve.kernels.activations import Activations, round_activations
from qserve.kernels.linear_weight import prepare_linear
from qserve.kernels.packed_weight import multiply
from qserve.quant import rtn
from qserve.quant.block_result import BlockResult
from qserve.quant.calibrated import CalibratedQuantizer
from qserve.quant.calibration import gather_calibration
from qserve.quant.decoder import Block, Decoder
from qserve.quant.errors import CheckpointError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.registry import make_writer
from qserve.quant.formats.shard_writer import ShardWriter
from qserve.quant.formats.writer import scheme_of
from qserve.quant.methods import Profile, profile_of
from qserve.quant.model_files import write_config
from qserve.quant.options import DEFAULT_SHARD_BYTES, QuantizeOptions
from qserve.quant.plan import Plan, make_plan
from qserve.quant.storage import as_stored

NUM_WINDOWS = 4
WINDOW_TOKENS = 128
NUM_ROWS = 16

TOLERANCE = 2e-2
"""Relative to the norm of the outputs: kernels that round activations to 8 bits are off by 1e-2."""


@dataclass(frozen=True, slots=True)
class SmokeCheck:
    """One layer: of what was saved and of what the kernel computed with it, relative errors.

    saved: largest difference between the weight as chosen and as read again. ran: difference of the
    kernel's outputs from those of the dequantized weight.
    """

    name: str
    format: str
    saved: float
    ran: float


@dataclass(frozen=True, slots=True)
class Smoke:
    """What was tried. error: of the block's output on the text; None for methods that read none."""

    block: int
    num_tokens: int
    error: float | None
    checks: tuple[SmokeCheck, ...]


def try_block(source: Checkpoint, options: QuantizeOptions, folder: Path) -> Smoke:
    """Quantize the first block that has a quantized layer, into the empty ``folder``, and use it.

    Few tokens are read, so the errors are no measure of quality.
    Raises what ``quantize`` raises, and ``CheckpointError`` when what was read again or computed is
    not what was saved.
    """
    length = min(options.seq_len, WINDOW_TOKENS)
    options = replace(options, num_samples=min(options.num_samples, NUM_WINDOWS), seq_len=length)
    decoder = Decoder(source)
    plan, profile = make_plan(decoder, options), profile_of(options)
    index = min(index for index, _ in plan.specs)
    block = decoder.block(index, length)
    result, num_tokens = _quantize(decoder, block, plan, options)
    reader = _save(decoder, block, result, profile, folder)
    checks = tuple(_checks(block, result, profile, reader))
    for check in checks:
        if check.saved > 0 or check.ran > TOLERANCE:
            raise CheckpointError(
                f"{check.name}: the weight that was read again is off by {check.saved:.1e}, the "
                f"kernel's outputs by {check.ran:.1e}: this build does not run the model's shapes; "
                "report it with the output of `qserve doctor`"
            )
    return Smoke(index, num_tokens, result.error, checks)


def _quantize(
    decoder: Decoder, block: Block, plan: Plan, options: QuantizeOptions
) -> tuple[BlockResult, int]:
    profile = profile_of(options)
    if not profile.calibrated:
        return rtn.quantize_block(block, plan, profile.choose_grid), 0
    windows = gather_calibration(decoder, options).windows
    hidden = as_stored(decoder.embed(windows.token_ids))
    exact = hidden.clone() if profile.steps.follow_float_model else None
    quantizer = CalibratedQuantizer(hidden, plan, profile, exact, windows.counts)
    return quantizer.quantize_block(block), int(windows.counts.sum())


def _save(
    decoder: Decoder, block: Block, result: BlockResult, profile: Profile, folder: Path
) -> Checkpoint:
    """Write the quantized layers of a block as a checkpoint, and open it."""
    dtype = decoder.architecture.dtype
    writer = make_writer(profile.output, "", activations=profile.activations, dtype=dtype)
    schemes = {}
    with ShardWriter(folder, DEFAULT_SHARD_BYTES) as files:
        for name, weight in result.weights.items():
            schemes[block.full_name(name)] = scheme_of(weight)
            for key, tensor in writer.encode(weight).items():
                files.add(f"{block.full_name(name)}.{key}", tensor)
        files.finish()
    write_config(folder, decoder.checkpoint.config, writer.config_block(schemes, []), dtype=dtype)
    return Checkpoint(folder)


def _checks(
    block: Block, result: BlockResult, profile: Profile, reader: Checkpoint
) -> Iterator[SmokeCheck]:
    draw = torch.Generator().manual_seed(0)
    for name, chosen in result.weights.items():
        read = reader.linear(block.full_name(name))
        assert not isinstance(read, torch.Tensor)
        dense = read.dequantize()
        inputs = torch.randn(NUM_ROWS, dense.shape[1], generator=draw)
        activations = profile.activations or Activations.FLOAT32
        expected = round_activations(inputs, activations) @ dense.T
        found = multiply(inputs, prepare_linear(read), activations=activations)
        yield SmokeCheck(
            block.full_name(name),
            str(reader.method),
            float((dense - chosen.dequantize()).abs().max()),
            float((found - expected).norm() / expected.norm()),
        )
