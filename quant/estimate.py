"""What a quantization will cost and give, from the headers of the model alone."""

from __future__ import annotations

import math
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from qserve.quant.architecture import EXPERTS, Fold, Stage
from qserve.quant.calibrated import MIN_TOKENS_PER_INPUT
from qserve.quant.calibration import check_calibration
from qserve.quant.decoder import EMBEDDING, Block, Decoder
from qserve.quant.decoder import HEAD as HEAD_WEIGHT
from qserve.quant.engine_rules import VERSIONS, Facts, Verdict, judge
from qserve.quant.errors import CheckpointError
from qserve.quant.formats.awq import AwqWriter
from qserve.quant.formats.layer_format import HEAD, PackedLayer
from qserve.quant.formats.writer import LayerScheme
from qserve.quant.half_quadratic import solve_grid
from qserve.quant.methods import WHOLE_ROW, Profile, profile_of
from qserve.quant.mixture import Mixer
from qserve.quant.options import QuantizeOptions
from qserve.quant.plan import Plan, SkippedLayer, block_name, make_plan
from qserve.quant.stacked_rows import NUMBERS_AT_ONCE
from qserve.quant.steps import Rounding, Transform
from qserve.quant.stored_size import STORED_BYTES, PackedSizes, coded_head, unpacked_bytes
from qserve.quant.target import Target, divides
from qserve.quant.tuning.costs import TuningCosts

FLOAT_BYTES = 4

TRANSFORM_WINDOWS = 8
SEARCHED_CANDIDATES = 63
SEARCH_ROWS = 128
FULL_CANDIDATES = 5
"""What the search for scales does, see `quant/scaling.py`."""

FEEDBACK_PRODUCTS = 8.0
NEAREST_PRODUCTS = 4.0
"""Products of a weight with its Gram matrix that range, rounding and refit take together."""

FEEDBACK_OPERATIONS = 55_000.0
NEAREST_OPERATIONS = 40_000.0
PLAIN_OPERATIONS = 3_000.0
SOLVED_OPERATIONS = 15_000.0
"""For each weight, for what is no product (steps that wait for memory, mostly): with text and
without, there last where a range is solved for (HQQ). Measured on blocks of 512 and 1024 inputs:
seconds times the speed of a large product."""

PIECES = 8
GRAM_MATRICES = 4
"""Of what a run has at once of either kind, see `quant/stacked_rows.py` and `quant/rounding.py`."""

LOADED_BYTES = 64 << 20
"""What a process has more when it quantizes than when it plans: tokenizer, pages of libraries."""

BYTES_PER_CHARACTER = 110
"""Of a text while it is tokenized in one piece."""

PROBE = 512
PROBE_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Estimate:
    """What to expect of one run.

    refused_group_sizes: sizes that the method has and the model cannot take, each with the layers
    (by their names inside a block) whose inputs it does not divide.
    quantized_bytes: of the tensors. disk_bytes: of the output's disk while the run lasts.
    memory_bytes: of the process at its highest, mapped files included. seconds: on this machine,
    with the threads of this process and nothing else running.
    """

    model: str
    architecture: str
    method: str
    format: str
    bits: int
    group_size: int
    num_blocks: int
    num_quantized_layers: int
    skipped: tuple[SkippedLayer, ...]
    refused_group_sizes: dict[int, tuple[str, ...]]
    source_bytes: int
    quantized_bytes: int
    bits_per_weight: float
    disk_bytes: int
    memory_bytes: int
    seconds: float
    engines: tuple[Verdict, ...]


