"""Packed weights are kept and read; whatever is wrong with the files, the right weights load."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qserve.kernels.activations import Activations
from qserve.quant.formats import awq
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.serve import weight_cache
from qserve.serve.cache_folder import PARTIAL, SHARE_OF_DISK, clear, list_entries
from qserve.serve.config import EngineConfig, HeadDtype
from qserve.serve.engine import Engine
from qserve.serve.messages import AddRequest, NewTokens, SamplingParams
from qserve.serve.weight_file import ALIGNMENT, HEAD, read_index
from qserve.serve.weights import WeightReader

INPUTS, GROUP_SIZE = 64, 32
X = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(1))
SHAPES = {("q", "k"): (96, INPUTS), ("up",): (48, INPUTS)}
LAYERS = ["q k 96x64", "up 48x64", "lm_head head 80x64"]


def write_model(folder: Path, seed: int = 0) -> Path:
    """A packed layer beside a float one, a float one with a bias, and a head to be rounded."""
    generator = torch.Generator().manual_seed(seed)

    def random(outputs: int) -> torch.Tensor:
        return torch.randn(outputs, INPUTS, generator=generator).half()

    words = torch.randint(-(2**31), 2**31, (INPUTS, 8), generator=generator)
    groups = INPUTS // GROUP_SIZE
    tensors = {
        "q.qweight": words.int(),
        "q.qzeros": torch.randint(0, 2**31, (groups, 8), generator=generator).int(),
        "q.scales": torch.rand(groups, 64, generator=generator).half() + 0.1,
        "k.weight": random(32),
        "up.weight": random(48),
        "up.bias": torch.randn(48, generator=generator),
        "lm_head.weight": random(80),
    }
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": awq.config_block(GROUP_SIZE, ["k", "up", "lm_head"]),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def read_all(
    model: Path, cache: Path | None, head_dtype: HeadDtype | None = None
) -> list[torch.Tensor]:
    """What every layer makes of ``X``, after the cache was given the chance to keep them."""
    reader = WeightReader(Checkpoint(model), Activations.FLOAT32, head_dtype, cache)
    layers = [reader.linear(*names, shape=shape) for names, shape in SHAPES.items()]
    layers.append(reader.head("lm_head", (80, INPUTS)))
    reader.finish()
    return [layer(X, torch.empty(len(X), layer.out_features)) for layer in layers]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Path:
    caplog.set_level(logging.INFO, logger="qserve.serve.weight_cache")
    return tmp_path / "cache" / "weights"


@pytest.fixture
def num_packed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with every layer whose tensors are read from the checkpoint."""
    read: list[str] = []
    plain = Checkpoint.linear

    def linear(self: Checkpoint, name: str) -> object:
        read.append(name)
        return plain(self, name)

    monkeypatch.setattr(Checkpoint, "linear", linear)
    return read


def only_file(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
    caplog.clear()
    return found


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, found, expected))


def test_the_second_start_reads_no_tensor_and_computes_the_same(
    model: Path, cache: Path, num_packed: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    plain = read_all(model, None)
    num_packed.clear()
    assert equal(read_all(model, cache), plain)
    assert num_packed == ["q", "k", "up", "lm_head"]
    path = only_file(cache)
    assert path.stat().st_mode & 0o777 == 0o600
    assert "are kept in" in caplog.text
    before = path.stat()
    num_packed.clear()
    assert equal(read_all(model, cache), plain)
    assert num_packed == []
    after = path.stat()
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size), "written again"
    assert warnings(caplog) == []


def test_weights_lie_on_cache_lines_and_say_whose_they_are(model: Path, cache: Path) -> None:
    read_all(model, cache)
    with only_file(cache).open("rb") as file:
        index = read_index(file)
    assert list(index.layers) == LAYERS
    assert [len(weights) for weights in index.layers.values()] == [2, 1, 1]
    stored = [weight for weights in index.layers.values() for weight in weights]
    assert index.start % ALIGNMENT == 0
    assert all(weight.offset % ALIGNMENT == 0 for weight in stored)
    assert index.facts["model"] == str(model)


