"""`qserve run` and `qserve recipe`, from the file to the exit code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from qserve.cli.errors import ExitCode
from qserve.quant.formats.checkpoint import Checkpoint

Qserve = Callable[..., Any]

REPORTS = {
    "json": "reports/r.json",
    "markdown": "reports/r.md",
    "html": "reports/r.html",
    "junit": "reports/r.xml",
}


@pytest.fixture
def write_recipe(tmp_path: Path, tiny_llama: Path) -> Callable[..., Path]:
    """Writes a recipe for the tiny model, with changes to its sections."""

    def write(**changes: Any) -> Path:
        content = {
            "model": str(tiny_llama),
            "quantize": {"method": "rtn", "group_size": 32},
            "evaluate": {"windows": 2, "seq_len": 32},
            "gates": {"max_kl": 50},
            "output": {"folder": "out"},
            "reports": REPORTS,
        } | changes
        path = tmp_path / "tiny.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def test_a_recipe_publishes_a_checkpoint_its_reports_and_its_lock(
    write_recipe: Callable[..., Path],
    qserve: Qserve,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    done = qserve("run", write_recipe())
    assert done.code == ExitCode.OK, done.err
    assert Checkpoint(tmp_path / "out").method == "awq"
    report = json.loads((tmp_path / "reports/r.json").read_text())
    assert report["published"] is True
    assert [gate["name"] for gate in report["gates"]] == ["max_kl"]
    assert report["gates"][0]["value"] == report["evaluation"]["kl"] > 0
    markdown = (tmp_path / "reports/r.md").read_text()
    assert markdown.startswith("## tiny: published") and "| max_kl | at most 50 |" in markdown
    assert (tmp_path / "summary.md").read_text() == markdown
    suite = ElementTree.parse(tmp_path / "reports/r.xml").getroot()[0]
    assert [case.get("name") for case in suite] == ["quantize", "evaluate", "gate max_kl"]
    assert suite.get("failures") == "0"
    page = (tmp_path / "reports/r.html").read_text()
    assert page.count("<circle") >= 14 and "http" not in page.replace("http-equiv", "")


def test_the_lock_holds_the_hashes_of_what_was_read_and_written(
    write_recipe: Callable[..., Path], qserve: Qserve, tmp_path: Path
) -> None:
    assert qserve("run", write_recipe(evaluate=None, gates={})).code == ExitCode.OK
    lock = json.loads((tmp_path / "out/recipe.lock").read_text())
    assert lock["recipe"]["quantize"]["method"] == "rtn"
    assert lock["versions"].keys() >= {"torch", "transformers", "qserve-llm"}
    for name, digest in lock["result"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    again = qserve("run", tmp_path / "tiny.yaml", "-o", tmp_path / "again")
    assert again.code == ExitCode.OK
    assert json.loads((tmp_path / "again/recipe.lock").read_text())["result"] == lock["result"]


def test_a_failed_gate_publishes_nothing_and_has_an_exit_code_of_its_own(
    write_recipe: Callable[..., Path], qserve: Qserve, tmp_path: Path
) -> None:
    done = qserve("run", write_recipe(gates={"max_kl": 0, "max_size": "1kB", "min_top1": 0}))
    assert done.code == ExitCode.GATE
    assert not (tmp_path / "out").exists()
    suite = ElementTree.parse(tmp_path / "reports/r.xml").getroot()[0]
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    assert failed == ["gate max_kl", "gate max_size"]
    assert suite.get("failures") == "2"
    assert "max_size" in done.out and "at most 1.0 kB: FAILED" in " ".join(done.out.split())
    assert "NOT published" in (tmp_path / "reports/r.md").read_text()
    assert json.loads((tmp_path / "reports/r.json").read_text())["published"] is False


def test_a_failed_check_publishes_nothing_like_a_failed_gate(
    write_recipe: Callable[..., Path], qserve: Qserve, tmp_path: Path
) -> None:
    recipe = write_recipe(
        quantize={"method": "qoq"},
        calibration={"samples": 2, "seq_len": 32},
        evaluate=None,
        gates={},
        checks={"inspect": True, "loads_in": ["vllm"]},
    )
    done = qserve("run", recipe)
    assert done.code == ExitCode.GATE, done.err
    assert "read by qserve alone" in done.out
    assert not (tmp_path / "out").exists()
    suite = ElementTree.parse(tmp_path / "reports/r.xml").getroot()[0]
    assert suite.get("failures") == "1" and suite.get("tests") == str(len(suite)) == "3"
    failed = [case.get("name") for case in suite if case.find("failure") is not None]
    assert failed == ["check loads in vllm"]
    assert json.loads((tmp_path / "reports/r.json").read_text())["checks"][0]["passed"] is True
    assert "| loads in vllm |" in (tmp_path / "reports/r.md").read_text()
    assert "<h2>Checks</h2>" in (tmp_path / "reports/r.html").read_text()


def test_a_recipe_may_treat_layers_differently(
    write_recipe: Callable[..., Path], qserve: Qserve, tmp_path: Path
) -> None:
    overrides = [{"layers": "mlp", "bits": 16}, {"layers": "gate", "group_size": 32}]
    quantize = {"method": "rtn", "group_size": 32, "overrides": overrides}
    assert qserve("run", write_recipe(quantize=quantize)).code == ExitCode.OK
    checkpoint = Checkpoint(tmp_path / "out")
    packed = {name for name in checkpoint.modules if checkpoint.describe(name) is not None}
    assert {name.split(".")[-2] for name in packed} == {"self_attn"}
    lock = json.loads((tmp_path / "out/recipe.lock").read_text())
    assert lock["recipe"]["quantize"]["overrides"][1]["group_size"] == 32


def test_a_recipe_may_work_towards_a_limit_which_is_a_gate_too(
    write_recipe: Callable[..., Path], qserve: Qserve, tmp_path: Path
) -> None:
    quantize = {"method": "rtn", "group_size": 32, "max_kl": 50}
    assert qserve("run", write_recipe(quantize=quantize, gates={})).code == ExitCode.OK
    report = json.loads((tmp_path / "reports/r.json").read_text())
    assert [gate["name"] for gate in report["gates"]] == ["max_kl"]
    assert report["quantization"]["kl"] == report["evaluation"]["kl"]
    quantize["max_kl"] = 1e-12
    refused = qserve("run", write_recipe(quantize=quantize, gates={}), "--force")
    assert refused.code == ExitCode.GATE


def test_an_error_is_in_the_junit_report_too(
    write_recipe: Callable[..., Path], qserve: Qserve, tmp_path: Path
) -> None:
    done = qserve("run", write_recipe(calibration={"text": "none.txt"}, quantize={"method": "awq"}))
    assert done.code == ExitCode.CALIBRATION
    assert "none.txt cannot be read" in done.error
    suite = ElementTree.parse(tmp_path / "reports/r.xml").getroot()[0]
    found = suite[0].find("error")
    assert found is not None and "none.txt" in str(found.get("message"))


def test_an_output_that_exists_is_not_replaced_unless_told_to(
    write_recipe: Callable[..., Path], qserve: Qserve, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    recipe = write_recipe(evaluate=None, gates={})
    assert qserve("run", recipe).code == ExitCode.OUTPUT
    assert qserve("run", recipe, "--force").code == ExitCode.OK


def test_a_report_that_cannot_be_written_is_told_before_the_run(
    write_recipe: Callable[..., Path], qserve: Qserve, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("folder", "tiny.yaml/r.json"):
        done = qserve("run", write_recipe(reports={"json": name}))
        assert done.code == ExitCode.OUTPUT
        assert f"the report {tmp_path / name} cannot be written" in done.error
    assert not (tmp_path / "out").exists()


def test_a_started_recipe_is_sound_and_not_overwritten(qserve: Qserve, tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    assert qserve("recipe", "init", path, "--model", "m").code == ExitCode.OK
    assert qserve("recipe", "check", path).code == ExitCode.OK
    assert "exists" in qserve("recipe", "init", path).error
    path.write_text(path.read_text() + "gattes: {}\n")
    refused = qserve("recipe", "check", path)
    assert refused.code == ExitCode.USAGE
    assert "unknown key, did you mean 'gates'?" in refused.error


def test_the_schema_and_a_translated_recipe_are_all_there_is_on_stdout(
    qserve: Qserve, tmp_path: Path
) -> None:
    assert json.loads(qserve("recipe", "schema").out)["title"]
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text("s: {m: {GPTQModifier: {scheme: W4A16, dampening: 1}, LogModifier: {}}}")
    done = qserve("recipe", "import", theirs, "--model", "a/b")
    assert yaml.safe_load(done.out)["quantize"] == {"method": "int4", "bits": 4, "group_size": 128}
    assert "LogModifier is left out" in done.err and "GPTQModifier.dampening" in done.err


def test_what_is_done_after_packing_is_in_the_reports_and_the_lock(
    write_recipe: Callable[..., Path], qserve: Qserve, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("The harbour wakes before the town does. " * 40)
    recipe = write_recipe(
        quantize={"method": "int4", "kv_cache": "fp8", "tune": {"steps": 1, "minutes": 10}},
        calibration={"text": "text.txt", "samples": 2, "seq_len": 16},
    )
    done = qserve("run", recipe)
    assert done.code == ExitCode.OK, done.err
    assert "| tuning | KL " in (tmp_path / "reports/r.md").read_text()
    lock = json.loads((tmp_path / "out/recipe.lock").read_text())
    assert lock["tuning_steps"] == 1
    assert len({lock["tokens_sha256"], lock["calibration_sha256"]} - {None}) == 2
    assert str(Checkpoint(tmp_path / "out").kv_cache) == "fp8, a scale for each head"
    shown = qserve("inspect", tmp_path / "out").out
    assert "fp8, a scale for each head" in shown and "self_attn.q_proj" in shown
    assert "self_attn " not in shown, "scales of keys and values are no matrices"
