"""A float checkpoint in, a quantized one out: block by block, so that memory holds one block."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qserve.quant import rtn
from qserve.quant.allocation import return_freed, return_large_pieces
from qserve.quant.block_result import BlockResult
from qserve.quant.cache_scales import blank_scales, find_scales
from qserve.quant.calibrated import CalibratedQuantizer
from qserve.quant.calibration import Calibration, gather_calibration
from qserve.quant.decoder import EMBEDDING, HEAD, Block, Decoder
from qserve.quant.errors import CheckpointError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.layer_format import HEAD as HEAD_LAYER
from qserve.quant.formats.layer_format import QuantizedWeight
from qserve.quant.formats.overwriting import overwrite_tensors
from qserve.quant.formats.registry import make_writer
from qserve.quant.formats.shard_writer import assemble
from qserve.quant.formats.tensor_part import Part, PartWriter
from qserve.quant.formats.writer import LayerScheme, scheme_of
from qserve.quant.methods import profile_of
from qserve.quant.mixture import Estimates, Mixer
from qserve.quant.model_files import copy_files, write_config
from qserve.quant.options import QuantizeOptions
from qserve.quant.output_head import round_head
from qserve.quant.plan import Plan, make_plan
from qserve.quant.progress import Phase, Progress, ProgressCallback
from qserve.quant.report import QuantizationReport, SizeReport, TuningReport
from qserve.quant.run_state import PACKAGES, BlockRecord, RunState, run_key
from qserve.quant.storage import as_stored, in_pieces, storage_dtype
from qserve.quant.stored_size import is_written
from qserve.quant.tuning.session import tune
from qserve.quant.tuning.windows import gather_windows

PROGRAM = f"qserve:{version('qserve-llm')}"

CACHE_STRIDE = 2
"""Of the calibration windows every so many are looked at for the scales of keys and values."""

CALIBRATION = "calibration"
"""The name of the windows in the state of a run."""

ESTIMATES = "estimates"
"""The name of what was measured for a limit on the size."""

BlockQuantizer = Callable[[Block], BlockResult]


def quantize(
    source: Checkpoint,
    out: Path,
    options: QuantizeOptions,
    progress: ProgressCallback,
    work: Path | None = None,
) -> QuantizationReport:
    """Write the quantized checkpoint and its report into the existing, empty folder ``out``.

    The result has the layout of the format, the config and tokenizer of the source, and a
    ``quantization_report.json``. The same source and options give the same tensors, bit for bit.

    work: a folder for what is finished, by which the same run goes on where it was killed; the
    tensors go through it in any case. None: inside ``out`` while it lasts.
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
    return_large_pieces()
    with _work_folder(work, out) as folder:
        run = _Run(decoder, plan, options, RunState(folder / run_key(source, options)))
        run.prepare(progress)
        run.quantize_blocks(progress)
        run.write_tensors(out)
    write_config(
        out,
        source.config if plan.head is None else source.config | {"tie_word_embeddings": False},
        run.config_block(),
        dtype=decoder.architecture.dtype,
        side_file=run.side_file,
    )
    copy_files(source.folder, out)
    run.tune(out, progress)
    run.scale_cache(out, progress)
    report = run.report(time.perf_counter() - started)
    report.write(out)
    return report


@contextmanager
def _work_folder(work: Path | None, out: Path) -> Iterator[Path]:
    if work is not None:
        yield work
        return
    with TemporaryDirectory(prefix=".work-", dir=out) as folder:
        yield Path(folder)