def flip_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def offset_of(path: Path, layer: str) -> int:
    """Where the last byte of a layer lies."""
    with path.open("rb") as file:
        index = read_index(file)
    stored = index.layers[layer][-1]
    return index.start + stored.offset + stored.nbytes - 1


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def write_other_format(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[8] += 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason", "packed"),
    [
        (lambda path: flip_bit(path, offset_of(path, LAYERS[0])), "q k 96x64 is damaged", 4),
        (lambda path: flip_bit(path, offset_of(path, LAYERS[2])), "head 80x64 is damaged", 1),
        (lambda path: flip_bit(path, HEAD.size + 20), "its index is damaged", 4),
        (truncate, "it is not whole", 4),
        (lambda path: path.write_bytes(b""), "not a file of packed weights", 4),
        (lambda path: path.write_text("a foreign file"), "not a file of packed weights", 4),
        (lambda path: path.write_bytes(path.read_bytes()[:12]), "not a file of packed", 4),
        (write_other_format, "it has format 2", 4),
    ],
    ids=["first", "last", "index", "truncated", "empty", "foreign", "stump", "format"],
)
def test_a_damaged_file_is_noticed_and_written_again(
    model: Path,
    cache: Path,
    num_packed: list[str],
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[Path], object],
    reason: str,
    packed: int,
) -> None:
    plain = read_all(model, cache)
    whole = only_file(cache).read_bytes()
    damage(only_file(cache))
    num_packed.clear()
    assert equal(read_all(model, cache), plain)
    assert len(num_packed) == packed
    (line,) = warnings(caplog)
    assert reason in line and "are made again" in line and str(only_file(cache)) in line
    assert only_file(cache).read_bytes() == whole
    num_packed.clear()
    assert equal(read_all(model, cache), plain)
    assert (num_packed, warnings(caplog)) == ([], [])


def touch(model: Path) -> None:
    os.utime(model / "model.safetensors", ns=(1, 1))


def change_content(model: Path) -> None:
    """Other weights, of the same shapes and sizes, with the old time."""
    path = model / "model.safetensors"
    time = path.stat().st_mtime_ns
    write_model(model, seed=1)
    os.utime(path, ns=(time, time))


def change_config(model: Path) -> None:
    path = model / "config.json"
    path.write_text(path.read_text().replace('"zero_point": true', '"zero_point": true, "x": 1'))


@pytest.mark.parametrize("change", [touch, change_content, change_config])
def test_a_checkpoint_that_has_changed_is_packed_again(
    model: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Path], None],
) -> None:
    read_all(model, cache)
    change(model)
    assert equal(read_all(model, cache), read_all(model, None))
    (line,) = warnings(caplog)
    assert "the checkpoint has changed" in line
    only_file(cache)
    assert equal(read_all(model, cache), read_all(model, None))
    assert warnings(caplog) == []


