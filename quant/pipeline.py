"""A float checkpoint in, a quantized one out: block by block, so that memory holds one block."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qserve.quant import rtn
from qserve.quant.block_result import BlockResult
from qserve.quant.calibrated import CalibratedQuantizer
from qserve.quant.calibration import Calibration, gather_calibration
from qserve.quant.decoder import HEAD, Block, Decoder
from qserve.quant.errors import CheckpointError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.registry import make_writer
from qserve.quant.formats.shard_writer import ShardWriter
from qserve.quant.formats.writer import LayerScheme, scheme_of
from qserve.quant.methods import profile_of
from qserve.quant.model_files import copy_files, write_config
from qserve.quant.options import QuantizeOptions
from qserve.quant.plan import Plan, make_plan
from qserve.quant.progress import Phase, Progress, ProgressCallback
from qserve.quant.report import CalibrationReport, QuantizationReport, SizeReport
from qserve.quant.storage import as_stored, to_storage

COMPUTED = ".rotary_emb.inv_freq"
"""Tensors that old checkpoints hold although they follow from the configuration."""

PROGRAM = f"qserve:{version('qserve-llm')}"

PACKAGES = ("qserve-llm", "torch", "transformers", "tokenizers")

BlockQuantizer = Callable[[Block], BlockResult]


def quantize(
    source: Checkpoint, out: Path, options: QuantizeOptions, progress: ProgressCallback
) -> QuantizationReport:
    """Write the quantized checkpoint and its report into the existing, empty folder ``out``.

    The result has AutoAWQ's layout (see ``quant/formats/awq.py``), the config and tokenizer of the
    source, and a ``quantization_report.json``. The same source and options give the same tensors,
    bit for bit.
    Raises ``CheckpointError`` for a source that is damaged or already quantized,
    ``UnsupportedModelError``, ``CalibrationError`` and ``OptionError``.
    """
    started = time.perf_counter()
    if source.method is not None:
        raise CheckpointError(
            f"{source.folder} is already quantized ({source.method}): give the float checkpoint"
        )
    decoder = Decoder(source)
    plan = make_plan(decoder, options)
    decoder.check_outside_blocks()
    run = _Run(decoder, plan, options, ShardWriter(out, options.max_shard_bytes))
    calibration = run.prepare()
    run.quantize_blocks(progress)
    run.write_rest()
    write_config(
        out,
        source.config,
        run.config_block(),
        dtype=decoder.architecture.dtype,
        side_file=run.side_file,
    )
    copy_files(source.folder, out)
    report = run.report(calibration, time.perf_counter() - started)
    report.write(out)
    return report


class _Run:
    """The state of one run: what is written, and what is known about it so far."""

    def __init__(
        self, decoder: Decoder, plan: Plan, options: QuantizeOptions, writer: ShardWriter
    ) -> None:
        self._decoder = decoder
        self._source = decoder.checkpoint
        self._plan = plan
        self._options = options
        self._writer = writer
        self._results: list[BlockResult] = []
        self._written: set[str] = set()
        self._bfloat16: list[str] = []
        self._packed_bits = 0
        self._schemes: dict[str, LayerScheme] = {}
        profile = profile_of(options)
        self._profile = profile
        self._format = make_writer(
            profile.output,
            PROGRAM,
            activations=profile.activations,
            dtype=decoder.architecture.dtype,
        )
        self._length = 1
        self._quantize_block: BlockQuantizer = lambda block: rtn.quantize_block(
            block, plan, profile.choose_grid
        )

    def prepare(self) -> Calibration | None:
        """Gather the calibration windows, unless the method reads none."""
        if not self._profile.calibrated:
            return None
        calibration = gather_calibration(self._decoder, self._options)
        hidden = as_stored(self._decoder.embed(calibration.token_ids))
        self._length = hidden.shape[1]
        quantizer = CalibratedQuantizer(hidden, self._plan, self._profile)
        self._quantize_block = quantizer.quantize_block
        return calibration

    def quantize_blocks(self, progress: ProgressCallback) -> None:
        """Quantize and write every block."""
        started = time.perf_counter()
        total = self._decoder.num_blocks
        for index in range(total):
            block = self._decoder.block(index, self._length)
            result = self._quantize_block(block)
            self._write_block(block, result)
            self._results.append(replace(result, weights={}))
            pace = (time.perf_counter() - started) / (index + 1)
            progress(
                Progress(Phase.QUANTIZE, index + 1, total, pace * (total - index - 1), result.error)
            )

    def _write_block(self, block: Block, result: BlockResult) -> None:
        for name, weight in result.weights.items():
            full_name = block.full_name(name)
            try:
                packed = self._format.encode(weight)
            except ValueError as error:
                raise CheckpointError(
                    f"{full_name}: {error}; its weights are too large, fetch the checkpoint again"
                ) from None
            for key, tensor in packed.items():
                self._writer.add(f"{full_name}.{key}", tensor)
            self._packed_bits += 8 * sum(tensor.nbytes for tensor in packed.values())
            self._schemes[full_name] = scheme_of(weight)
            self._written.add(f"{full_name}.weight")
        for name, parameter in block.layer.named_parameters():
            if block.full_name(name) not in self._written:
                self._write_float(block.full_name(name), parameter.detach())

    def _write_float(self, name: str, tensor: torch.Tensor) -> None:
        stored = to_storage(tensor)
        if stored.dtype is torch.bfloat16:
            self._bfloat16.append(name)
        self._writer.add(name, stored)
        self._written.add(name)

    def write_rest(self) -> None:
        """Write what is outside the blocks: embedding, final norm, head unless it is tied."""
        for name in self._source:
            is_tied_head = name == HEAD and self._decoder.is_tied
            if name not in self._written and not is_tied_head and not name.endswith(COMPUTED):
                self._write_float(name, self._source.tensor(name))
        self._writer.finish()

    @property
    def side_file(self) -> str | None:
        """Another file that holds the quantization too, if the format has one."""
        return self._format.side_file

    def config_block(self) -> dict[str, Any]:
        """The ``quantization_config`` of what was written."""
        return self._format.config_block(
            self._schemes, [layer.name for layer in self._plan.skipped]
        )

    def report(self, calibration: Calibration | None, seconds: float) -> QuantizationReport:
        """Everything that happened."""
        layers = tuple(layer for result in self._results for layer in result.layers)
        num_weights = sum(layer.in_features * layer.out_features for layer in layers)
        return QuantizationReport(
            model=self._source.folder.name,
            architecture=self._source.architecture,
            method=self._options.method.value,
            bits=self._options.code_bits,
            group_size=self._plan.group_size,
            seed=self._options.seed,
            calibration=self._calibration_report(calibration),
            layers=layers,
            skipped=self._plan.skipped,
            block_errors=tuple(r.error for r in self._results if r.error is not None),
            bfloat16_tensors=tuple(self._bfloat16),
            sizes=SizeReport(
                source_bytes=sum(path.stat().st_size for path in self._source_files()),
                quantized_bytes=self._writer.total_bytes,
                bits_per_weight=self._packed_bits / num_weights,
            ),
            seconds=seconds,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            versions={package: version(package) for package in PACKAGES},
        )

    def _source_files(self) -> set[Path]:
        return set(self._source.tensor_files.values())

    def _calibration_report(self, calibration: Calibration | None) -> CalibrationReport | None:
        if calibration is None:
            return None
        return CalibrationReport(
            source=calibration.source,
            sha256=calibration.sha256,
            num_text_tokens=calibration.num_text_tokens,
            num_windows=calibration.token_ids.shape[0],
            num_windows_asked=self._options.num_samples,
            seq_len=self._options.seq_len,
        )
