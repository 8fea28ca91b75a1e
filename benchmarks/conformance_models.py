"""The small float model of the conformance matrix, and our checkpoints of it in every format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qserve.kernels.activations import MAX_FLOAT8, Activations
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.formats.bitsandbytes import FP4, NF4
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.layer_format import QuantizedWeight
from qserve.quant.formats.registry import OutputFormat, make_writer
from qserve.quant.formats.writer import scheme_of
from qserve.quant.grid import LevelSet, Rounded, Zero, grid_over_all, nearest_levels
from qserve.quant.model_files import copy_files, write_config

VOCAB_SIZE = 512
NUM_WINDOWS, WINDOW_TOKENS = 2, 64
LAYERS = "model.layers."
WHOLE_ROW = -1


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one checkpoint is made by rounding to nearest. orders_inputs: GPTQ's activation order."""

    output: OutputFormat
    levels: LevelSet
    group_size: int = 64
    activations: Activations | None = None
    orders_inputs: bool = False


def _codebook(table: torch.Tensor) -> LevelSet:
    values = tuple(table.sort().values.tolist())
    return LevelSet(4, codebook=values, scale_dtype=torch.float32, nested=True)


def _float8() -> LevelSet:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    table = codes[codes.isfinite()].unique() / MAX_FLOAT8
    return LevelSet(8, codebook=tuple(table.tolist()), scale_dtype=torch.float32)


def _symmetric(bits: int) -> LevelSet:
    return LevelSet(bits, Zero.MIDDLE)


INT8_ROWS = LevelSet(8, Zero.CENTERED, scale_dtype=torch.float32)
PACKED = OutputFormat.COMPRESSED_TENSORS
RECIPES = {
    "awq": Recipe(OutputFormat.AWQ, LevelSet(4)),
    "gptq, 4 bits": Recipe(OutputFormat.GPTQ, _symmetric(4)),
    "gptq, 8 bits": Recipe(OutputFormat.GPTQ, _symmetric(8), WHOLE_ROW),
    "gptq, 3 bits": Recipe(OutputFormat.GPTQ, _symmetric(3)),
    "gptq, 2 bits": Recipe(OutputFormat.GPTQ, _symmetric(2)),
    "gptq, activation order": Recipe(OutputFormat.GPTQ, _symmetric(4), orders_inputs=True),
    "gptq-v2, asymmetric": Recipe(OutputFormat.GPTQ_V2, LevelSet(4)),
    "pack-quantized, 4 bits": Recipe(PACKED, _symmetric(4)),
    "pack-quantized, asymmetric": Recipe(PACKED, LevelSet(4)),
    "pack-quantized, 3 bits": Recipe(PACKED, _symmetric(3)),
    "int-quantized": Recipe(PACKED, INT8_ROWS, WHOLE_ROW, Activations.INT8_TOKEN),
    "float-quantized": Recipe(PACKED, _float8(), WHOLE_ROW, Activations.FLOAT8_TOKEN),
    "naive-quantized": Recipe(PACKED, _float8(), WHOLE_ROW),
    "nf4": Recipe(OutputFormat.BITSANDBYTES, _codebook(NF4)),
    "fp4": Recipe(OutputFormat.BITSANDBYTES, _codebook(FP4)),
    "LLM.int8": Recipe(OutputFormat.BITSANDBYTES, INT8_ROWS, WHOLE_ROW),
}


def write_float_model(folder: Path) -> None:
    """A Llama of two layers from a seed, the same on every machine, and a tokenizer for it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.08,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"t{token}": token for token in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t1").save_pretrained(folder)


def draw_tokens() -> torch.Tensor:
    """Token ids ``[S, T]`` that every peer is given."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCAB_SIZE, (NUM_WINDOWS, WINDOW_TOKENS), generator=draw)


def write_ours(source: Checkpoint, recipe: Recipe, out: Path) -> None:
    """The float model in a format, every linear layer of its blocks rounded to nearest."""
    writer = make_writer(recipe.output, "qserve", activations=recipe.activations, dtype="float32")
    tensors, schemes = {}, {}
    for name in source:
        tensor = source.tensor(name)
        if not name.startswith(LAYERS) or tensor.dim() != 2:
            tensors[name] = tensor
            continue
        layer = name.removesuffix(".weight")
        weight = _round(tensor.float(), recipe)
        schemes[layer] = scheme_of(weight)
        parts = writer.encode(weight)
        tensors |= {f"{layer}.{key}": value.clone() for key, value in parts.items()}
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    block = writer.config_block(schemes, [])
    copy_files(source.folder, out)
    write_config(out, source.config, block, dtype="float32", side_file=writer.side_file)


def _round(weight: torch.Tensor, recipe: Recipe) -> QuantizedWeight:
    order = None
    if recipe.orders_inputs:
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
        weight = weight[:, order]
    size = weight.shape[1] if recipe.group_size == WHOLE_ROW else recipe.group_size
    groups = weight.unflatten(1, (-1, size))
    grid = grid_over_all(groups, recipe.levels).settled()
    packed = Rounded(nearest_levels(groups, grid), grid).pack()
    if isinstance(packed, GroupedWeight) and order is not None:
        return replace(packed, input_order=order)
    return packed
