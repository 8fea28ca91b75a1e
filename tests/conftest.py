"""Fixtures that every test folder shares: a tiny Llama checkpoint, made from a seed, offline."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qserve.cli.cache import cache_folder
from qserve.cli.demo_model import find_model
from qserve.cli.main import run
from qserve.quant.source import resolve_model

VOCAB_SIZE = 512
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Enough words for 253 merges. What they say does not matter, that they never change does.
TOKENIZER_TEXT = (
    "The harbour wakes before the town does. Boats come back with the last of the night in their"
    " nets, and the men who mend those nets sit on upturned crates and talk about the weather as"
    " if it could hear them. What is the capital of France? Paris is the capital of France."
    " Numbers such as 1, 22, 333 and 4096 are written next to the names of the boats. A child"
    " counts the lamps along the quay: one, two, three, four, five, six, seven, and then begins"
    " again, because counting is more pleasant than knowing. The baker opens her door, and the"
    " smell of bread goes down the hill ahead of her. Nobody hurries. The sea, which has been"
    " doing the same thing for a very long time, goes on doing it. Über den Dächern, où la lumière"
    " change, mañana será otro día. def add(left, right): return left + right. Please answer in"
    " one sentence, and say when you do not know. The user asked something; the assistant said"
    " something else; the system had asked both of them to be brief and friendly."
)

MakeLlama = Callable[..., Path]


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 entries: 3 special tokens, 256 bytes, merges from the text above."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TOKENIZER_TEXT], trainer)
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def write_tiny_llama(folder: Path, **overrides: Any) -> Path:
    """Write a random Llama and its tokenizer.

    overrides: fields of its config, ``seed``, or ``model_class``, a relative of Llama.
    """
    torch.manual_seed(overrides.pop("seed", 0))
    model_class = overrides.pop("model_class", LlamaForCausalLM)
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        # Wide enough that layers change the residual stream and the most likely token stands out.
        "initializer_range": 0.15,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model = model_class(model_class.config_class(**(settings | overrides))).bfloat16()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=[2, 0], pad_token_id=0)
    model.save_pretrained(folder)
    train_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """Tiny tensors: a second thread costs more than it gives, and spins beside our own pool."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> MakeLlama:
    """Writes variants: ``make_tiny_llama(tie_word_embeddings=True, seed=1)`` gives their folder."""

    def make(**overrides: Any) -> Path:
        return write_tiny_llama(tmp_path_factory.mktemp("tiny-llama"), **overrides)

    return make


@pytest.fixture(scope="session")
def tiny_llama(make_tiny_llama: MakeLlama) -> Path:
    """A 2-layer bfloat16 Llama with tokenizer and chat template; ids 2 and 0 end. Read only."""
    return make_tiny_llama()


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The demo's model in 16 bits, fetched and imported unless it is in the user's cache."""
    cache = cache_folder(os.environ)
    return resolve_model(str(find_model(cache)), cache=cache).folder


@pytest.fixture(scope="session")
def rtn_llama(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model rounded to nearest in groups of 32. Do not write to it."""
    folder = tmp_path_factory.mktemp("rtn") / "tiny-rtn"
    arguments = ["quantize", str(tiny_llama), "--rtn", "--group-size", "32", "-o", str(folder)]
    assert run(arguments) == 0
    return folder