def estimate(decoder: Decoder, options: QuantizeOptions) -> Estimate:
    """What ``quantize`` with these options will take and give. No weight is read.

    Raises what ``quantize`` raises before it begins, and ``CheckpointError`` for tensors that are
    missing or have another shape than the configuration implies.
    """
    source = decoder.checkpoint
    if source.method is not None:
        raise CheckpointError(
            f"{source.folder} is already quantized ({source.method}): give the float checkpoint"
        )
    plan, profile = make_plan(decoder, options), profile_of(options)
    _check_headers(decoder)
    if profile.calibrated or options.is_limited:
        check_calibration(decoder, options)
    if options.is_limited:
        Mixer(decoder, options, plan)  # refuses a limit that no choice meets
    sizes = _Sizes(decoder, plan, options)
    costs = [
        _Costs(decoder.skeleton(index), profile, options) for index in range(decoder.num_blocks)
    ]
    hidden_bytes = costs[0].hidden_bytes if profile.calibrated else 0
    process, speed = _process_bytes(), _operations_per_second()
    at_first = max(_table_bytes(decoder), _text_bytes(options))
    memory = max(at_first, *(one.memory_bytes for one in costs))
    seconds = sum(one.operations for one in costs) / speed
    if options.tune is not None:
        blocks = [one.parameters for one in costs]
        tuning = TuningCosts(decoder, options.seq_len, sizes.num_scales, (max(blocks), sum(blocks)))
        memory = max(memory, tuning.memory_bytes)
        seconds += tuning.seconds(options.tune, speed)
    return Estimate(
        model=source.folder.name,
        architecture=source.architecture,
        method=options.method.value,
        format=profile.output.value,
        bits=options.code_bits,
        group_size=plan.group_size,
        num_blocks=decoder.num_blocks,
        num_quantized_layers=sizes.num_layers,
        skipped=plan.skipped,
        refused_group_sizes=_refused(decoder, profile),
        source_bytes=sum(path.stat().st_size for path in set(source.tensor_files.values())),
        quantized_bytes=sizes.total_bytes,
        bits_per_weight=sizes.bits_per_weight,
        disk_bytes=2 * sizes.total_bytes + 2 * hidden_bytes,
        memory_bytes=process + memory,
        seconds=seconds,
        engines=tuple(judge(sizes.facts(), VERSIONS)),
    )


def _check_headers(decoder: Decoder) -> None:
    """Raise ``CheckpointError`` unless every parameter of every block is there, in its shape."""
    source = decoder.checkpoint
    for index in range(decoder.num_blocks):
        for name, parameter in decoder.skeleton(index).layer.named_parameters():
            full_name = f"model.layers.{index}.{name}"
            if source.shape(full_name) != tuple(parameter.shape):
                raise CheckpointError(
                    f"{full_name} has shape {source.shape(full_name)}, config.json implies "
                    f"{tuple(parameter.shape)}: they are of different models"
                )


def _refused(decoder: Decoder, profile: Profile) -> dict[int, tuple[str, ...]]:
    widths = {
        name: block.linear(name).in_features
        for block in map(decoder.skeleton, range(decoder.num_blocks))
        for stage in block.stages
        if not stage.is_router
        for name in stage.linears
    }
    found = {
        size: tuple(name for name, width in widths.items() if not divides(size, width))
        for size in profile.group_sizes
        if size != WHOLE_ROW
    }
    return {size: misfits for size, misfits in found.items() if misfits}


class _Sizes:
    """Bytes of the result, and what engines ask of it."""

    def __init__(self, decoder: Decoder, plan: Plan, options: QuantizeOptions) -> None:
        self._plan = plan
        self._writer = Target(options).writer
        sizes = PackedSizes(self._writer)
        self._schemes: dict[str, LayerScheme] = {}
        packed, num_weights, self.num_scales = {}, 0, 0
        for index, block in enumerate(map(decoder.skeleton, range(decoder.num_blocks))):
            for layer_set in block.layer_sets:
                spec = plan.specs.get((index, layer_set.name))
                if spec is None:
                    continue
                for name in layer_set.linears:
                    full_name, layer = block_name(index, name), block.linear(name)
                    self._schemes[full_name] = spec.scheme(layer)
                    packed[full_name] = sizes.num_bytes(layer, spec)
                    num_weights += layer.weight.numel()
                    self.num_scales += layer.weight.numel() // spec.width(layer.in_features)
        self.num_layers = len(packed)
        self.bits_per_weight = 8 * sum(packed.values()) / num_weights
        if plan.head is not None:
            self._schemes[HEAD] = plan.head
            packed[HEAD] = sizes.num_bytes(*coded_head(plan.head))
        left = unpacked_bytes(decoder, packed)
        self.total_bytes = sum(packed.values()) + sum(left.values())

    def facts(self) -> Facts:
        """What engines ask of the result."""
        skipped = [layer.name for layer in self._plan.skipped]
        block = self._writer.config_block(self._schemes, skipped)
        layers = {
            name: PackedLayer(s.out_features, s.in_features, s.bits, s.group_size)
            for name, s in self._schemes.items()
        }
        return Facts(block["quant_method"], block, layers, isinstance(self._writer, AwqWriter))


