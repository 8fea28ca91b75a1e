"""The model's tokenizer: text to ids and back, the bytes of a token, the chat template."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig

from qserve.serve.chat_options import ChatOptions
from qserve.serve.errors import BadRequest, StartupError

BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # how vocabularies with byte fallback write a byte
WORD_START = "\u2581"  # how a SentencePiece vocabulary writes a space


class Tokenizer:
    """A checkpoint's tokenizer. Encoding and decoding may run in several threads at once.

    Raises ``StartupError`` for a folder without a tokenizer of the ``tokenizers`` library.
    """

    def __init__(self, folder: Path, chat_template: str | None = None) -> None:
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, config=_model_type(folder), local_files_only=True
            )
            self._backend = self._tokenizer.backend_tokenizer
        except (OSError, ValueError, AttributeError, ImportError, KeyError) as error:
            raise StartupError(
                f"{folder} has no tokenizer that can be loaded ({_first_line(error)}): expected "
                "tokenizer.json beside the model"
            ) from error
        self._backend.no_truncation()  # some checkpoints ship with the limits of their training
        self._backend.no_padding()
        self.chat_template: str | None = chat_template or self._template()
        # What a request may not hand to the template: these are arguments of the renderer itself.
        renderer = inspect.signature(self._tokenizer.apply_chat_template)
        self._reserved_names = {*renderer.parameters, "messages"}
        self._is_byte_level = "ByteLevel" in _decoder_types(self._backend.decoder)
        self._added = {
            number: token.content
            for number, token in self._backend.get_added_tokens_decoder().items()
        }

    def _template(self) -> str | None:
        template: str | dict[str, str] | None = self._tokenizer.chat_template
        if isinstance(template, dict):  # several by name: the unnamed use is "default"
            template = template.get("default")
        return template

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer knows; the model's output may be padded beyond it."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The token that ends a turn for the tokenizer; empty when it names none."""
        found = self._tokenizer.eos_token_id
        return frozenset() if found is None else frozenset([int(found)])

    def encode(self, text: str, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text; with ``add_special_tokens`` the model's BOS where it wants one."""
        return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no character become U+FFFD."""
        return str(self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes this token adds to a text; empty for an id without a piece."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._is_byte_level and all(letter in BYTE_OF_LETTER for letter in piece):
            return bytes(BYTE_OF_LETTER[letter] for letter in piece)
        byte = BYTE_PIECE.fullmatch(piece)
        if byte is not None:
            return bytes([int(byte.group(1), 16)])
        return str(piece).replace(WORD_START, " ").encode()

    def token_text(self, token_id: int) -> str:
        r"""A token as it is written in logprobs: its text, or ``bytes:\xe4\xbd`` when it has none.

        Half a character gets a name of its own, as OpenAI does it, where U+FFFD would make
        different tokens look alike.
        """
        raw = self.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def render(self, messages: Sequence[Mapping[str, Any]], options: ChatOptions) -> str:
        """The prompt text of a conversation, rendered in a sandbox.

        Raises ``BadRequest`` when there is no template, and for everything the template refuses.
        """
        template = options.chat_template or self.chat_template
        if template is None:
            raise BadRequest(
                "this model has no chat template: use /v1/completions, or start the server with "
                "--chat-template FILE",
                "messages",
            )
        reserved = sorted(self._reserved_names.intersection(options.template_kwargs))
        if reserved:
            raise BadRequest(
                f"chat_template_kwargs sets {reserved[0]!r}, which is not the template's to have",
                "chat_template_kwargs",
            )
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                documents=list(options.documents) if options.documents is not None else None,
                chat_template=template,
                add_generation_prompt=options.add_generation_prompt,
                continue_final_message=options.continue_final_message,
                tokenize=False,
                **options.template_kwargs,
            )
        except Exception as error:  # a template is a program: it can fail in every way there is
            raise BadRequest(
                f"the chat template refused the conversation: {_first_line(error)}", "messages"
            ) from error
        return str(rendered)


def _model_type(folder: Path) -> PreTrainedConfig | None:
    """A config that says no more than the model's type, when the tokenizer names its own class.

    That is all the loader then looks at, and making the whole config imports the model's code,
    which takes more than a second. None when the loader has to find the class itself.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file() or "tokenizer_class" not in json.loads(path.read_text(encoding="utf-8")):
        return None
    model = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = type("ModelType", (PreTrainedConfig,), {"model_type": model.get("model_type", "")})
    config: PreTrainedConfig = kind()
    return config


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _decoder_types(decoder: Any) -> set[str]:
    """The names of the steps of a ``tokenizers`` decoder."""
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {step["type"] for step in state.get("decoders", [state])}


def _byte_of_letter() -> dict[str, int]:
    """The alphabet of byte-level BPE (GPT-2): printable bytes are themselves, others shifted."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(shifted)}


BYTE_OF_LETTER = _byte_of_letter()
