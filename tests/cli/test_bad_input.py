"""Models that are none, outputs that cannot be: one sentence, an exit code, nothing left over."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from qserve.cli import phase_display
from qserve.cli.errors import ExitCode
from qserve.kernels.grouped_weight import GroupedWeight
from qserve.quant import source
from qserve.quant.formats.checkpoint import Checkpoint

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], object]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the result is to appear: the only thing in its folder."""
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / "out"


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def configure(folder: Path, **changes: Any) -> None:
    """Change keys of config.json."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Write the weights again after a change."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def put_nan(name: str) -> Damage:
    """Spoil the last value of a tensor."""
    return lambda folder: change_tensors(
        folder, lambda tensors: tensors[name].view(-1)[-1:].fill_(float("nan"))
    )


def write_index(folder: Path) -> None:
    """An index that names a second file."""
    names = list(load_file(folder / WEIGHTS))
    weight_map = dict.fromkeys(names, WEIGHTS) | {names[0]: "model-00002-of-00002.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def truncate(path: Path) -> None:
    """Lose the second half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change_type(name: str, dtype: torch.dtype) -> Damage:
    """Store a tensor in another type."""
    return lambda folder: change_tensors(
        folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)})
    )


def split(folder: Path, *, loses: bool = False) -> None:
    """Two shards and their index; the second may lack a tensor that the index places there."""
    tensors = load_file(folder / WEIGHTS)
    names = list(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    weight_map = {name: file for file, half in halves.items() for name in half}
    for file, half in halves.items():
        kept = half[1:] if loses and file == "b.safetensors" else half
        save_file({name: tensors[name] for name in kept}, folder / file, {"format": "pt"})
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def cut_shard(folder: Path) -> None:
    """One of two shards ends early."""
    split(folder)
    truncate(folder / "b.safetensors")


LAYER = "model.layers.1.mlp.up_proj.weight"
AWQ_BLOCK = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
MODELS: dict[str, tuple[Damage, str]] = {
    "gone": (shutil.rmtree, "does not exist"),
    "no config": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{,"), "not valid JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "holds list"),
    "config is empty": (lambda f: (f / "config.json").write_text("{}"), "no architecture"),
    "config is inconsistent": (lambda f: configure(f, num_attention_heads=5), "5"),
    "config has wrong types": (lambda f: configure(f, hidden_size="wide"), "hidden_size"),
    "GPT-2": (
        lambda f: configure(f, architectures=["GPT2LMHeadModel"], model_type="gpt2"),
        "is a GPT2LMHeadModel: expected one of LlamaForCausalLM, MistralForCausalLM",
    ),
    "T5": (
        lambda f: configure(f, architectures=["T5ForConditionalGeneration"], model_type="t5"),
        "is a T5ForConditionalGeneration",
    ),
    "GPTQ": (
        lambda f: configure(f, quantization_config={"quant_method": "gptq"}),
        "GPTQ with None bits: expected one of 2, 3, 4",
    ),
    "AWQ": (lambda f: configure(f, quantization_config=AWQ_BLOCK), "already quantized .awq"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "holds no .safetensors file"),
    "truncated weights": (lambda f: truncate(f / WEIGHTS), "truncated or damaged"),
    "garbage": (lambda f: (f / WEIGHTS).write_bytes(b"garbage!" * 99), "truncated or damaged"),
    "missing shard": (write_index, "lacks model-00002-of-00002.safetensors"),
    "NaN in a layer": (put_nan("model.layers.1.mlp.up_proj.weight"), "mlp.up_proj.weight.*NaN"),
    "NaN in a norm": (put_nan("model.norm.weight"), "model.norm.weight.*NaN"),
    "NaN in the embedding": (put_nan("model.embed_tokens.weight"), "embed_tokens.weight.*NaN"),
    "NaN in the head": (put_nan("lm_head.weight"), "lm_head.weight.*NaN"),
    "missing tensor": (
        lambda f: change_tensors(f, lambda t: t.pop("model.layers.1.self_attn.k_proj.weight")),
        "no tensor model.layers.1.self_attn.k_proj.weight",
    ),
    "missing head": (
        lambda f: change_tensors(f, lambda t: t.pop("lm_head.weight")),
        "no tensor lm_head.weight",
    ),
    "other shape": (
        lambda f: configure(f, intermediate_size=96),
        r"config.json implies \(96, 64\)",
    ),
    "infinity in a layer": (
        lambda f: change_tensors(f, lambda t: t[LAYER][0, :1].fill_(float("inf"))),
        "mlp.up_proj.weight holds infinite",
    ),
    "integers in a layer": (change_type(LAYER, torch.int64), "up_proj.weight holds int64"),
    "bytes in a layer": (change_type(LAYER, torch.int8), "up_proj.weight holds int8"),
    "float8 in a layer": (change_type(LAYER, torch.float8_e4m3fn), "holds float8_e4m3fn"),
    "truth values in a norm": (change_type("model.norm.weight", torch.bool), "holds bool"),
    "integers in the embedding": (
        change_type("model.embed_tokens.weight", torch.int32),
        "embed_tokens.weight holds int32",
    ),
    "layer without dimensions": (
        lambda f: change_tensors(f, lambda t: t.update({LAYER: torch.ones(())})),
        r"up_proj.weight has shape \(\)",
    ),
    "missing norm": (
        lambda f: change_tensors(f, lambda t: t.pop("model.layers.0.input_layernorm.weight")),
        "no tensor model.layers.0.input_layernorm.weight",
    ),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), "is empty"),
    "cut shard": (cut_shard, "b.safetensors is not a whole safetensors file"),
    "shard that lacks a tensor": (lambda f: split(f, loses=True), "and it does not"),
    "index is not JSON": (lambda f: (f / INDEX).write_text("{"), "not valid JSON"),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), "holds list"),
    "index without a map": (lambda f: (f / INDEX).write_text("{}"), "no weight_map"),
    "index that leads outside": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "../a.safetensors"}}'),
        "expected the name of a file in the same folder",
    ),
    "blocks that are not there": (
        lambda f: configure(f, num_hidden_layers=5),
        "no tensor model.layers.2",
    ),
    "blocks too many": (
        lambda f: configure(f, num_hidden_layers=1),
        "holds model.layers.1.*num_hidden_layers 1",
    ),
    "no blocks": (lambda f: configure(f, num_hidden_layers=0), "num_hidden_layers 0, expected 1"),
    "less than no heads": (lambda f: configure(f, num_attention_heads=-4), "heads -4, expected 1"),
    "other vocabulary": (
        lambda f: configure(f, vocab_size=100),
        r"config.json implies \(100, 64\)",
    ),
    "rotary type": (
        lambda f: configure(f, rope_scaling={"rope_type": "bogus", "factor": 2.0}),
        "rotary embeddings of type 'bogus'",
    ),
    "quantization is a list": (lambda f: configure(f, quantization_config=[]), "holds list"),
    "quantization of no known method": (
        lambda f: configure(f, quantization_config={"quant_method": "mystery"}),
        "quantized with 'mystery'",
    ),
    "tokenizer is not JSON": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        "no usable tokenizer",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no usable tokenizer"),
}


