"""Memory of a run: one block in float and the activations, whatever the size of the model."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.formats.shard_writer import ShardWriter
from qserve.quant.model_files import copy_files

MIB = 2**20
ALLOWED = 700 * MIB
MODEL_BYTES = 2048 * MIB
SHARD_BYTES = 512 * MIB
HIDDEN, INTERMEDIATE, HEADS, HEAD_DIM, VOCABULARY, BLOCKS = 2048, 2560, 16, 128, 99_328, 4


def tensors() -> Iterator[tuple[str, torch.Tensor]]:
    """A random Llama in float32, one tensor at a time."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).mul_(0.02)

    yield "model.embed_tokens.weight", normal(VOCABULARY, HIDDEN)
    for index in range(BLOCKS):
        block = f"model.layers.{index}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{block}.{name}.weight", torch.ones(HIDDEN)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield f"{block}.self_attn.{name}.weight", normal(HIDDEN, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            yield f"{block}.mlp.{name}.weight", normal(INTERMEDIATE, HIDDEN)
        yield f"{block}.mlp.down_proj.weight", normal(HIDDEN, INTERMEDIATE)
    yield "model.norm.weight", torch.ones(HIDDEN)
    yield "lm_head.weight", normal(VOCABULARY, HIDDEN)


@pytest.fixture(scope="module")
def large_model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks of 124 MiB between tables that make up 2 GiB with them."""
    folder = tmp_path_factory.mktemp("large") / "model"
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    copy_files(tiny_llama, folder)
    with ShardWriter(folder, SHARD_BYTES) as files:
        for name, tensor in tensors():
            files.add(name, tensor)
        files.finish()
    return folder


def limit() -> None:
    """Limit what the process may allocate; its mapped source files count too, and are added."""
    resource.setrlimit(resource.RLIMIT_DATA, (ALLOWED + 2 * MODEL_BYTES,) * 2)


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that is not a mapped file, by the kernel; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return int(lines.get("RssAnon", "0").split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_model_several_times_larger_than_the_allowed_memory_is_quantized(
    large_model: Path, tmp_path: Path, text_file: Path, method: str
) -> None:
    source = Checkpoint(large_model)
    assert sum(path.stat().st_size for path in set(source.tensor_files.values())) >= MODEL_BYTES
    out = tmp_path / "out"
    command = [sys.executable, "-m", "qserve.cli.main", "quantize", str(large_model), f"--{method}"]
    command += ["-o", str(out), "--calibration", str(text_file), "--samples", "2", "--threads", "1"]
    process = subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, preexec_fn=limit)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        if peak > ALLOWED:
            process.kill()
        time.sleep(0.002)
    assert process.stdout is not None
    answer = process.stdout.read()
    process.stdout.close()
    print(f"{method}: {peak / MIB:.0f} MiB of memory at the most")
    assert process.returncode == 0, f"{peak / MIB:.0f} MiB"
    assert json.loads(answer)["num_quantized_layers"] == 7 * BLOCKS
    assert Checkpoint(out).method == "awq"
