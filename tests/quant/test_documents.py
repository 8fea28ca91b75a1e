"""Calibration files: text, JSON lines of texts, and conversations."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from qserve.quant.calibration import gather_calibration
from qserve.quant.decoder import Decoder
from qserve.quant.documents import read_documents
from qserve.quant.errors import CalibrationError
from qserve.quant.options import QuantizeOptions

CHAT = {
    "messages": [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A boat."},
    ]
}
RENDERED = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA boat.<|im_end|>\n"


def write(path: Path, *lines: object) -> Path:
    """A file of JSON lines, a blank one at the end."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n")
    return path


def test_texts_and_conversations_may_stand_in_one_file(tiny_llama: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "mixed.jsonl", {"text": "The sea."}, CHAT)
    assert read_documents(path, tiny_llama) == ["The sea.", RENDERED]


def test_another_file_is_one_text_whatever_is_in_it(tiny_llama: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "lines.txt", {"text": "The sea."})
    assert read_documents(path, tiny_llama) == [path.read_text()]


def test_special_tokens_of_the_template_are_tokens_and_stand_once(
    decoder: Decoder, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    path = write(tmp_path / "chat.jsonl", *[CHAT] * 20)
    options = replace(tiny_options, calibration=path, num_samples=2, seq_len=30)
    found = gather_calibration(decoder, options)
    assert found.token_ids[0, 0] == 1 and found.token_ids[0, 1] != 1
    assert int((found.token_ids == 1).sum()) >= 2
    assert found.report.num_documents == 20
    assert found.report.num_distinct_tokens == len(found.token_ids.unique())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"bad.jsonl:2 is not JSON"),
        ("[]", r"bad.jsonl:2: expected an object"),
        ('{"prompt": "x"}', r"bad.jsonl:2: expected `text`, or `messages`"),
        ('{"messages": [3]}', r"bad.jsonl:2: the chat template refuses"),
    ],
)
def test_a_line_that_is_neither_is_named(
    tiny_llama: Path, tmp_path: Path, line: str, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(CalibrationError, match=message):
        read_documents(path, tiny_llama)


def test_conversations_need_a_template(tiny_llama: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "chat_template.jinja").unlink()
    with pytest.raises(CalibrationError, match="has no chat template: give `text`"):
        read_documents(write(tmp_path / "chat.jsonl", CHAT), model)
