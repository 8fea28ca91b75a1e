"""Do other tools compute what we compute, from our checkpoints and from theirs? `make conformance`.

Builds environments with the other tools under build/, takes a small model through every format in
both directions, compares weights and logits, and writes the table of docs/conformance.md.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from conformance_environments import (
    BUILD,
    ENVIRONMENTS,
    PINS,
    ROOT,
    ToolError,
    prepare_environment,
    run,
)
from conformance_models import RECIPES, draw_tokens, write_float_model, write_ours
from safetensors.torch import load_file, save_file

from qserve.cli.console import print_table
from qserve.quant.decoder import Decoder
from qserve.quant.engine_rules import judge_for
from qserve.quant.formats.checkpoint import Checkpoint

PAGE = ROOT / "docs" / "conformance.md"
TABLE_START, TABLE_END = "<!-- matrix -->", "<!-- end of matrix -->"
PEERS_SCRIPT = Path(__file__).with_name("conformance_peers.py")

GPTQ = [name for name in RECIPES if name.startswith("gptq")]
LOADED = {
    "autoawq": ["awq"],
    "gptqmodel": ["awq", *GPTQ],
    "auto-gptq": [name for name in GPTQ if "v2" not in name],
    "compressed-tensors": [name for name in RECIPES if "quantized" in name],
    "bitsandbytes": ["nf4", "fp4", "LLM.int8"],
    "vllm": list(RECIPES),
}
"""Tool -> our checkpoints that it is given."""

GPTQ_MADE = [
    "gptq, 4 bits",
    "gptq, 8 bits",
    "gptq, 3 bits",
    "gptq, 2 bits",
    "gptq, activation order",
    "gptq, asymmetric",
]
MADE = {
    "autoawq": ["gemm", "gemv"],
    "gptqmodel": GPTQ_MADE,
    "auto-gptq": GPTQ_MADE,
    "compressed-tensors": ["int4", "int8", "float8"],
    "llm-compressor": ["awq", "gptq", "int8", "float8"],
    "bitsandbytes": ["nf4", "fp4", "int8"],
}
"""Tool -> checkpoints that it writes and we load."""

NO_KERNEL = "its CPU build has no kernel for it"
LIMITS = {
    ("vllm", "gptq, 8 bits"): NO_KERNEL,
    ("vllm", "pack-quantized, 3 bits"): NO_KERNEL,
    ("vllm", "naive-quantized"): NO_KERNEL,
}
"""Cells that stay empty by a limit of the tool on this machine; ``engine_rules`` has the others."""

ROUNDED_OTHERWISE = {
    "bitsandbytes": ("nf4", "fp4", "int8", "LLM.int8"),
    "vllm": ("int-quantized", "float-quantized", "nf4", "fp4", "LLM.int8"),
    "compressed-tensors": ("int-quantized", "int8"),
    "llm-compressor": ("int8",),
}
"""Tool -> formats whose activations come to other codes there: of float16 ones, or on other steps.

compressed-tensors takes 1/127.5 of the largest for a step and codes from -128, engines and we
1/127 and codes from -127.
"""

# We dequantize to float32. Where a tool does so too, only the last digit of a product may differ;
# where it rounds the weight to float16 (the type of the scales), half a unit of that: 2**-11.
# bitsandbytes rounds the activations of its CPU kernels, AutoAWQ and GPTQModel compute in float16.
WEIGHT_LIMIT = 1e-6
HALF_WEIGHT_LIMIT = 2.0**-11
LOGIT_LIMIT = 1e-2
ROUNDED_LOGIT_LIMIT = 1e-1
MESSAGE_WIDTH = 140


@dataclass(frozen=True, slots=True)
class Cell:
    """One tool, one format, one direction; the largest differences, relative to the largest value.

    weights: of the first block; None where the tool has no dequantization of its own.
    cause: why there is nothing to compare: what the tool says. limit: that this was to be expected,
    and why.
    """

    peer: str
    direction: str
    format: str
    weights: float | None = None
    logits: float | None = None
    cause: str = ""
    limit: str = ""

    @property
    def is_half(self) -> bool:
        """Whether the tool holds the weights in float16: from GEMV only its input is at hand."""
        return self.peer == "gptqmodel" or self.format.startswith(("pack-quantized", "gemv"))

    @property
    def rounds(self) -> bool:
        """Whether the tool may round activations to other codes: that is seen in the logits."""
        return self.format in ROUNDED_OTHERWISE.get(self.peer, ())

    @property
    def is_green(self) -> bool:
        """Whether weights are equal but for rounding, and logits near; or refused as expected."""
        if self.logits is None:
            return bool(self.limit)
        weight_limit = HALF_WEIGHT_LIMIT if self.is_half else WEIGHT_LIMIT
        logit_limit = ROUNDED_LOGIT_LIMIT if self.rounds else LOGIT_LIMIT
        return (self.weights or 0.0) <= weight_limit and self.logits <= logit_limit

    @property
    def verdict(self) -> str:
        """In words."""
        if self.logits is not None:
            return "agrees" if self.is_green else "**differs**"
        return f"{self.limit or '**not run**'}: {self.cause}"


@torch.inference_mode()
def compute_logits(folder: Path, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits ``[S, T, vocab]`` of our evaluation path, all in float32."""
    decoder = Decoder(Checkpoint(folder))
    hidden = decoder.embed(token_ids)
    for index in range(decoder.num_blocks):
        decoder.block(index, token_ids.shape[1]).run_(hidden)
    return decoder.head().logits(decoder.final_norm()(hidden))