@pytest.mark.parametrize(("damage", "message"), MODELS.values(), ids=MODELS)
def test_model_that_cannot_be_quantized_is_refused(
    damage: Damage, message: str, model: Path, out: Path, qserve: Callable[..., Any]
) -> None:
    damage(model)
    method = "--awq" if "tokenizer" in message else "--rtn"  # which reads no text
    done = qserve("quantize", model, method, "-o", out)
    assert done.code == ExitCode.MODEL
    assert re.search(message, done.error), done.error
    assert list(out.parent.iterdir()) == []


DEAD: dict[str, Damage] = {
    "an input": lambda f: change_tensors(f, lambda t: t[LAYER][:, 3].zero_()),
    "outputs": lambda f: change_tensors(f, lambda t: t[LAYER][3:9].zero_()),
    "a layer": lambda f: change_tensors(f, lambda t: t[LAYER].zero_()),
    "a norm": lambda f: change_tensors(
        f, lambda t: t["model.layers.1.post_attention_layernorm.weight"].zero_()
    ),
}


@pytest.mark.parametrize("method", [("--rtn",), ("--awq", "--samples", "2", "--seq-len", "16")])
@pytest.mark.parametrize("damage", DEAD.values(), ids=DEAD)
def test_dead_channels_are_stored_as_zeros(
    damage: Damage, method: tuple[str, ...], model: Path, out: Path, qserve: Callable[..., Any]
) -> None:
    damage(model)
    assert qserve("quantize", model, *method, "-o", out).code == ExitCode.OK
    dead = load_file(model / WEIGHTS)[LAYER] == 0
    weight = Checkpoint(out).linear(LAYER.removesuffix(".weight"))
    assert isinstance(weight, GroupedWeight)
    found = weight.dequantize()
    assert bool(torch.isfinite(found).all())
    assert not found[:, dead.all(0)].any()
    assert not found[dead.all(1)].any()


