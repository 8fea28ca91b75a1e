"""What the user calls a model, found on the disk, in the hub's cache or on the hub."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors

from qserve.quant.errors import CheckpointError
from qserve.quant.formats.checkpoint import Checkpoint
from qserve.quant.gguf_import import import_gguf

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights in other formats can be many times the size of what is read, so only this is fetched.
FETCHED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
NOT_FETCHED = ("*/*", "consolidated*", "adapter_*")


def say_nothing(message: str) -> None:
    """A notice that nobody reads."""


def resolve_model(
    model: str, *, cache: Path, notice: Callable[[str], None] = say_nothing
) -> Checkpoint:
    """The checkpoint that ``model`` names: a folder, a ``.gguf`` file or a hub id ``owner/name``.

    A path that exists wins over a hub id. A GGUF file is imported once to a folder below
    ``cache``; a hub model lands in the hub's own cache. ``notice`` is told about what takes long.
    Raises ``CheckpointError`` when there is no such model or when it cannot be read.
    """
    path = Path(model)
    if is_gguf(model):
        return Checkpoint(import_gguf(path, cache, notice))
    if path.exists():
        return Checkpoint(path)
    if path.suffix.lower() != ".gguf" and HUB_ID.fullmatch(model):
        return Checkpoint(fetch(model))
    raise CheckpointError(
        f"{model} does not exist: give a model folder, a hub id (owner/name) or a .gguf file"
    )


def is_gguf(model: str) -> bool:
    """Whether ``model`` names a GGUF file that is there."""
    return Path(model).is_file() and Path(model).suffix.lower() == ".gguf"


def fetch(hub_id: str) -> Path:
    """The folder with the files of a hub model, downloaded unless they are in the hub's cache.

    Raises ``CheckpointError`` when the hub cannot be reached or does not give the model away.
    """
    try:
        folder = huggingface_hub.snapshot_download(
            hub_id, allow_patterns=list(FETCHED), ignore_patterns=list(NOT_FETCHED)
        )
    except hub_errors.GatedRepoError:
        raise CheckpointError(
            f"{hub_id} asks for a consent that this machine's hub account has not given: accept "
            "its terms on the hub and log in with `hf auth login`"
        ) from None
    except hub_errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{hub_id} is neither a folder here nor a model on the hub: check the spelling, or "
            "log in with `hf auth login` if it is private"
        ) from None
    except hub_errors.LocalEntryNotFoundError:
        raise CheckpointError(
            f"{hub_id} is not a folder here, not in the hub's cache, and the hub cannot be "
            "reached: download the model on a machine that can, and give its folder"
        ) from None
    except hub_errors.HfHubHTTPError as error:
        raise CheckpointError(f"{hub_id} cannot be fetched from the hub: {error}") from None
    return Path(folder)
