"""The command line of `qserve serve`: what it accepts, and what it hands to the server."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import click
import pytest

from qserve.cli import serve
from qserve.cli.errors import ExitCode
from qserve.cli.main import run
from qserve.cli.vllm_flags import SWITCH_FLAGS, VALUE_FLAGS, TokenCount
from qserve.kernels.activations import Activations
from qserve.kernels.kv_cache import KvFormat
from qserve.serve.config import EngineConfig, HeadDtype
from qserve.serve.server_config import ServerConfig


class Parsed:
    """What a command line became: the model, and both configurations."""

    def __init__(self, model: str, options: dict[str, Any]) -> None:
        self.model = model
        self.server: ServerConfig = serve._server_config(options, model)
        self.engine: EngineConfig = serve._engine_config(options)


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``parse("MODEL", "--port", "1")`` runs the command up to where it would load the model."""
    found: list[Parsed] = []

    def take(model: str, options: dict[str, Any]) -> None:
        found.append(Parsed(model, options))

    def parse(*arguments: str) -> Parsed:
        assert run(["serve", *arguments]) == ExitCode.OK
        return found[-1]

    monkeypatch.setattr(serve, "_serve", take)
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    monkeypatch.delenv("QSERVE_API_KEY", raising=False)
    return parse


def test_without_options_the_defaults_are_those_of_the_configurations(
    parse: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("QSERVE_WEIGHT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    parsed = parse("some/model")
    assert parsed.engine == EngineConfig(weight_cache=tmp_path / "qserve" / "weights")
    assert parsed.server == dataclasses.replace(ServerConfig(), served_model_names=("some/model",))


def test_every_option_reaches_its_configuration(parse: Any, tmp_path: Path) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{{ messages }}")
    parsed = parse(
        "m", "--host", "::1", "--port", "0", "--served-model-name", "a",
        "--served-model-name", "b", "--allow-any-model-name", "--api-key", "k1",
        "--api-key", "k2", "--allowed-origins", '["https://a", "https://b"]',
        "--chat-template", str(template), "--trust-request-chat-template",
        "--generation-config", "none", "--max-logprobs", "5", "--max-num-queued-reqs", "7",
        "--max-body-bytes", "1M", "--sse-keep-alive-interval", "2", "--shutdown-timeout", "3",
        "--metrics-prefix", "vllm", "--uvicorn-log-level", "warning",
        "--disable-uvicorn-access-log",
    )  # fmt: skip
    assert parsed.server == ServerConfig(
        host="::1", port=0, served_model_names=("a", "b"), allow_any_model_name=True,
        api_keys=("k1", "k2"), allowed_origins=("https://a", "https://b"),
        chat_template="{{ messages }}", trust_request_chat_template=True,
        generation_config=False, max_logprobs=5, max_num_queued_reqs=7, max_body_bytes=2**20,
        sse_keep_alive_s=2.0, shutdown_timeout_s=3.0, metrics_prefix="vllm",
        log_level="warning", access_log=False,
    )  # fmt: skip
    parsed = parse(
        "m", "--max-model-len", "4k", "--max-num-seqs", "8", "--max-num-batched-tokens", "1K",
        "--block-size", "32", "--kv-cache-memory-bytes", "1G", "--threads", "2",
        "--activations", "float32", "--head-dtype", "float", "--kv-cache-dtype", "bf16",
        "--weight-cache", str(tmp_path),
    )  # fmt: skip
    assert parsed.engine == EngineConfig(
        max_model_len=4000, max_num_seqs=8, max_num_batched_tokens=1024, block_size=32,
        kv_cache_bytes=2**30, num_threads=2, activations=Activations.FLOAT32,
        head_dtype=HeadDtype.FLOAT, kv_format=KvFormat.BFLOAT16, weight_cache=tmp_path,
    )  # fmt: skip


@pytest.mark.parametrize("activations", Activations)
def test_every_kind_of_activations_can_be_asked_for(parse: Any, activations: Activations) -> None:
    assert parse("m", "--activations", activations.value).engine.activations is activations


def test_the_weight_cache_can_be_named_or_off(parse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSERVE_WEIGHT_CACHE", "elsewhere")
    assert parse("m").engine.weight_cache == Path("elsewhere")
    assert parse("m", "--weight-cache", "off").engine.weight_cache is None
    monkeypatch.setenv("QSERVE_WEIGHT_CACHE", "off")
    assert parse("m").engine.weight_cache is None


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("auto", None), ("fp16", KvFormat.FLOAT16), ("float32", KvFormat.FLOAT32),
        ("fp8", KvFormat.FLOAT8), ("fp8_e4m3", KvFormat.FLOAT8), ("int8", KvFormat.INT8),
        ("int8_per_token_head", KvFormat.INT8), ("int4", KvFormat.INT4),
        ("int4_per_token_head", KvFormat.INT4),
    ],
)  # fmt: skip
def test_the_cache_is_named_as_vllm_names_it(
    name: str, format: KvFormat | None, parse: Any
) -> None:
    assert parse("m", "--kv-cache-dtype", name).engine.kv_format is format


def test_keys_come_from_the_environment_too(parse: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSERVE_API_KEY", "one two")
    assert parse("m").server.api_keys == ("one", "two")
    assert parse("m", "--api-key", "three").server.api_keys == ("three",)


def test_the_step_has_room_for_every_sequence_by_itself(parse: Any) -> None:
    assert parse("m", "--max-num-seqs", "1000").engine.max_num_batched_tokens == 1000


def test_the_name_comes_from_the_folder_the_file_or_the_hub(parse: Any, tmp_path: Path) -> None:
    (tmp_path / "tiny.q4.gguf").touch()
    assert parse("owner/name").server.served_model_names == ("owner/name",)
    assert parse(str(tmp_path)).server.served_model_names == (tmp_path.name,)
    assert parse(str(tmp_path / "tiny.q4.gguf")).server.served_model_names == ("tiny.q4",)


def test_the_model_may_be_named_by_an_option(parse: Any) -> None:
    assert parse("--model", "m").model == "m"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one model"),
        (["a", "--model", "b"], "give one model"),
        (["m", "--port", "70000"], "70000"),
        (["m", "--max-model-len", "much"], "much"),
        (["m", "--max-model-len", "0"], "'0' is not a count"),
        (["m", "--max-num-seqs", "9", "--max-num-batched-tokens", "8"], "max_num_batched_tokens"),
        (["m", "--api-key", " "], "must not be empty"),
        (["m", "--allowed-origins", "[1]"], "JSON array"),
        (["m", "--allowed-origins", "[x"], "JSON array"),
        (["m", "--chat-template", "/no/such/file"], "/no/such/file"),
        (["m", "--ssl-keyfile", "k"], "--ssl-keyfile"),
        (["m", "--no-such-flag"], "--no-such-flag"),
    ],
)
def test_a_wrong_command_line_is_told(
    parse: Any, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert run(["serve", *arguments]) == ExitCode.USAGE
    assert words in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    assert run(["serve", str(tmp_path), "--port", "0"]) == ExitCode.MODEL
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "config.json" in line


def test_a_template_may_be_written_on_the_command_line(parse: Any) -> None:
    assert parse("m", "--chat-template", "{{ x }}").server.chat_template == "{{ x }}"


def test_underscores_and_equal_signs_are_accepted(parse: Any) -> None:
    assert parse("m", "--max_num_seqs=3").engine.max_num_seqs == 3


@pytest.mark.parametrize("flag", VALUE_FLAGS.split())
def test_a_flag_of_vllm_with_a_value_says_that_it_has_no_effect(
    parse: Any, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    parse("m", flag, "1")
    assert f"warning: {flag} is accepted and has no effect" in capsys.readouterr().err


@pytest.mark.parametrize("flag", SWITCH_FLAGS.split())
def test_a_switch_of_vllm_says_that_it_has_no_effect(
    parse: Any, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    parse("m", flag)
    parse("m", f"--no-{flag.removeprefix('--')}")
    assert capsys.readouterr().err.count(f"warning: {flag} ") == 2


def test_flags_that_are_not_given_are_not_spoken_of(
    parse: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    parse("m")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "count"),
    [("4096", 4096), ("4k", 4000), ("4K", 4096), ("1.5k", 1500), ("1M", 2**20), ("auto", None)],
)
def test_counts_may_have_a_unit(text: str, count: int | None) -> None:
    assert TokenCount().convert(text, None, None) == count


@pytest.mark.parametrize("text", ["-1", "k", "1T", "1 k", "0"])
def test_other_counts_are_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        TokenCount().convert(text, None, None)