@pytest.mark.parametrize("command", ["quantize", "eval", "inspect"])
def test_hub_that_cannot_be_reached_is_told(
    command: str, out: Path, monkeypatch: pytest.MonkeyPatch, qserve: Callable[..., Any]
) -> None:
    def refuse(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    options = ("-o", out) if command == "quantize" else ()
    done = qserve(command, "owner/model", *options)
    assert done.code == ExitCode.MODEL
    assert "owner/model is not a folder here" in done.error
    assert "the hub cannot be reached" in done.error


def test_truncated_gguf_is_refused(tmp_path: Path, out: Path, qserve: Callable[..., Any]) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(20))
    done = qserve("quantize", tmp_path / "cut.gguf", "-o", out)
    assert done.code == ExitCode.MODEL
    assert "cannot be read as GGUF" in done.error
    assert list((tmp_path / "cache").rglob("*.partial")) == []


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("model", "is what is being read"),
        ("model/out", "is inside"),
        (".", "contains"),
        ("full", "--force"),
        ("model/config.json", "is inside"),
        ("file", "is a file"),
        ("file/out", "leads through a file"),
    ],
)
@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
def test_output_in_the_wrong_place_is_refused_before_any_work(
    place: str,
    message: str,
    force: tuple[str, ...],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    qserve: Callable[..., Any],
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "file").touch()
    monkeypatch.setattr(source, "Checkpoint", lambda folder: pytest.fail("work was begun"))
    before = sorted(tmp_path.rglob("*"))
    done = qserve("quantize", model, "--rtn", "-o", tmp_path / place, *force)
    assert done.code == ExitCode.OUTPUT
    assert message in done.error
    assert sorted(tmp_path.rglob("*")) == before


def run_process(*arguments: object, **limits: Any) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    command = [sys.executable, "-m", "qserve.cli.main", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, **limits
    )


def limit_file_size() -> None:
    """No file may grow beyond 100 kB, less than the tiny model takes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_full_disk_leaves_no_result_and_with_room_the_run_goes_on(
    tiny_llama: Path, out: Path, qserve: Callable[..., Any]
) -> None:
    done = run_process("quantize", tiny_llama, "--rtn", "-o", out, preexec_fn=limit_file_size)
    assert done.returncode == ExitCode.OUTPUT
    assert done.stdout == ""
    notice, *_, error = done.stderr.splitlines()
    assert notice.startswith("groups of 64")
    assert error.startswith(f"error: {out} cannot be written: the file would exceed the size limit")
    assert not out.exists()
    assert qserve("quantize", tiny_llama, "--rtn", "-o", out).code == ExitCode.OK
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_no_result_and_says_how_to_go_on(
    number: int,
    tiny_llama: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    qserve: Callable[..., Any],
) -> None:
    # A shell starts what runs in its background with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(
                phase_display, "format_seconds", lambda seconds: signal.raise_signal(number)
            )
            done = qserve("quantize", tiny_llama, "--rtn", "-o", out)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.code == ExitCode.INTERRUPTED
    assert done.out == ""
    assert "run the same command again to continue" in done.err
    assert not out.exists()
    again = qserve("quantize", tiny_llama, "--rtn", "-o", out)
    assert again.code == ExitCode.OK
    assert "going on with a run that was stopped" in again.err
    assert list(out.parent.iterdir()) == [out]


KILLED = """
import os, signal, sys
from qserve.cli import phase_display
from qserve.cli.main import run
phase_display.format_seconds = lambda seconds: os.kill(os.getpid(), signal.SIGKILL)
run(["quantize", sys.argv[1], "--rtn", "-o", sys.argv[2]])
"""


def test_killed_run_leaves_no_result_and_does_not_disturb_the_next(
    tiny_llama: Path, out: Path, qserve: Callable[..., Any]
) -> None:
    command = [sys.executable, "-c", KILLED, str(tiny_llama), str(out)]
    assert subprocess.run(command, timeout=120, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    assert [path.name[:5] for path in out.parent.iterdir()] == [".out."]
    assert qserve("quantize", tiny_llama, "--rtn", "-o", out).code == ExitCode.OK
    assert list(out.parent.iterdir()) == [out]
