"""Which engines load a checkpoint, by rules read in the source of one version of each.

A rule is a fact about one version: when an engine is read again, its version and its rules change
together. vLLM's were read in ``layers/quantization`` of 0.33.0; 0.32.0, which reads these formats
alike, is run against them by `make conformance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qserve.quant.errors import OptionError
from qserve.quant.formats.awq import AwqFormat, Layout
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.fused_sets import expert_modules
from qserve.quant.formats.layer_format import HEAD, PackedLayer

VERSIONS = {"vllm": "0.33.0", "transformers": "5.23.0", "sglang": "by the rules of vLLM 0.33.0"}
MARLIN_GROUPS = (-1, 32, 64, 128)
AWQ_KEYS = ({"bits", "w_bit"}, {"group_size", "q_group_size"}, {"zero_point"})


@dataclass(frozen=True, slots=True)
class Rule:
    """One fact. refuses: the engine does not load it; else it loads, and this is worth knowing."""

    engines: tuple[str, ...]
    says: str
    applies: Callable[[Facts], bool]
    refuses: bool = True


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the rules say of one engine."""

    engine: str
    version: str
    refusals: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Facts:
    """What rules ask of a checkpoint.

    method: None for a float checkpoint. block: its ``quantization_config``. layers: the packed ones
    by name. is_gemm: whether it is AWQ in the gemm layout.
    """

    method: str | None
    block: Mapping[str, Any]
    layers: Mapping[str, PackedLayer]
    is_gemm: bool

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Facts:
        """Those of a checkpoint folder, from its headers."""
        described = {name: checkpoint.describe(name) for name in checkpoint.modules}
        layers = {name: layer for name, layer in described.items() if layer is not None}
        reader = checkpoint.format
        is_gemm = isinstance(reader, AwqFormat) and reader.layout is Layout.GEMM
        return cls(checkpoint.method, checkpoint.quantization_config or {}, layers, is_gemm)

    @cached_property
    def group_sizes(self) -> set[int]:
        """Of all packed layers; -1 for one group a row."""
        return {
            -1 if layer.group_size == layer.in_features else layer.group_size
            for layer in self.layers.values()
        }

    @property
    def orders_inputs(self) -> bool:
        """Whether ``desc_act`` is stated, for other than one group a row."""
        return bool(self.block.get("desc_act")) and self.block.get("group_size") != -1

    @property
    def bits(self) -> set[int]:
        """Of all packed layers."""
        return {layer.bits for layer in self.layers.values()}

    @property
    def has_asymmetric_groups(self) -> bool:
        """Whether a group of compressed-tensors states zero points."""
        return any(weights.get("symmetric") is False for weights in self._compressed_groups)

    @property
    def orders_groups(self) -> bool:
        """Whether a group of compressed-tensors was formed of inputs in another order."""
        return any(w.get("actorder") in (True, "group", "dynamic") for w in self._compressed_groups)

    @property
    def packs_experts(self) -> bool:
        """Whether experts of a mixture are packed."""
        return bool(expert_modules(self.layers))

    @property
    def multiplies_int8(self) -> bool:
        """Whether a group of compressed-tensors has int8 activations."""
        inputs = [group.get("input_activations") or {} for group in self._all_groups]
        return any(one.get("type") == "int" for one in inputs)

    @property
    def has_float8_weights_alone(self) -> bool:
        """Whether a group of compressed-tensors has float weights and leaves activations alone."""
        return any(
            (group.get("weights") or {}).get("type") == "float"
            and not group.get("input_activations")
            for group in self._all_groups
        )

    @property
    def _compressed_groups(self) -> list[Mapping[str, Any]]:
        return [group.get("weights") or {} for group in self._all_groups]

    @property
    def _all_groups(self) -> list[Mapping[str, Any]]:
        return list((self.block.get("config_groups") or {}).values())


