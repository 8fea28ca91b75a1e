"""Do other engines compute what we compute from a checkpoint of ours? What `make conformance` runs.

Builds an environment with AutoAWQ and GPTQModel under build/, gives both a checkpoint quantized
by qserve, and compares their logits with our own evaluation in float32.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file

from qserve.cli.cache import cache_folder
from qserve.cli.console import print_table, say
from qserve.cli.demo_model import NAME, find_model
from qserve.cli.row_table import append_rows, stamp
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant.decoder import Decoder
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.report import FILE_NAME as REPORT_NAME
from qserve.quant.windows import python_topics, spread_windows, tokenize

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "conformance"
ROWS = ROOT / "docs" / "benchmarks" / "conformance.csv"
PEERS_SCRIPT = Path(__file__).with_name("conformance_peers.py")
REQUIREMENTS = Path(__file__).with_name("conformance_requirements.txt")
PEERS = {"autoawq": "autoawq==0.2.9", "gptqmodel": "gptqmodel==7.7.0"}
NUM_WINDOWS, WINDOW_TOKENS = 2, 64
# Both peers round dequantized weights and activations to float16 (2^-11 each time), we do not.
# A wrong order, group or zero point changes logits by their own magnitude.
LIMIT = 1e-2
TIMEOUT_S = 1800


@dataclass(frozen=True, slots=True)
class Comparison:
    """One peer against us.

    logits: largest difference of a logit, relative to the largest logit.
    same_top: share of the positions with the same most likely token.
    weights: largest relative difference of a weight of the first block; None if not compared.
    """

    peer: str
    logits: float
    same_top: float
    weights: float | None


def prepare_environment() -> Path:
    """The Python of an environment that has both peers; made again when the pins change."""
    pins = "\n".join([REQUIREMENTS.read_text(), *PEERS.values()])
    folder = BUILD / f"venv-{hashlib.sha256(pins.encode()).hexdigest()[:8]}"
    python, done = folder / "bin" / "python", folder / "complete"
    if not done.is_file():
        say(f"making {folder.relative_to(ROOT)} with {', '.join(PEERS.values())} (once)")
        venv.create(folder, with_pip=True, clear=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        log = folder / "pip.log"
        run([*pip, "--requirement", str(REQUIREMENTS)], log)
        run([*pip, "--no-deps", "--no-build-isolation", *PEERS.values()], log)
        done.write_text(pins)
    return python


def run(command: Sequence[str | Path], log: Path, **environment: str) -> None:
    """Run a command with what it prints added to ``log``."""
    with log.open("a") as file:
        done = subprocess.run(
            command,
            stdout=file,
            stderr=file,
            env=os.environ | environment,
            timeout=TIMEOUT_S,
            check=False,
        )
    if done.returncode:
        raise click.ClickException(f"{Path(command[0]).name} failed: its output is in {log}")


def prepare_checkpoint() -> Path:
    """The demo model quantized by the command line, quickly; kept under build/."""
    folder = BUILD / f"{NAME}-awq"
    if not (folder / "config.json").is_file():
        model = find_model(cache_folder(os.environ))
        options = ["--rounding", "nearest", "--samples", "8", "--seq-len", "256"]
        command = [sys.executable, "-m", "qserve.cli.main", "quantize", str(model), *options]
        command += ["--output", str(folder)]
        if subprocess.run(command, check=False).returncode:
            raise click.ClickException("the demo model could not be quantized: see above")
    return folder


@torch.inference_mode()
def compute_logits(folder: Path, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits ``[S, T, vocab]`` of our evaluation path, all in float32."""
    decoder = Decoder(Checkpoint(folder))
    hidden = decoder.embed(token_ids)
    for index in range(decoder.num_blocks):
        decoder.block(index, token_ids.shape[1]).run_(hidden)
    logits: torch.Tensor = decoder.final_norm()(hidden) @ decoder.head().T
    return logits


def run_peer(peer: str, python: Path, folder: Path, tokens: Path) -> dict[str, torch.Tensor]:
    """What a peer computes: ``logits``, and weights by their full names."""
    result = tokens.with_name(f"{peer}.safetensors")
    log = tokens.with_name(f"{peer}.log")
    log.unlink(missing_ok=True)
    # On two cores GPTQModel refuses to be imported unless it is told how many to use.
    command: list[str | Path] = [python, PEERS_SCRIPT, peer, folder, tokens, result]
    run(command, log, HF_HUB_OFFLINE="1", GPTQMODEL_CPU_WORKERS="2")
    return load_file(result)


def compare(
    peer: str, folder: Path, ours: torch.Tensor, theirs: dict[str, torch.Tensor]
) -> Comparison:
    """How far a peer's results are from ours."""
    logits = theirs.pop("logits")
    checkpoint = Checkpoint(folder)
    differences = []
    for name, weight in theirs.items():
        packed = checkpoint.linear(name.removesuffix(".weight"))
        assert isinstance(packed, GroupedWeight)
        expected = packed.dequantize()
        differences.append(float((weight - expected).abs().max() / expected.abs().max()))
    return Comparison(
        peer=PEERS[peer],
        logits=float((logits - ours).abs().max() / ours.abs().max()),
        same_top=float((logits.argmax(-1) == ours.argmax(-1)).float().mean()),
        weights=max(differences, default=None),
    )


def record(checkpoint: Path, num_positions: int, found: list[Comparison]) -> None:
    """Append a row for each peer to the results that the documentation quotes."""
    report = json.loads((checkpoint / REPORT_NAME).read_text(encoding="utf-8"))
    scheme = {name: report[name] for name in ("method", "bits", "group_size")}
    append_rows(
        ROWS,
        [
            stamp()
            | {"peer": one.peer, "checkpoint": checkpoint.name}
            | scheme
            | {
                "positions": num_positions,
                "max_relative_logit_difference": f"{one.logits:.2e}",
                "same_top_token": f"{one.same_top:.4f}",
                "max_relative_weight_difference": "" if one.weights is None else one.weights,
            }
            for one in found
        ],
    )


@click.command()
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.option("--record", "recorded", is_flag=True, help=f"Append rows to {ROWS.name}.")
def main(checkpoint: Path | None, recorded: bool) -> None:
    """Compare other engines with ours on CHECKPOINT (default: the demo model, quantized)."""
    BUILD.mkdir(parents=True, exist_ok=True)
    folder = checkpoint or prepare_checkpoint()
    python = prepare_environment()
    ids = spread_windows(tokenize(folder, python_topics()), NUM_WINDOWS, WINDOW_TOKENS)
    tokens = BUILD / "tokens.safetensors"
    save_file({"token_ids": ids}, tokens)
    ours = compute_logits(folder, ids)
    found = [compare(peer, folder, ours, run_peer(peer, python, folder, tokens)) for peer in PEERS]
    if recorded:
        record(folder, ids.numel(), found)
    rows = [
        (
            one.peer,
            f"{one.logits:.1e}",
            f"{one.same_top:.1%}",
            "-" if one.weights is None else f"{one.weights:.1e}",
        )
        for one in found
    ]
    title = f"{folder.name}, {ids.numel()} positions, float32 activations"
    print_table(title, ("peer", "logits", "same top token", "weights, block 0"), rows)
    if any(one.logits >= LIMIT or one.weights for one in found):
        raise click.ClickException(f"expected logits within {LIMIT:g} and equal weights")


if __name__ == "__main__":
    main()
