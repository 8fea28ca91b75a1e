"""Conversations in windows: each from its beginning, and what the assistant says is known."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from qserve.quant.calibration import Calibration, gather_calibration
from qserve.quant.decoder import Decoder
from qserve.quant.errors import CalibrationError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.options import QuantizeOptions
from qserve.quant.tuning.windows import gather_windows
from qserve.quant.window_text import read_window_text
from qserve.quant.windows import Tokens, pack_windows, windows_of_text

MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
    "{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
)
LAST_THINKS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ '<think></think>' if loop.last and message['role'] == 'assistant' else '' }}"
    "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHORTENING = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{{ message['content'] if loop.last else message['content'][:3] }}{% endfor %}"
)


def chat(*contents: str) -> dict[str, Any]:
    """A conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    return {
        "messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    }


CHAT = chat("What is it?", "A boat.", "Whose?", "It belongs to the men on the quay.")


@pytest.fixture
def options(tmp_path: Path) -> QuantizeOptions:
    """Twenty conversations and one that is too long, of which the assistant counts."""
    path = tmp_path / "chat.jsonl"
    entries = [CHAT] * 20 + [chat("Tell me about boats. " * 20, "Boats come back.")]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return QuantizeOptions(
        group_size=32, calibration=path, num_samples=6, seq_len=100, assistant_only=True
    )


def changed_model(source: Path, folder: Path, template: str) -> Path:
    """A copy of a model with another chat template."""
    shutil.copytree(source, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


def counted_text(model: Path, calibration: Calibration) -> list[str]:
    """What counts in each window, as text."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    windows = calibration.windows
    rows = zip(windows.token_ids, windows.counts, strict=True)
    return [str(tokenizer.decode(ids[counts])) for ids, counts in rows]


def test_windows_take_whole_documents_and_cut_long_ones_at_their_end() -> None:
    sizes = (4, 4, 3, 12, 2)
    documents = [Tokens([i] * n, [True] * n) for i, n in enumerate(sizes)]
    windows, num_cut = pack_windows(documents, 10)
    assert [window.ids for window in windows] == [[0] * 4 + [1] * 4, [2] * 3, [3] * 10, [4] * 2]
    assert num_cut == 1


def test_windows_in_which_nothing_counts_are_left_out() -> None:
    documents = [Tokens([1] * 8, [False] * 8), Tokens([2] * 8, [False] * 7 + [True])]
    assert [window.ids[0] for window in pack_windows(documents, 10)[0]] == [2]


def test_special_tokens_of_the_template_stand_once_at_the_start_of_each_conversation(
    decoder: Decoder, options: QuantizeOptions
) -> None:
    found = gather_calibration(decoder, replace(options, assistant_only=False))
    windows, report = found.windows, found.report
    assert bool((windows.token_ids[:, 0] == 1).all())
    assert not bool(((windows.token_ids[:, :-1] == 1) & (windows.token_ids[:, 1:] == 1)).any())
    assert (report.num_documents, report.num_conversations, report.num_cut) == (21, 21, 1)
    assert report.num_taken_tokens == report.num_counted_tokens == int(windows.counts.sum())
    assert 0 < report.coverage < 1
    padding = windows.counts.int().diff(dim=1)
    assert bool((padding <= 0).all()), "what does not count stands behind what does"
    assert not windows.token_ids[~windows.counts].any()
    assert "1 of 21 conversations cut" in str(report)


def test_only_what_the_assistant_says_counts(
    decoder: Decoder, options: QuantizeOptions, tiny_llama: Path
) -> None:
    said = "A boat.<|im_end|>\nIt belongs to the men on the quay.<|im_end|>\n"
    texts = counted_text(tiny_llama, gather_calibration(decoder, options))
    assert set(texts) == {said}


def test_a_template_may_mark_what_the_assistant_says(
    options: QuantizeOptions, tiny_llama: Path, tmp_path: Path
) -> None:
    model = changed_model(tiny_llama, tmp_path / "model", MARKED)
    found = gather_calibration(Decoder(Checkpoint(model)), options)
    assert set(counted_text(model, found)) == {"A boat.It belongs to the men on the quay."}
    assert found.report.num_counted_tokens < found.report.num_taken_tokens / 2


def test_an_answer_that_is_written_in_another_way_when_it_is_the_last_counts_without_its_end(
    options: QuantizeOptions, tiny_llama: Path, tmp_path: Path
) -> None:
    model = changed_model(tiny_llama, tmp_path / "model", LAST_THINKS)
    found = gather_calibration(Decoder(Checkpoint(model)), options)
    said = "A boat.<think></think>It belongs to the men on the quay.<|im_end|>\n"
    assert set(counted_text(model, found)) == {said}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (SHORTENING, r"chat.jsonl:1: it cannot be told what the assistant says in message 2"),
        ("{{ raise_exception('no such roles') }}", "refuses these messages .no such roles"),
        (None, "has no chat template: give `text`"),
    ],
)
def test_a_template_that_does_not_tell_is_refused(
    options: QuantizeOptions, tiny_llama: Path, tmp_path: Path, template: str | None, message: str
) -> None:
    model = changed_model(tiny_llama, tmp_path / "model", template or "")
    if template is None:
        (model / "chat_template.jinja").unlink()
    with pytest.raises(CalibrationError, match=message):
        read_window_text(model, options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"text": "The sea."}, "holds no conversations"),
        (chat("What is it?"), "nothing that would count"),
        ({"messages": [3]}, "chat template refuses these messages"),
    ],
)
def test_text_without_an_assistant_is_refused(
    options: QuantizeOptions, tiny_llama: Path, content: object, message: str
) -> None:
    assert isinstance(options.calibration, Path)
    options.calibration.write_text(json.dumps(content) + "\n")
    with pytest.raises(CalibrationError, match=message):
        read_window_text(tiny_llama, options)


def test_texts_among_conversations_are_cut_into_windows(
    options: QuantizeOptions, tiny_llama: Path
) -> None:
    assert isinstance(options.calibration, Path)
    entries = [CHAT, {"text": "The harbour wakes before the town does. " * 20}]
    options.calibration.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    found = read_window_text(tiny_llama, replace(options, assistant_only=False))
    assert found.num_taken_tokens == found.num_tokens and found.num_cut == 0
    with pytest.raises(CalibrationError, match="chat.jsonl:2 is a text, and only"):
        read_window_text(tiny_llama, options)


def test_what_is_left_is_to_tune_on(options: QuantizeOptions, tiny_llama: Path) -> None:
    text = read_window_text(tiny_llama, options)
    windows = gather_windows(Checkpoint(tiny_llama), options)
    assert len(windows.learned) + len(windows.held_back) == len(text.left) > 0
    assert bool(windows.held_back.counts.any(1).all())


def test_a_model_whose_tokenizer_opens_texts_has_that_token_before_every_window(
    tiny_llama: Path, tiny_options: QuantizeOptions, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, 1)]
    )
    tokenizer.save_pretrained(model)
    found = read_window_text(model, tiny_options)
    plain = read_window_text(tiny_llama, replace(tiny_options, seq_len=tiny_options.seq_len - 1))
    assert bool((found.taken.token_ids[:, 0] == 1).all())
    assert torch.equal(found.taken.token_ids[:, 1:], plain.taken.token_ids)
    assert bool((found.left.token_ids[:, 0] == 1).all())
    assert found.num_taken_tokens == plain.num_taken_tokens


def test_a_calibration_is_kept_whole(decoder: Decoder, options: QuantizeOptions) -> None:
    found = gather_calibration(decoder, options)
    again = Calibration.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.report == found.report
    assert torch.equal(again.windows.token_ids, found.windows.token_ids)
    assert torch.equal(again.windows.counts, found.windows.counts)
    assert windows_of_text(found.windows.token_ids).counts.all()
