"""What may not be imported where: start-up stays quick, and only workers and engines hold torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "vllm"}
SCREENS = {"textual", "rich"}
LISTENERS = {"fastapi", "uvicorn", "starlette"}


@pytest.mark.parametrize(
    ("code", "forbidden"),
    [
        ("import serve.daemon", HEAVY | SCREENS),
        ("import tui.app", HEAVY | LISTENERS),
        ("import appliance.client", HEAVY | LISTENERS | {"textual"}),
        ("import appliance.data.importer", HEAVY | SCREENS | LISTENERS),
        (
            "import sys; sys.argv = ['appliance', '--help']\n"
            "from appliance.cli.main import main\n"
            "try: main()\n"
            "except SystemExit as end: assert end.code == 0",
            HEAVY | SCREENS | LISTENERS | {"httpx", "pydantic"},
        ),
    ],
    ids=["daemon", "dashboard", "client", "importer", "help"],
)
def test_forbidden_modules_stay_out(code: str, forbidden: set[str]) -> None:
    script = f"{code}\nimport sys\nprint('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("MODULES")[2].split())
    assert "click" in loaded or "appliance" in loaded
    assert loaded & forbidden == set()
