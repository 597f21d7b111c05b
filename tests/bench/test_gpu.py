"""bench/gpu.sh: each part stands on its own, and what did not run has met nothing."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from gpu import AT_LEAST, AT_MOST, numbers, read, record, run_part
from gpu_parts import PARTS, Bench, Part

ROOT = Path(__file__).parents[2]


def unheard_of(bench: Bench) -> dict[str, object]:
    return {}


def test_ranges_and_single_numbers_are_parts() -> None:
    assert numbers("1-3,7") == [1, 2, 3, 7]


def test_a_part_that_fails_or_hangs_is_written_down_and_ends_no_other(tmp_path: Path) -> None:
    results = tmp_path / "parts.jsonl"
    run_part(Part(unheard_of, 60), [str(tmp_path), "."], results)
    run_part(PARTS[0]._replace(seconds=0.01), [str(tmp_path), "."], results)
    found = read(results)
    assert found["unheard_of"]["state"] == "failed"
    assert "ValueError" in found["unheard_of"]["figures"]["last_words"][-1]
    assert found["stack"]["state"] == "stopped after 0.01 s"


def test_parts_that_did_not_run_or_pass_have_met_nothing() -> None:
    reported = {
        "dpo": {"state": "passed", "seconds": 1.0, "figures": {"losses": [math.log(2)]}},
        "interrupted": {"state": "failed", "seconds": 1.0, "figures": {"leave_seconds": 1.0}},
    }
    found = record(reported, dry=False)
    assert found["ratios"] == {"dpo_first_loss_off": 0.0}
    assert set(found["missed"]) == (AT_MOST.keys() | AT_LEAST.keys()) - {"dpo_first_loss_off"}
    assert not found["met"]
    assert (found["parts"]["sft"], found["parts"]["interrupted"]) == ("not run", "failed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("numbers", "parts"),
    [
        ("3,10", {"attention", "weights", "out_of_memory"}),
        pytest.param(f"1-{len(PARTS)}", {part.name for part in PARTS}, marks=pytest.mark.thorough),
    ],
)
def test_it_runs_dry(tmp_path: Path, smollm2: Path, numbers: str, parts: set[str]) -> None:
    # Of a short name: sockets are in there.
    scratch = tempfile.mkdtemp(prefix="gpu-")
    command = [str(ROOT / "bench" / "gpu.sh"), "--dry", "--parts", numbers, "--out", str(tmp_path)]
    command += ["--tokenizer", str(smollm2), "--scratch", scratch]
    environment = os.environ | {"PYTHON": sys.executable}
    try:
        said = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    finally:
        shutil.rmtree(scratch)
    found = json.loads(said.splitlines()[-1])
    ran = {name: state for name, state in found["parts"].items() if state != "not run"}
    assert ran == dict.fromkeys(parts, "passed")
    assert found["ratios"]["halved"] >= 1
    assert not found["met"]
    assert [path.name for path in tmp_path.iterdir()] == ["parts.jsonl"]