def compare(folder: Path, theirs: dict[str, torch.Tensor]) -> tuple[float | None, float]:
    """Differences of the weights of the first block and of the logits."""
    checkpoint = Checkpoint(folder)
    ours = compute_logits(folder, draw_tokens())
    if (logits := theirs.pop("logits", None)) is None:
        ours, logits = ours.log_softmax(-1), theirs.pop("log_probabilities")
    weights = []
    for name, found in theirs.items():
        linear = checkpoint.linear(name.removesuffix(".weight"))
        weight = linear.float() if isinstance(linear, torch.Tensor) else linear.dequantize()
        weights.append(float((weight - found).abs().max() / weight.abs().max()))
    return max(weights, default=None), float((ours - logits).abs().max() / ours.abs().max())


def list_jobs(peer: str, work: Path) -> list[dict[str, str]]:
    """What one tool is to do; our checkpoints are written on the way."""
    source, jobs = work / "float", []
    for name in LOADED.get(peer, []):
        folder = work / name.replace(" ", "-")
        if not folder.exists():
            write_ours(Checkpoint(source), RECIPES[name], folder)
        jobs.append({"format": name, "kind": "", "folder": str(folder)})
    for number, kind in enumerate(MADE.get(peer, [])):
        jobs.append({"format": kind, "kind": kind, "folder": str(work / f"{peer}-made-{number}")})
    for number, job in enumerate(jobs):
        result = str(work / f"{peer}-{number}.safetensors")
        job |= {"peer": peer, "source": str(source), "result": result}
    return jobs


def fill_cells(peer: str, python: Path, work: Path) -> list[Cell]:
    """Every cell of one tool, computed in one process of its environment."""
    jobs, died = list_jobs(peer, work), "its process ended before this"
    listed = work / f"{peer}.json"
    listed.write_text(json.dumps(jobs))
    try:
        run([python, PEERS_SCRIPT, listed, work / "tokens.safetensors"], work / f"{peer}.log")
    except ToolError as error:
        died = str(error)
    return [fill_cell(job, died) for job in jobs]


def fill_cell(job: dict[str, str], died: str) -> Cell:
    """What came of one job; ``died`` is why there may be nothing at all."""
    direction = "we load theirs" if job["kind"] else "loads ours"
    cell = Cell(job["peer"], direction, job["format"])
    result, folder = Path(job["result"]), Path(job["folder"])
    if result.is_file():
        weights, logits = compare(folder, load_file(result))
        return replace(cell, weights=weights, logits=logits)
    said = result.with_suffix(".cause")
    cause = shorten(said.read_text() if said.is_file() else died)
    return replace(cell, cause=cause, limit=find_limit(job))


def find_limit(job: dict[str, str]) -> str:
    """Why the tool was to refuse a checkpoint: by our rules of its engine, or as listed here."""
    if job["peer"] == "vllm":
        (verdict,) = judge_for(Checkpoint(Path(job["folder"])), ["vllm"])
        if verdict.refusals:
            return verdict.refusals[0]
    return LIMITS.get((job["peer"], job["format"]), "")


def shorten(message: str) -> str:
    """The first sentence of it, without the names of exceptions: of bounded length, for a table."""
    line = " ".join(message.split()).replace("|", "/")
    line = re.sub(r"^\w+Error: (\d+ validation errors? for \w+ Value error, )?", "", line)
    line = re.split(r"\. | \[type=", line)[0]
    return line if len(line) <= MESSAGE_WIDTH else f"{line[:MESSAGE_WIDTH]}..."


def write_page(cells: Sequence[Cell]) -> None:
    """Put the table into the page of the documentation."""
    lines = ["| tool | direction | format | weights | logits | |", "|---|---|---|---:|---:|---|"]
    for cell in cells:
        weights = "-" if cell.weights is None else f"{cell.weights:.1e}"
        logits = "-" if cell.logits is None else f"{cell.logits:.1e}"
        lines.append(
            f"| {PINS[cell.peer]} | {cell.direction} | {cell.format} | {weights} | {logits} | "
            f"{cell.verdict} |"
        )
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(TABLE_START)
    after = rest.partition(TABLE_END)[2]
    table = "\n".join([TABLE_START, "", *lines, "", TABLE_END])
    PAGE.write_text(before + table + after, encoding="utf-8")


@click.command()
@click.option("--only", type=click.Choice(list(PINS)), multiple=True, help="Only these tools.")
@click.option("--record", is_flag=True, help=f"Write the table of {PAGE.name}.")
@click.option("--python", "pythons", multiple=True, help="TOOL=PYTHON: an environment that has it.")
def main(only: tuple[str, ...], record: bool, pythons: tuple[str, ...]) -> None:
    """Compare other tools with ours, every format, both directions."""
    work = BUILD / "matrix"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    write_float_model(work / "float")
    save_file({"token_ids": draw_tokens()}, work / "tokens.safetensors")
    given = {
        peer: Path(path).absolute() for peer, path in (entry.split("=", 1) for entry in pythons)
    }
    cells: list[Cell] = []
    for environment in ENVIRONMENTS:
        for peer in environment.tools:
            if only and peer not in only:
                continue
            try:
                python = given[peer] if peer in given else prepare_environment(environment)
            except ToolError as error:
                cells.append(Cell(peer, "-", "-", cause=f"cannot be installed: {error}"))
            else:
                cells += fill_cells(peer, python, work)
    rows = [(c.peer, c.direction, c.format, c.weights, c.logits, c.verdict) for c in cells]
    print_table("conformance", ("tool", "direction", "format", "weights", "logits", ""), rows)
    if record:
        write_page(cells)
    if not all(cell.is_green for cell in cells):
        raise click.ClickException(
            "a cell was not run, or differs by more than rounding explains: see the table"
        )


if __name__ == "__main__":
    main()
