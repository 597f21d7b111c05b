"""Whatever the code does where there is a GPU is done here, on the processor, and comes out as it should."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gpu_conditions import Conditions, conditions
from tiny import events, result

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("as-on-a-gpu")]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where gpu_process.py has left its runs, and what it saw."""
    folder = tmp_path_factory.mktemp("as-on-a-gpu")
    paths = [ROOT, *(ROOT / "tests" / name for name in ("", "gpu", "appliance/train", "appliance/release"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("gpu_process.py")), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="session")
def seen(home: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((home / "seen.json").read_bytes())
    return found


def test_every_condition_on_a_gpu_has_been_met(seen: dict[str, Any]) -> None:
    everywhere = conditions()
    assert len(everywhere) > 30
    assert everywhere - set(seen["conditions"]) == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("if ON_GPU:\n    pass", ["f:1:3 ON_GPU"]),
        ("a = 1 if not ON_GPU else 2", ["f:1:9 not ON_GPU"]),
        ("f(active=ON_GPU)", ["f:1:9 ON_GPU"]),
        ("x = quantised and ON_GPU", ["f:1:4 quantised and ON_GPU"]),
        ("there = torch.cuda.is_available()\nif there:\n    pass", ["f:1:8 torch.cuda.is_available()", "f:2:3 there"]),
        ("if device.type == 'cuda':\n    pass", ["f:1:3 device.type == 'cuda'"]),
        ("if on_card:\n    pass", []),
    ],
)
def test_conditions_are_found_wherever_they_stand(source: str, found: list[str]) -> None:
    assert Conditions(source, "f").names == found


def test_every_stage_ends_well_and_passes_its_gates(home: Path, seen: dict[str, Any]) -> None:
    assert len(seen["statuses"]) == 9
    assert set(seen["statuses"].values()) == {0}
    for run in ("qlora", "lora"):
        gates = result(home / "home" / "runs" / run, "verify")["gates"]
        assert gates.keys() == {"structure", "fidelity", "quality"}
        assert all(gate["passed"] for gate in gates.values()), gates
    assert result(home / "home" / "runs" / "qlora", "merge")["losses"].keys() == {"adapter", "16-bit", "dequantised"}


def test_layers_are_in_four_bits_products_in_bf16_and_adapters_in_fp32(seen: dict[str, Any]) -> None:
    assert {name: steps["layers"] for name, steps in seen["steps"].items()} == {
        "qlora/sft": ["Linear4bit"],
        "qlora/dpo": ["Linear4bit"],
        "kto/kto": ["Linear4bit"],
        "lora/sft": ["Linear"],
    }
    for name, steps in seen["steps"].items():
        assert steps["fused"] == ["Linear" if name == "lora/sft" else "Linear4bit", "MistralMLP", "MistralRMSNorm"]
        assert (steps["adapter"], steps["gradients"]) == (["torch.float32"], ["torch.float32"])
        assert steps["products"] == ["torch.bfloat16"], "no copy of what an adapter is given is kept in fp32"
        assert steps["pinned"] == ["True"]


def test_rows_are_packed(seen: dict[str, Any]) -> None:
    assert seen["packed"].keys() == {"qlora/sft", "lora/sft"}
    assert all(max(rows) > 1 for rows in seen["packed"].values())


def test_the_reference_is_what_the_stage_begins_with(home: Path) -> None:
    before = next(event for event in events(home / "home" / "runs" / "qlora", "eval") if event["stage"] == "dpo")
    assert before["loss"] == pytest.approx(math.log(2), abs=0.02)


def test_the_forecast_is_one_for_a_gpu(seen: dict[str, Any]) -> None:
    assert seen["constants"] == {
        **dict.fromkeys(("SLACK", "SLACK_TWICE", "LOGITS_SLACK"), 1.0),
        "CHECKPOINTED": [4, 2, 1],
        "SMALLER_PASSES": [1024],
        "LARGER_PASSES": [4096, 8192],
        "MICRO_BATCH_TOKENS": 2048,
    }
    advice = seen["advice"]
    assert (advice["fits"], advice["memory"]["overhead"], advice["gradient_checkpointing"]) == (False, 0, True)


def test_the_card_passes_its_checks_and_the_embedded_engine_answers(seen: dict[str, Any]) -> None:
    assert seen["failed_checks"] == []
    assert seen["answer"] == 8
