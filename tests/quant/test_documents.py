"""Calibration files: text, entries with texts and conversations, tables, data sets of the hub."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors as hub_errors

from qserve.quant import documents
from qserve.quant.documents import read_documents
from qserve.quant.errors import CalibrationError, OptionError
from qserve.quant.hub_data import HubDataset, parse_dataset
from qserve.quant.options import CalibrationSource, QuantizeOptions, read_source

MESSAGES = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A boat."},
]
ENTRIES = [{"text": "The sea."}, {"messages": MESSAGES}]
REFUSED: Any = SimpleNamespace(headers={}, request=None)


def lines(*entries: object) -> str:
    """JSON lines, a blank one at the end."""
    return "".join(json.dumps(entry) + "\n" for entry in entries) + "\n"


@pytest.mark.parametrize("name", ["mixed.jsonl", "mixed.JSON", "list.json", "mixed.jsonl.gz"])
def test_texts_and_conversations_may_stand_in_one_file(tmp_path: Path, name: str) -> None:
    text = json.dumps(ENTRIES, indent=1) if name.startswith("list") else lines(*ENTRIES)
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = [document.content for document in read_documents(tmp_path / name)]
    assert found == ["The sea.", MESSAGES]


def test_another_file_is_one_text_whatever_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text(lines({"text": "The sea."}))
    (document,) = read_documents(path)
    assert document.content == path.read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"bad.jsonl:2 is not JSON"),
        ("[]", r"bad.jsonl:2: expected an object"),
        ('{"prompt": "x"}', r"bad.jsonl:2: expected `text`, or `messages`"),
        ('{"text": 3}', r"bad.jsonl:2: expected `text`, or `messages`"),
        ("\xe9", "not UTF-8"),
    ],
)
def test_a_line_that_is_neither_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n', encoding="latin-1")
    with pytest.raises(CalibrationError, match=message):
        read_documents(path)


def test_a_damaged_archive_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(lines(*ENTRIES).encode())[:-12])
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_documents(path)


class FakeTable:
    """Stands for pyarrow's ``ParquetFile``: a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._rows = [json.loads(line) for line in Path(path).read_text().splitlines() if line]
        self.schema_arrow = SimpleNamespace(
            names=sorted({key for row in self._rows for key in row})
        )

    def iter_batches(self, columns: list[str]) -> list[Any]:
        rows = [{name: row.get(name) for name in columns} for row in self._rows]
        return [SimpleNamespace(to_pylist=lambda row=row: [row]) for row in rows]


@pytest.fixture
def pyarrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that reads tables."""
    module: Any = ModuleType("pyarrow.parquet")
    module.ParquetFile = FakeTable
    monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)


@pytest.mark.usefixtures("pyarrow")
def test_a_table_has_texts_or_conversations_in_columns(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    path.write_text(lines(*ENTRIES, {"text": "A boat.", "id": 3}))
    assert [one.content for one in read_documents(path)] == ["The sea.", MESSAGES, "A boat."]
    path.write_text(lines({"prompt": "x", "id": 1}))
    with pytest.raises(
        CalibrationError, match="no column messages or text: name one of id, prompt"
    ):
        read_documents(path)


def test_a_table_without_the_library_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(CalibrationError, match="pip install pyarrow"):
        read_documents(tmp_path / "data.parquet")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub:o/n", HubDataset("o/n")),
        ("hub:o/n:test", HubDataset("o/n", split="test")),
        (
            "hub:o/n/raw-v1@1a2b:train:prompt",
            HubDataset("o/n", "raw-v1", "1a2b", "train", "prompt"),
        ),
    ],
)
def test_a_data_set_is_named_by_its_parts(text: str, expected: HubDataset) -> None:
    assert read_source(text, Path()) == expected
    assert str(expected) == text


def test_other_sources_are_words_or_files() -> None:
    assert read_source("self", Path("/a")) is CalibrationSource.SELF
    assert read_source("hub.txt", Path("/a")) == Path("/a/hub.txt")
    with pytest.raises(OptionError, match="names no data set"):
        parse_dataset("hub:nobody")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A data set of the hub with two configurations; gives what is downloaded of it."""
    content = {
        "README.md": "a data set",
        "dataset_infos.json": "{}",
        "data/train-00000-of-00002-1a2b3c4d5e6f.jsonl": lines(*ENTRIES),
        "data/train-00001-of-00002-1a2b3c4d5e6f.jsonl": lines({"text": "Nets."}),
        "data/test_sft-00000-of-00001.jsonl": lines({"prompt": "Lamps.", "n": 1}),
        "other/train/0000.jsonl.gz": "",
        "other/validation/0000.jsonl.gz": "",
    }
    for name, text in content.items():
        path = tmp_path / "snapshot" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    asked: list[str] = []

    def download(repository: str, name: str, **where: Any) -> str:
        assert (repository, where) == ("o/n", {"repo_type": "dataset", "revision": None})
        asked.append(name)
        return str(tmp_path / "snapshot" / name)

    def list_files(self: object, repository: str, **where: Any) -> list[str]:
        return list(content)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", list_files)
    return asked


def test_a_split_of_a_data_set_is_read_file_by_file(hub: list[str]) -> None:
    found = read_documents(HubDataset("o/n", "data"))
    assert [document.content for document in found] == ["The sea.", MESSAGES, "Nets."]
    assert [name[:16] for name in hub] == ["data/train-00000", "data/train-00001"]


def test_no_more_is_downloaded_than_is_read(
    hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_HUB_CHARACTERS", 5)
    (document,) = read_documents(HubDataset("o/n", "data"))
    assert document.content == "The sea."
    assert len(hub) == 1


@pytest.mark.usefixtures("hub")
def test_a_column_may_be_named() -> None:
    (document,) = read_documents(HubDataset("o/n", split="test_sft", column="prompt"))
    assert document.content == "Lamps."


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (HubDataset("o/n", "nowhere"), "has no file that can be read"),
        (HubDataset("o/n", split="dev"), "no split dev: give one of test_sft, train, validation"),
        (HubDataset("o/n"), r"in 2 folders \(data, other/train\): name one, as in hub:o/n/data"),
        (HubDataset("o/n", split="test_sft"), "expected `text`, or `messages`"),
        (HubDataset("o/n", split="test_sft", column="x"), "field x is not among prompt, n"),
        (HubDataset("o/n", split="test_sft", column="n"), "field n is neither a text nor a list"),
    ],
)
def test_what_a_data_set_does_not_have_is_said(dataset: HubDataset, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_documents(dataset)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_errors.RepositoryNotFoundError("404", response=REFUSED), "not a data set on the hub"),
        (hub_errors.GatedRepoError("403", response=REFUSED), "hf auth login"),
        (hub_errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached"),
        (hub_errors.HfHubHTTPError("500", response=REFUSED), "the hub cannot be reached"),
    ],
)
def test_a_hub_that_gives_nothing_is_told_in_plain_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception, message: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    def miss(*_: object, **__: object) -> None:
        raise hub_errors.LocalEntryNotFoundError("nothing in the cache")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", miss)
    with pytest.raises(CalibrationError, match=message):
        read_documents(HubDataset("o/n"))


def test_what_is_in_the_cache_does_without_a_network(
    hub: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise hub_errors.OfflineModeIsEnabled("offline")

    def cached(repository: str, **where: Any) -> str:
        assert where["local_files_only"]
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", cached)
    assert len(read_documents(HubDataset("o/n", "data"))) == 3


def test_only_conversations_have_an_assistant() -> None:
    with pytest.raises(OptionError, match="the text built-in has no conversations"):
        QuantizeOptions(assistant_only=True)