class _Costs:
    """Memory and arithmetic of one block; the text is counted at its full length."""

    def __init__(self, block: Block, profile: Profile, options: QuantizeOptions) -> None:
        self._profile = profile
        self._block = block
        self.parameters = sum(parameter.numel() for parameter in block.layer.parameters())
        self._tokens = options.num_samples * options.seq_len
        stride = max(1, options.num_samples // TRANSFORM_WINDOWS)
        self._searched_tokens = -(-options.num_samples // stride) * options.seq_len
        self._hidden_size = block.linear(block.stages[0].linears[0]).in_features
        self._wide = max(self._width(stage) for stage in block.stages)
        self._top_k = 0 if block.mixture is None else block.mixture.top_k
        self._rows = {stage.name: self._num_rows(stage) for stage in block.stages}
        self._num_models = 2 if profile.steps.follow_float_model else 1
        self.hidden_bytes = FLOAT_BYTES * self._num_models * self._tokens * self._hidden_size

    def _width(self, stage: Stage) -> int:
        return self._block.linear(stage.linears[0]).in_features

    def _num_rows(self, stage: Stage) -> int:
        return sum(self._block.linear(name).out_features for name in stage.linears)

    def _shown(self, stage: Stage, tokens: int, least_per_input: int = 0) -> float:
        """How many of so many tokens choose the codes of a stage."""
        mixture = self._block.mixture
        if mixture is None or stage.layer_set != EXPERTS:
            return tokens
        share = self._top_k / len(mixture.experts)
        return min(tokens, max(tokens * share, least_per_input * self._wide))

    @property
    def _kept(self) -> int:
        """Numbers for each token that a walk through the block keeps, see `quant/walk.py`."""
        outputs = [stage for stage in self._block.stages if stage.fold is not Fold.NORM]
        widest = max(map(self._width, outputs))
        if self._block.mixture is None:
            return widest
        normed = self._num_models * self._hidden_size
        return max(widest, normed + (widest if self._num_models > 1 else 0))

    @property
    def memory_bytes(self) -> int:
        """Beside the process: a block, as stored, in float32 and as codes, what rounding some rows
        of a stage needs, Gram matrices, and the activations."""
        stages = self._block.stages
        weight = max(self._rows[stage.name] * self._width(stage) for stage in stages)
        numbers = PIECES * min(NUMBERS_AT_ONCE, weight)
        if self._profile.calibrated:
            numbers += GRAM_MATRICES * self._wide**2
            numbers += self._tokens * (self._num_models * self._hidden_size + self._kept)
            numbers += (2 + self._top_k) * self._searched_tokens * self._hidden_size
        return FLOAT_BYTES * (self.parameters + numbers) + (STORED_BYTES + 1) * self.parameters

    @property
    def operations(self) -> float:
        """Floating-point operations, in the time that those of a large product take."""
        if not self._profile.calibrated:
            is_solved = self._profile.choose_grid is solve_grid
            return (SOLVED_OPERATIONS if is_solved else PLAIN_OPERATIONS) * self.parameters
        feeds_back = self._profile.steps.rounding is Rounding.FEEDBACK
        products = FEEDBACK_PRODUCTS if feeds_back else NEAREST_PRODUCTS
        total = self.parameters * (FEEDBACK_OPERATIONS if feeds_back else NEAREST_OPERATIONS)
        for stage in self._block.stages:
            rows, width = self._rows[stage.name], self._width(stage)
            shown = self._shown(stage, self._tokens, MIN_TOKENS_PER_INPUT)
            searched_tokens = self._shown(stage, self._searched_tokens)
            total += 2.0 * rows * width * (self._num_models * shown + searched_tokens)
            if stage.is_router:
                continue
            total += width**2 * ((2 * self._num_models - 1) * shown + searched_tokens)
            if self._profile.steps.transform is Transform.SCALE:
                searched = SEARCHED_CANDIDATES * SEARCH_ROWS + FULL_CANDIDATES * rows
                total += 2.0 * searched * width**2
            total += 2.0 * products * rows * width**2
        return total


def _table_bytes(decoder: Decoder) -> int:
    """Of embedding and head, which are checked before the first block."""
    names = [EMBEDDING] if decoder.is_tied else [EMBEDDING, HEAD_WEIGHT]
    shapes = [decoder.checkpoint.shape(name) for name in names]
    return sum(STORED_BYTES * math.prod(shape) for shape in shapes)


def _text_bytes(options: QuantizeOptions) -> int:
    """Of the calibration text while windows are made of it, if it is a file."""
    if not isinstance(options.calibration, Path):
        return 0
    return BYTES_PER_CHARACTER * options.calibration.stat().st_size


def _process_bytes() -> int:
    """The process as a run will find it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + LOADED_BYTES


def _operations_per_second() -> float:
    """What this machine does in a product of two matrices, with the threads of this process.

    The clock is that of this thread, which stands still while the processor does something else.
    """
    left, right = torch.ones(PROBE, PROBE), torch.ones(PROBE, PROBE)
    fastest, started = math.inf, time.thread_time()
    while time.thread_time() - started < PROBE_SECONDS:
        begun = time.thread_time()
        torch.mm(left, right)
        fastest = min(fastest, time.thread_time() - begun)
    return 2.0 * PROBE**3 / fastest
