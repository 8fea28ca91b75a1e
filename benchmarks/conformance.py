"""Do other tools compute what we compute, from our checkpoints and from theirs? `make conformance`.

Builds environments with the other tools under build/, takes a small model through every format in
both directions, compares weights and logits, and writes the table of docs/conformance.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from conformance_models import RECIPES, draw_tokens, write_float_model, write_ours
from safetensors.torch import load_file, save_file

from qserve.cli.console import print_table, say
from qserve.quant.decoder import Decoder
from qserve.quant.formats.checkpoint import Checkpoint

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "conformance"
PAGE = ROOT / "docs" / "conformance.md"
TABLE_START, TABLE_END = "<!-- matrix -->", "<!-- end of matrix -->"
PEERS_SCRIPT = Path(__file__).with_name("conformance_peers.py")
REQUIREMENTS = Path(__file__).with_name("conformance_requirements.txt")
PINS = {
    "autoawq": "autoawq==0.2.9",
    "gptqmodel": "gptqmodel==7.7.0",
    "compressed-tensors": "compressed-tensors==0.20.0",
    "bitsandbytes": "bitsandbytes==0.50.2",
}
ENVIRONMENTS = (("autoawq", "gptqmodel"), ("compressed-tensors", "bitsandbytes"))
"""Tools that can share one."""

GPTQ = [name for name in RECIPES if name.startswith("gptq")]
LOADED = {
    "autoawq": ["awq"],
    "gptqmodel": ["awq", *GPTQ],
    "compressed-tensors": [name for name in RECIPES if "quantized" in name],
    "bitsandbytes": ["nf4", "fp4", "LLM.int8"],
}
"""Tool -> our checkpoints that it loads."""

MADE = {
    "autoawq": ["gemm", "gemv"],
    "compressed-tensors": ["int4", "int8", "float8"],
    "bitsandbytes": ["nf4", "fp4", "int8"],
}
"""Tool -> checkpoints that it writes and we load."""

# We dequantize to float32. Where a tool does so too, only the last digit of a product may differ;
# where it rounds the weight to float16 (the type of the scales), half a unit of that: 2**-11.
# bitsandbytes rounds the activations of its CPU kernels, AutoAWQ and GPTQModel compute in float16.
WEIGHT_LIMIT = 1e-6
HALF_WEIGHT_LIMIT = 2.0**-11
LOGIT_LIMIT = 1e-2
ROUNDED_LOGIT_LIMIT = 1e-1
TIMEOUT_S = 600


@dataclass(frozen=True, slots=True)
class Cell:
    """One tool, one format, one direction; the largest differences, relative to the largest value.

    weights: of the first block; None where the tool has no dequantization of its own.
    """

    peer: str
    direction: str
    format: str
    weights: float | None
    logits: float

    @property
    def is_half(self) -> bool:
        """Whether the tool holds the weights in float16: from GEMV only its input is at hand."""
        return self.peer == "gptqmodel" or self.format.startswith(("pack-quantized", "gemv"))

    @property
    def is_green(self) -> bool:
        """Whether weights are equal but for rounding, and logits near."""
        rounds = self.peer == "bitsandbytes"
        weight_limit = HALF_WEIGHT_LIMIT if self.is_half else WEIGHT_LIMIT
        logit_limit = ROUNDED_LOGIT_LIMIT if rounds else LOGIT_LIMIT
        return (self.weights or 0.0) <= weight_limit and self.logits <= logit_limit


def prepare_environment(peers: Sequence[str]) -> Path:
    """The Python of an environment that has these tools; made again when the pins change."""
    pins = "\n".join([REQUIREMENTS.read_text(), *(PINS[peer] for peer in peers)])
    folder = BUILD / f"venv-{hashlib.sha256(pins.encode()).hexdigest()[:8]}"
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.is_file():
        say(f"making {folder.relative_to(ROOT)} with {', '.join(peers)} (once)")
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        log = folder / "pip.log"
        run([*pip, "--requirement", str(REQUIREMENTS)], log)
        run([*pip, "--no-deps", "--no-build-isolation", *(PINS[peer] for peer in peers)], log)
        done.write_text(pins)
    return python


def run(command: Sequence[str | Path], log: Path) -> None:
    """Run a command with what it prints added to ``log``."""
    # On two cores GPTQModel refuses to be imported unless it is told how many to use.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    with log.open("a") as file:
        done = subprocess.run(
            command, stdout=file, stderr=file, env=environment, timeout=TIMEOUT_S, check=False
        )
    if done.returncode:
        raise click.ClickException(f"{Path(command[0]).name} failed: its output is in {log}")


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
    logits = theirs.pop("logits")
    weights = []
    for name, found in theirs.items():
        weight = checkpoint.linear(name.removesuffix(".weight"))
        ours = weight.float() if isinstance(weight, torch.Tensor) else weight.dequantize()
        weights.append(float((ours - found).abs().max() / ours.abs().max()))
    ours = compute_logits(folder, draw_tokens())
    return max(weights, default=None), float((ours - logits).abs().max() / ours.abs().max())


def fill_cells(peer: str, python: Path, work: Path) -> list[Cell]:
    """Every cell of one tool, computed in one process of its environment."""
    source, jobs = work / "float", []
    for name in LOADED[peer]:
        folder = work / name.replace(" ", "-")
        if not folder.exists():
            write_ours(Checkpoint(source), RECIPES[name], folder)
        jobs.append({"format": name, "kind": "", "folder": str(folder)})
    for kind in MADE.get(peer, []):
        jobs.append({"format": kind, "kind": kind, "folder": str(work / f"{peer}-{kind}")})
    for number, job in enumerate(jobs):
        result = str(work / f"{peer}-{number}.safetensors")
        job |= {"peer": peer, "source": str(source), "result": result}
    listed = work / f"{peer}.json"
    listed.write_text(json.dumps(jobs))
    run([python, PEERS_SCRIPT, listed, work / "tokens.safetensors"], work / f"{peer}.log")
    return [
        Cell(
            peer,
            "we load theirs" if job["kind"] else "loads ours",
            job["format"],
            *compare(Path(job["folder"]), load_file(job["result"])),
        )
        for job in jobs
    ]


def write_page(cells: Sequence[Cell]) -> None:
    """Put the table into the page of the documentation."""
    lines = ["| tool | direction | format | weights | logits | |", "|---|---|---|---:|---:|---|"]
    for cell in cells:
        weights = "-" if cell.weights is None else f"{cell.weights:.1e}"
        mark = "agrees" if cell.is_green else "**differs**"
        lines.append(
            f"| {PINS[cell.peer]} | {cell.direction} | {cell.format} | {weights} | "
            f"{cell.logits:.1e} | {mark} |"
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
    given = dict(entry.split("=", 1) for entry in pythons)
    cells: list[Cell] = []
    for peers in ENVIRONMENTS:
        for peer in peers:
            if not only or peer in only:
                python = Path(given[peer]) if peer in given else prepare_environment(peers)
                cells += fill_cells(peer, python, work)
    rows = [(c.peer, c.direction, c.format, c.weights, c.logits, c.is_green) for c in cells]
    print_table("conformance", ("tool", "direction", "format", "weights", "logits", "ok"), rows)
    if record:
        write_page(cells)
    if not all(cell.is_green for cell in cells):
        raise click.ClickException("a cell differs by more than rounding explains: see the table")


if __name__ == "__main__":
    main()
