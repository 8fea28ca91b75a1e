"""What a recipe may say. The JSON Schema for editors comes from these classes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from qserve.quant.evaluate import DEFAULT_NUM_WINDOWS, DEFAULT_SEQ_LEN
from qserve.quant.formats.registry import OutputFormat
from qserve.quant.options import DEFAULT_SHARD_BYTES, Effort, Head, KvCache, Method
from qserve.quant.quantities import parse_size
from qserve.quant.steps import DEFAULT_DAMPING

BUILT_IN, TOPICS = "builtin", "python-topics"


def read_size(value: Any) -> Any:
    """The bytes that a text such as ``4.5GB`` stands for; anything else is left to pydantic."""
    return parse_size(value) if isinstance(value, str) else value


def parse_share(value: Any) -> Any:
    """The number that a percentage such as ``5%`` stands for; anything else is left as it is."""
    if isinstance(value, str) and value.strip().endswith("%"):
        return float(value.strip()[:-1]) / 100
    return value


def _as_text(value: Any) -> Any:
    """A number as YAML reads it where a word is one of several: 16 is "16"."""
    return str(value) if isinstance(value, int) else value


Engine = Literal["vllm", "transformers", "sglang"]
Size = Annotated[int, BeforeValidator(read_size), Field(gt=0)]
Share = Annotated[float, BeforeValidator(parse_share), Field(ge=0)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class OverrideSection(Section):
    """What some layers get instead of the common settings."""

    layers: str = Field(description="A regular expression, searched for in the full name.")
    bits: int | None = Field(default=None, description="Width of a code; 16 leaves them alone.")
    group_size: int | None = Field(default=None, description="Inputs that share a scale.")


class TuneSection(Section):
    """How long scales and norms learn after packing: until the first of the limits."""

    minutes: float | None = Field(default=None, gt=0, description="Time for it.")
    steps: int | None = Field(default=None, ge=1, description="As many give the same again.")

    @model_validator(mode="after")
    def _ends(self) -> TuneSection:
        if self.minutes is None and self.steps is None:
            raise ValueError("tuning needs `minutes`, `steps` or both")
        return self


class QuantizeSection(Section):
    """How weights become codes. What is left out is what `qserve quantize` takes by default."""

    method: Method = Field(default=Method.AWQ, description="How weights become codes.")
    bits: int | None = Field(default=None, description="Width of a code; the method's usual one.")
    group_size: int | None = Field(
        default=None, description="Inputs that share a scale, -1 for a row; the coarsest that fits."
    )
    format: OutputFormat | None = Field(
        default=None, description="The format to write; the method's own."
    )
    effort: Effort = Field(
        default=Effort.FULL, description="`plain` is the method as published, `fast` stops early."
    )
    damping: Annotated[float, Field(gt=0, le=1)] = Field(
        default=DEFAULT_DAMPING, description="Added to the Gram matrix of error feedback."
    )
    act_order: bool = Field(
        default=False, description="Groups of inputs by importance, in GPTQ's formats."
    )
    head: Annotated[Head, BeforeValidator(_as_text)] = Field(
        default=Head.FLOAT, description="The output head, in 16 bits or int8."
    )
    overrides: tuple[OverrideSection, ...] = Field(
        default=(), description="Other settings for some layers; the later counts."
    )
    avg_bits: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Bits a weight on average; settings are chosen for each layer."
    )
    max_size: Size | None = Field(
        default=None, description="Size of the weight files: 120MB, 4.5GB, bytes; likewise."
    )
    max_kl: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="While the KL is above, the worst layers get more; a gate too."
    )
    widths: tuple[int, ...] = Field(
        default=(), description="Bits to choose from under a limit; all that the format holds."
    )
    ignore: tuple[str, ...] = Field(
        default=(), description="Regular expressions; layers whose name matches stay in 16 bits."
    )
    seed: int = Field(default=0, description="Seed of self-written calibration text.")
    kv_cache: KvCache | None = Field(
        default=None, description="8-bit keys and values to find scales for, one a head."
    )
    tune: TuneSection | None = Field(default=None, description="Learning after packing.")
    max_shard_size: Size = Field(default=DEFAULT_SHARD_BYTES, description="Largest weight file.")


class CalibrationSection(Section):
    """The text that quantization looks at."""

    text: str = Field(
        default=BUILT_IN,
        description="A file, a data set (`hub:OWNER/NAME[:SPLIT[:COLUMN]]`), `builtin` or `self`.",
    )
    assistant_only: bool = Field(
        default=False, description="Of conversations only the assistant's messages count."
    )
    samples: int = Field(default=32, ge=1, description="Windows of text.")
    seq_len: int = Field(default=512, ge=2, description="Tokens of a window.")


class EvaluateSection(Section):
    """The text that the result is judged on, beside the float model."""

    text: str = Field(
        default=TOPICS, description="A UTF-8 file, or `python-topics` (on every machine)."
    )
    windows: int = Field(default=DEFAULT_NUM_WINDOWS, ge=1, description="Windows of text.")
    seq_len: int = Field(default=DEFAULT_SEQ_LEN, ge=2, description="Tokens of a window.")


class GatesSection(Section):
    """Limits; a result beyond one of them is not published."""

    max_kl: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="Mean KL divergence from the float model, in nats."
    )
    max_ppl_increase: Share | None = Field(
        default=None, description="Perplexity above the float model's, as a share: 0.05 or 5%."
    )
    min_top1: Annotated[Share, Field(le=1)] | None = Field(
        default=None, description="Share of positions with the same most likely token: 0.85 or 85%."
    )
    max_size: Size | None = Field(
        default=None, description="Size of the weights: 120MB, 4.5GB, bytes."
    )

    @property
    def need_evaluation(self) -> bool:
        """Whether a limit is on something that only a text can tell."""
        return any(v is not None for v in (self.max_kl, self.max_ppl_increase, self.min_top1))


class ChecksSection(Section):
    """What the result is tried for; one that fails is not published."""

    inspect: bool = Field(default=False, description="Every tensor is read; nothing is wrong.")
    loads_in: tuple[Engine, ...] = Field(
        default=(), description="Engines that must load it, by the rules we know of each."
    )
    generate: bool = Field(default=False, description="It continues a prompt, with finite logits.")


class OutputSection(Section):
    """Where the checkpoint goes."""

    folder: str = Field(description="Folder to write, beside the recipe unless it is absolute.")
    overwrite: bool = Field(default=False, description="Replace a model that is already there.")


class ReportsSection(Section):
    """Files that say what happened; written for a failed gate or check too."""

    json_file: str | None = Field(
        default=None, alias="json", description="Everything, for programs."
    )
    markdown: str | None = Field(default=None, description="A summary, for people.")
    html: str | None = Field(default=None, description="One page with charts of every layer.")
    junit: str | None = Field(
        default=None, description="JUnit XML: every step, gate and check as a test case."
    )


class Recipe(Section):
    """A whole recipe."""

    version: Literal[1] = Field(default=1, description="Of this schema.")
    model: str = Field(description="A model folder, a .gguf file or a hub id (owner/name).")
    quantize: QuantizeSection = QuantizeSection()
    calibration: CalibrationSection = CalibrationSection()
    evaluate: EvaluateSection | None = None
    gates: GatesSection = GatesSection()
    checks: ChecksSection = ChecksSection()
    output: OutputSection
    reports: ReportsSection = ReportsSection()

    @model_validator(mode="after")
    def _gates_have_figures(self) -> Recipe:
        needs_figures = self.gates.need_evaluation or self.quantize.max_kl is not None
        if needs_figures and self.evaluate is None:
            raise ValueError("gates on quality need an `evaluate` section: `evaluate: {}` will do")
        return self


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a recipe, for editors."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "qserve recipe",
        **Recipe.model_json_schema(by_alias=True),
    }