VLLM = ("vllm", "sglang")
RULES = (
    Rule(
        VLLM, "AWQ is read in the gemm layout alone", lambda f: f.method == "awq" and not f.is_gemm
    ),
    Rule(
        VLLM,
        "AWQ wants groups of 32, 64 or 128, or one a row",
        lambda f: f.method == "awq" and not f.group_sizes <= set(MARLIN_GROUPS),
    ),
    Rule(
        VLLM,
        "GPTQ with sym false is refused (`qserve convert --to compressed-tensors`)",
        lambda f: f.method == "gptq" and f.block.get("sym") is False,
    ),
    Rule(
        VLLM,
        "GPTQ of 4 and 8 bits is read, no other width",
        lambda f: f.method == "gptq" and not f.bits <= {4, 8},
    ),
    Rule(
        VLLM,
        "GPTQ wants groups of 32, 64 or 128, or one a row",
        lambda f: f.method == "gptq" and not f.group_sizes <= set(MARLIN_GROUPS),
    ),
    Rule(
        VLLM,
        "AWQ wants bits, group_size and zero_point in its block",
        lambda f: f.method == "awq" and any(not names & set(f.block) for names in AWQ_KEYS),
    ),
    Rule(
        VLLM,
        "inputs ordered by activation are refused (actorder group)",
        lambda f: f.method == "compressed-tensors" and f.orders_groups,
    ),
    Rule(
        VLLM,
        "desc_act true is refused unless there is one group a row",
        lambda f: f.method == "gptq" and f.orders_inputs,
    ),
    Rule(
        VLLM,
        "GPTQ wants bits, group_size, desc_act and sym in its block",
        lambda f: (
            f.method == "gptq" and not {"bits", "group_size", "desc_act", "sym"} <= set(f.block)
        ),
    ),
    Rule(
        ("vllm",),
        "bitsandbytes is read by the package vllm-bnb-plugin alone, not by vLLM since 0.28",
        lambda f: f.method == "bitsandbytes",
    ),
    Rule(VLLM, "sparse weights are refused", lambda f: bool(f.block.get("sparsity_config"))),
    Rule(
        VLLM,
        "key-value scales are read as float8, per layer or per head",
        lambda f: (f.block.get("kv_cache_scheme") or {}).get("type") == "int",
    ),
    Rule(
        VLLM,
        "3-bit words must run on (compressed-tensors 0.19 and later); older files are misread",
        lambda f: f.method == "compressed-tensors" and 3 in f.bits,
        refuses=False,
    ),
    Rule(
        ("transformers",),
        "gptqmodel must be installed",
        lambda f: f.method in ("awq", "gptq"),
        refuses=False,
    ),
    Rule(
        ("transformers",),
        "asymmetric packed integers load with compressed-tensors 0.17, or with dequantize=True",
        lambda f: f.method == "compressed-tensors" and f.has_asymmetric_groups,
        refuses=False,
    ),
    Rule(
        ("transformers",),
        "compressed-tensors must be installed",
        lambda f: f.method == "compressed-tensors",
        refuses=False,
    ),
    Rule(
        ("transformers",),
        "bitsandbytes 0.46.1 or later must be installed",
        lambda f: f.method == "bitsandbytes",
        refuses=False,
    ),
    Rule(
        ("transformers",),
        "experts packed by bitsandbytes are not read: a block's experts are one tensor there",
        lambda f: f.method == "bitsandbytes" and f.packs_experts,
    ),
    Rule(
        ("transformers",),
        "experts in int8 with int8 activations are not read",
        lambda f: f.packs_experts and f.multiplies_int8,
    ),
    Rule(
        VLLM,
        "experts in float8 want float8 activations (`--fp8`)",
        lambda f: f.packs_experts and f.has_float8_weights_alone,
    ),
    Rule(
        ("transformers", *VLLM),
        "QoQ in this layout is read by qserve alone",
        lambda f: f.method == "qoq",
    ),
    Rule(
        ("transformers",),
        "auto-round 0.5 or later must be installed",
        lambda f: f.method == "auto-round",
        refuses=False,
    ),
    Rule(
        ("transformers", *VLLM),
        "the output head is quantized: lm_head must be true in the block",
        lambda f: f.method == "gptq" and HEAD in f.layers and not f.block.get("lm_head"),
    ),
)


def judge_for(checkpoint: Checkpoint, engines: Iterable[str]) -> list[Verdict]:
    """What the rules say of each engine. Raises ``OptionError`` for one that has no rules."""
    return judge(Facts.of(checkpoint), engines)


def judge(facts: Facts, engines: Iterable[str]) -> list[Verdict]:
    """The same of a checkpoint that need not exist."""
    verdicts = []
    for engine in map(str.strip, engines):
        if engine not in VERSIONS:
            raise OptionError(f"no rules for {engine!r}: choose from {', '.join(VERSIONS)}")
        said = [rule for rule in RULES if engine in rule.engines and rule.applies(facts)]
        verdicts.append(
            Verdict(
                engine,
                VERSIONS[engine],
                [rule.says for rule in said if rule.refuses],
                [rule.says for rule in said if not rule.refuses],
            )
        )
    return verdicts