def test_what_another_build_has_packed_is_packed_again(
    model: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = weight_cache.identify_build()
    assert len(build["library"]) == 64
    read_all(model, cache)
    changed = build | {"library": "0" * 64}
    monkeypatch.setattr(weight_cache, "identify_build", lambda: changed)
    read_all(model, cache)
    (line,) = warnings(caplog)
    assert "another build of qserve" in line
    read_all(model, cache)
    assert warnings(caplog) == []


def test_each_way_to_keep_the_head_has_a_file_of_its_own(model: Path, cache: Path) -> None:
    rounded = read_all(model, cache, HeadDtype.INT8)
    exact = read_all(model, cache, HeadDtype.FLOAT)
    assert len(list(cache.iterdir())) == 2
    assert not torch.equal(rounded[-1], exact[-1])
    assert equal(read_all(model, cache, HeadDtype.FLOAT), exact)
    assert equal(read_all(model, cache, HeadDtype.INT8), rounded)


def test_a_folder_that_cannot_be_made_costs_one_warning(
    model: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache.parent.mkdir()
    cache.write_text("a file")
    assert equal(read_all(model, cache), read_all(model, None))
    found = warnings(caplog)
    assert "packed weights are not kept" in found[-1] and str(cache) in found[-1]
    assert cache.read_text() == "a file"


def test_a_full_disk_costs_one_warning_and_leaves_nothing(
    model: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weight_cache, "write_weights", no_space)
    assert equal(read_all(model, cache), read_all(model, None))
    (line,) = warnings(caplog)
    assert "No space left on device" in line
    assert list(cache.iterdir()) == []


def limit_space(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free, 0, free))


def test_more_than_a_share_of_the_disk_is_not_kept(
    model: Path,
    cache: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit_space(monkeypatch, 1000)
    read_all(model, cache)
    (line,) = warnings(caplog)
    assert "a quarter of the free space" in line
    assert list(cache.iterdir()) == []


def test_what_is_used_least_makes_room(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [write_model(tmp_path / f"model-{i}", seed=i) for i in range(4)]
    for i, model in enumerate(models[:3]):
        read_all(model, cache)
        (path,) = cache.glob(f"model-{i}-*")
        os.utime(path, (i, i))
    read_all(models[0], cache)  # now it is the one used last
    nbytes = path.stat().st_size
    limit_space(monkeypatch, int(3.5 * nbytes / SHARE_OF_DISK) - 3 * nbytes)
    read_all(models[3], cache)
    kept = [Path(entry.model or "").name for entry in list_entries(cache)]
    assert kept == ["model-3", "model-0", "model-2"]


def test_a_file_that_another_process_is_writing_is_left_to_it(
    model: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read_all(model, cache)
    path = only_file(cache)
    partial = path.rename(path.with_name(path.name + PARTIAL))
    with partial.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert equal(read_all(model, cache), read_all(model, None))
        assert only_file(cache) == partial
        assert clear(cache) == []
        assert only_file(cache) == partial
    assert "is being written by another process" in caplog.text
    assert warnings(caplog) == []


def test_what_a_killed_process_left_is_written_over_and_cleared(
    tmp_path: Path, model: Path, cache: Path
) -> None:
    read_all(model, cache)
    path = only_file(cache)
    whole = path.read_bytes()
    path.rename(path.with_name(path.name + PARTIAL)).write_bytes(whole + b"longer")
    read_all(model, cache)
    assert only_file(cache) == path and path.read_bytes() == whole
    path.rename(path.with_name(path.name + PARTIAL))
    read_all(write_model(tmp_path / "other"), cache)
    assert "other" in only_file(cache).name


def test_cleared_weights_stay_with_those_who_have_them(model: Path, cache: Path) -> None:
    expected = read_all(model, cache)
    reader = WeightReader(Checkpoint(model), Activations.FLOAT32, None, cache)
    layer = reader.linear("q", "k", shape=SHAPES["q", "k"])
    (cache / "notes.txt").write_text("not ours")
    (removed,) = clear(cache)
    assert removed.model == str(model)
    assert only_file(cache).name == "notes.txt"
    assert torch.equal(layer(X, torch.empty(3, 96)), expected[0])


def test_an_engine_says_the_same_with_a_warm_cache(
    tiny_llama: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(max_model_len=64, weight_cache=cache, head_dtype=HeadDtype.INT8)

    def first_tokens() -> list[tuple[int, ...]]:
        engine = Engine.from_checkpoint(tiny_llama, config)
        params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
        engine.add(AddRequest("a", (5, 6, 7), params, 0.0))
        outputs = [output for _ in range(16) for output in engine.step()]
        return [output.token_ids for output in outputs if isinstance(output, NewTokens)]

    cold = first_tokens()

    def refuse(self: Checkpoint, name: str) -> object:
        raise AssertionError(f"{name} is read")

    monkeypatch.setattr(Checkpoint, "linear", refuse)
    assert first_tokens() == cold