class _Run:
    """One run: what is finished, in memory and on the disk."""

    def __init__(
        self, decoder: Decoder, plan: Plan, options: QuantizeOptions, state: RunState
    ) -> None:
        self._decoder = decoder
        self._source = decoder.checkpoint
        self._plan = plan
        self._options = options
        self._state = state
        self._profile = profile_of(options)
        self._format = make_writer(
            self._profile.output,
            PROGRAM,
            activations=self._profile.activations,
            kv_cache=None if options.kv_cache is None else options.kv_cache.scheme,
            dtype=decoder.architecture.dtype,
        )
        self._records = state.finished(with_hidden=self._profile.calibrated)
        self._calibration: Calibration | None = None
        self._mixer = Mixer(decoder, options, plan) if options.is_limited else None
        self._windows = None if options.tune is None else gather_windows(self._source, options)
        self._tuning: TuningReport | None = None
        self._total_bytes = 0
        self._bfloat16_outside: tuple[str, ...] = ()

    def prepare(self, progress: ProgressCallback) -> None:
        """Gather the calibration windows, unless nothing is read, and settle the plan by them.

        What is kept is taken from the state.
        """
        if not self._profile.calibrated and self._mixer is None:
            return
        kept = self._state.read_object(CALIBRATION)
        if kept is None:
            self._calibration = gather_calibration(self._decoder, self._options)
            self._state.write_object(CALIBRATION, self._calibration.to_dict())
        else:
            self._calibration = Calibration.from_dict(kept)
        if self._mixer is not None:
            self._plan = self._mixer.plan(self._estimates(self._mixer, progress))

    def _estimates(self, mixer: Mixer, progress: ProgressCallback) -> Estimates:
        """What the candidates of every stage add to the divergence."""
        assert self._calibration is not None
        kept = self._state.read_object(ESTIMATES)
        if kept is None:
            measured = mixer.measure(self._calibration.windows, progress)
            kept = {f"{index} {stage}": list(found) for (index, stage), found in measured.items()}
            self._state.write_object(ESTIMATES, kept)
        keys = (name.split(" ", 1) for name in kept)
        return {(int(i), stage): tuple(kept[f"{i} {stage}"]) for i, stage in keys}

    def quantize_blocks(self, progress: ProgressCallback) -> None:
        """Quantize and write every block that is not finished."""
        hidden = self._received()
        quantize_block = self._block_quantizer(hidden)
        started = time.perf_counter()
        done, total = len(self._records), self._decoder.num_blocks
        for index in range(done, total):
            record = self._quantize(index, quantize_block, hidden)
            self._records.append(record)
            pace = (time.perf_counter() - started) / (index + 1 - done)
            left = pace * (total - index - 1)
            short = sum(layer.num_borrowed > 0 for layer in record.layers)
            progress(Progress(Phase.QUANTIZE, index + 1, total, left, record.error, short))

    def _received(self) -> torch.Tensor | None:
        """What the next block receives: ``[models, S, T, hidden_size]``, the float model last.

        None where nothing is calibrated.
        """
        if not self._profile.calibrated or self._calibration is None:
            return None
        embedded = as_stored(self._decoder.embed(self._calibration.windows.token_ids))
        hidden = embedded.repeat(2 if self._profile.steps.follow_float_model else 1, 1, 1, 1)
        if self._records:
            self._state.load_hidden_(len(self._records) - 1, hidden)
        return hidden

    def _block_quantizer(self, hidden: torch.Tensor | None) -> BlockQuantizer:
        """What makes codes of one block after the other, and of ``hidden`` what leaves it."""
        if hidden is None or self._calibration is None:
            return lambda block: rtn.quantize_block(block, self._plan, self._profile.choose_grid)
        exact = hidden[1] if len(hidden) > 1 else None
        counts = self._calibration.windows.counts
        return CalibratedQuantizer(
            hidden[0], self._plan, self._profile, exact, counts
        ).quantize_block

    def _quantize(
        self, index: int, quantize_block: BlockQuantizer, hidden: torch.Tensor | None
    ) -> BlockRecord:
        """Quantize, write and keep one block, of which nothing stays in memory."""
        block = self._decoder.block(index, 1 if hidden is None else hidden.shape[2])
        result = quantize_block(block)
        block.release_(result.weights)
        return_freed()
        return self._state.commit(index, self._write_block(block, result), hidden)

    def _write_block(self, block: Block, result: BlockResult) -> BlockRecord:
        schemes: dict[str, LayerScheme] = {}
        bfloat16: list[str] = []
        packed_bytes = 0
        with self._state.part_of(block.index) as part:
            for name, weight in result.weights.items():
                full_name = block.full_name(name)
                packed = self._encode(full_name, weight)
                for key, tensor in packed.items():
                    part.add(f"{full_name}.{key}", tensor)
                packed_bytes += sum(tensor.nbytes for tensor in packed.values())
                schemes[full_name] = scheme_of(weight)
            for name, parameter in block.layer.named_parameters():
                if name.removesuffix(".weight") not in result.weights:
                    full_name = block.full_name(name)
                    if _write_float(part, full_name, parameter.detach()) is torch.bfloat16:
                        bfloat16.append(full_name)
            return BlockRecord(
                part.finish(), result.layers, result.error, schemes, tuple(bfloat16), packed_bytes
            )

    def _encode(self, name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
        try:
            return self._format.encode(weight)
        except ValueError as error:
            raise CheckpointError(
                f"{name}: {error}; its weights are too large, fetch the checkpoint again"
            ) from None

    def write_tensors(self, out: Path) -> None:
        """Write all tensors to ``out``: the blocks, then embedding, final norm, untied head."""
        outside = self._write_outside()
        parts = [*(record.part for record in self._records), outside]
        self._total_bytes = assemble(parts, self._state.folder, out, self._options.max_shard_bytes)

    def _write_outside(self) -> Part:
        written = {entry.name for record in self._records for entry in record.part.entries}
        written |= {f"{name}.weight" for record in self._records for name in record.schemes}
        bfloat16 = []
        with PartWriter(self._state.folder / "outside.tensors") as part:
            if self._plan.head is not None:
                head = self._source.tensor(EMBEDDING if self._decoder.is_tied else HEAD)
                for key, tensor in self._encode(HEAD_LAYER, round_head(head)).items():
                    part.add(f"{HEAD_LAYER}.{key}", tensor)
                written.add(HEAD)
            for name in self._source:
                if name in written or not is_written(self._decoder, name):
                    continue
                if _write_float(part, name, self._source.tensor(name)) is torch.bfloat16:
                    bfloat16.append(name)
            for name, scales in self._blank_scales().items():
                part.add(name, scales)
            self._bfloat16_outside = tuple(bfloat16)
            return part.finish()

    def _blank_scales(self) -> dict[str, torch.Tensor]:
        """Room for the scales of keys and values, which only the finished model can tell."""
        if self._options.kv_cache is None:
            return {}
        num_heads = self._decoder.config.num_key_value_heads
        return blank_scales(self._decoder.num_blocks, num_heads)

    @property
    def side_file(self) -> str | None:
        """Another file that holds the quantization too, if the format has one."""
        return self._format.side_file

    def config_block(self) -> dict[str, Any]:
        """The ``quantization_config`` of what was written."""
        schemes = {n: scheme for record in self._records for n, scheme in record.schemes.items()}
        if self._plan.head is not None:
            schemes[HEAD_LAYER] = self._plan.head
        return self._format.config_block(schemes, [layer.name for layer in self._plan.skipped])

    def scale_cache(self, out: Path, progress: ProgressCallback) -> None:
        """Find the scales of keys and values of the checkpoint in ``out``, if that is asked for."""
        asked = self._options.kv_cache
        if asked is not None:
            calibration = self._calibration or gather_calibration(self._decoder, self._options)
            windows = calibration.windows[::CACHE_STRIDE]
            decoder = Decoder(Checkpoint(out))
            overwrite_tensors(out, find_scales(decoder, windows, asked.scheme.kind, progress))

    def tune(self, out: Path, progress: ProgressCallback) -> None:
        """Let scales and norms of the whole checkpoint in ``out`` learn, if that is asked for."""
        if self._options.tune is not None and self._windows is not None:
            self._tuning = tune(
                out, self._source, self._windows, self._options.tune, self._format, progress
            )

    def report(self, seconds: float) -> QuantizationReport:
        """Everything that happened."""
        layers = tuple(layer for record in self._records for layer in record.layers)
        num_weights = sum(layer.in_features * layer.out_features for layer in layers)
        packed_bytes = sum(record.packed_bytes for record in self._records)
        bfloat16 = [name for record in self._records for name in record.bfloat16]
        source_files = set(self._source.tensor_files.values())
        return QuantizationReport(
            model=self._source.folder.name,
            architecture=self._source.architecture,
            method=self._options.method.value,
            effort=self._options.effort.value,
            bits=self._plan.bits,
            group_size=self._plan.group_size,
            head=self._options.head.value,
            seed=self._options.seed,
            calibration=None if self._calibration is None else self._calibration.report,
            tuning=self._tuning,
            layers=layers,
            skipped=self._plan.skipped,
            block_errors=tuple(r.error for r in self._records if r.error is not None),
            bfloat16_tensors=(*bfloat16, *self._bfloat16_outside),
            sizes=SizeReport(
                source_bytes=sum(path.stat().st_size for path in source_files),
                quantized_bytes=self._total_bytes,
                bits_per_weight=8 * packed_bytes / num_weights,
            ),
            seconds=seconds,
            peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            versions={package: version(package) for package in PACKAGES},
        )


def _write_float(part: PartWriter, name: str, tensor: torch.Tensor) -> torch.dtype:
    """Append a tensor in the type it is stored in, which is returned, a piece at a time."""
    dtype = storage_dtype(tensor)
    part.add_pieces(name, dtype, tensor.shape, (piece.to(dtype) for piece in in_pieces(tensor)))
    return dtype
