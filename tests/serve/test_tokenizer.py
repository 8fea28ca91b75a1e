"""The tokenizer: text and ids, the bytes of tokens, the chat template and its errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from qserve.serve.chat_options import ChatOptions
from qserve.serve.errors import BadRequest, StartupError
from qserve.serve.tokenizer import Tokenizer

TEXT = "The lamps: 你好, naïve 🙂\n"
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer in the manner of SentencePiece: words with a mark, bytes for the rest."""
    folder = tmp_path_factory.mktemp("byte-fallback")
    vocab = {"<unk>": 0, "▁a": 1, "b": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    backend = Backend(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return Tokenizer(folder)


def test_text_comes_back_from_its_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(TEXT, False)) == TEXT


def test_the_bytes_of_the_tokens_join_to_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, False)
    assert b"".join(tokenizer.token_bytes(token) for token in ids) == TEXT.encode()


def test_a_token_that_is_half_a_character_is_named_by_its_bytes(tokenizer: Tokenizer) -> None:
    names = [tokenizer.token_text(token) for token in tokenizer.encode("你", False)]
    assert names == ["bytes:\\xe4", "bytes:\\xbd", "bytes:\\xa0"]


def test_a_special_token_is_named_by_its_content(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert tokenizer.eos_token_ids == {2}


def test_special_tokens_are_skipped_only_when_asked(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([1, 2]) == ""
    assert tokenizer.decode([1, 2], skip_special_tokens=False) == "<|im_start|><|im_end|>"


def test_an_id_beyond_the_vocabulary_has_no_bytes(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(100_000) == b""


def test_byte_fallback_tokens_have_their_byte(byte_fallback: Tokenizer) -> None:
    assert byte_fallback.token_bytes(1) == b" a"
    assert byte_fallback.token_bytes(3 + 0xE4) == b"\xe4"


def test_the_template_opens_the_reply(tokenizer: Tokenizer) -> None:
    text = tokenizer.render(USER, ChatOptions())
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_the_last_message_can_be_continued(tokenizer: Tokenizer) -> None:
    messages = [*USER, {"role": "assistant", "content": "Par"}]
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    assert tokenizer.render(messages, options).endswith("<|im_start|>assistant\nPar")


def test_variables_reach_the_template(tokenizer: Tokenizer) -> None:
    options = ChatOptions(chat_template="{{ mood }}", template_kwargs={"mood": "calm"})
    assert tokenizer.render(USER, options) == "calm"


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('only one system message') }}", "{% for %}", "{{ messages[5].role + 1 }}",
     "{{ ''.__class__.__mro__ }}", "{{ 1 // 0 }}"],
)  # fmt: skip
def test_whatever_a_template_does_wrong_is_the_request_s_fault(
    tokenizer: Tokenizer, template: str
) -> None:
    with pytest.raises(BadRequest, match="the chat template refused"):
        tokenizer.render(USER, ChatOptions(chat_template=template))


def test_a_refusal_of_the_template_is_told(tokenizer: Tokenizer) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadRequest, match="roles must alternate"):
        tokenizer.render(USER, ChatOptions(chat_template=template))


def test_a_request_cannot_reach_the_renderer_s_own_arguments(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRequest, match="tokenize") as caught:
        tokenizer.render(USER, ChatOptions(template_kwargs={"tokenize": True}))
    assert caught.value.param == "chat_template_kwargs"


def test_without_a_template_the_error_says_what_to_do(byte_fallback: Tokenizer) -> None:
    with pytest.raises(BadRequest, match="--chat-template"):
        byte_fallback.render(USER, ChatOptions())


def test_a_template_can_be_given(tiny_llama: Path) -> None:
    own = Tokenizer(tiny_llama, chat_template="{{ messages[0].content }}!")
    assert own.render(USER, ChatOptions()) == "Hi!"


def copy_without(source: Path, target: Path, name: str) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(name, "*.safetensors"))
    return target


def test_a_folder_without_tokenizer_is_refused_at_start(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_without(tiny_llama, tmp_path / "model", "tokenizer*")
    with pytest.raises(StartupError, match="has no tokenizer that can be loaded"):
        Tokenizer(folder)


def edit_config(folder: Path, change: dict[str, Any]) -> None:
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    for name, value in change.items():
        if value is None:
            content.pop(name, None)
        else:
            content[name] = value
    path.write_text(json.dumps(content))


def test_a_tokenizer_that_names_no_class_is_found_by_the_model(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = copy_without(tiny_llama, tmp_path / "model", "nothing")
    edit_config(folder, {"tokenizer_class": None})
    assert Tokenizer(folder).encode("The lamps", False) == Tokenizer(tiny_llama).encode(
        "The lamps", False
    )


def test_limits_left_over_from_training_do_not_cut_prompts(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = copy_without(tiny_llama, tmp_path / "model", "nothing")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    path.write_text(json.dumps(content))
    assert len(Tokenizer(folder).encode("one two three four five six", False)) > 4
