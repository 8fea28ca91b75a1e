"""Sampling defaults: the request, then generation_config.json, then OpenAI's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qserve.serve.errors import StartupError
from qserve.serve.sampling_defaults import SamplingDefaults

GIVEN: dict[str, Any] = {
    "temperature": 0.6,
    "top_p": 0.9,
    "top_k": 40,
    "min_p": 0.05,
    "repetition_penalty": 1.1,
}


def read(tmp_path: Path, content: object) -> SamplingDefaults:
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    return SamplingDefaults.from_folder(tmp_path)


def test_a_model_without_a_config_has_openai_s_defaults(tmp_path: Path) -> None:
    assert SamplingDefaults.from_folder(tmp_path) == SamplingDefaults()
    assert SamplingDefaults().describe() == ""


def test_the_config_is_read_and_described(tmp_path: Path) -> None:
    defaults = read(tmp_path, GIVEN | {"max_new_tokens": 99, "eos_token_id": [1], "top_k": None})
    assert (defaults.temperature, defaults.top_k, defaults.max_tokens) == (0.6, 0, 99)
    assert defaults.describe() == (
        "temperature 0.6, top_p 0.9, min_p 0.05, repetition_penalty 1.1, max_tokens 99"
    )


@pytest.mark.parametrize(
    "content",
    [
        {"temperature": "hot"},
        {"temperature": 9},
        {"max_new_tokens": 0},
        {"max_new_tokens": "9"},
        [],
    ],
)
def test_a_config_that_cannot_be_used_stops_the_start(tmp_path: Path, content: Any) -> None:
    with pytest.raises(StartupError, match="--generation-config none"):
        read(tmp_path, content)


def test_a_damaged_config_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(StartupError):
        SamplingDefaults.from_folder(tmp_path)


def test_the_model_s_defaults_apply_when_the_request_is_silent(make_client: Any) -> None:
    client = make_client(defaults=SamplingDefaults(**GIVEN, max_tokens=7))
    client.chat()
    assert {name: getattr(client.params(), name) for name in GIVEN} == GIVEN
    assert client.params().max_tokens == 7


def test_the_request_wins(make_client: Any) -> None:
    client = make_client(defaults=SamplingDefaults(**GIVEN))
    asked: dict[str, Any] = {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    client.chat(**asked)
    assert {name: getattr(client.params(), name) for name in asked} == asked
