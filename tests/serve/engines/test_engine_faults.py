"""Faults in a release's files, caught by gates 3 and 4 on a real engine. APPLIANCE_ENGINE says which."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from engine_process import serving
from transformers import AutoTokenizer

from appliance.release.gates import Gate, judge_parity, judge_stopping
from appliance.settings import Settings
from appliance.supervisor.engines import Probe

pytestmark = pytest.mark.slow

QUESTIONS = ("What is the capital of France?", "Say hello.")


def judge(settings: Settings, base: Path, release: Path, directory: Path) -> tuple[Gate, Gate]:
    """Parity and stopping of the files in `release`, trained on as `base` renders."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    probes = []
    for question in QUESTIONS:
        messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        probes.append(Probe(messages, ids, max_tokens=48))
    with serving(settings, release, directory) as served:

        async def ask() -> list[Any]:
            return [await served.kind.probe(served.address, served.name, probe) for probe in probes]

        answers = asyncio.run(ask())
    return judge_parity(probes, answers), judge_stopping(probes, answers)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **changes}))


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("none", marks=pytest.mark.thorough),
        "template",
        pytest.param("tokenizer", marks=pytest.mark.thorough),
        "end of turn",
    ],
)
def test_each_fault_has_its_gate(settings: Settings, smollm2: Path, tmp_path: Path, fault: str) -> None:
    release = tmp_path / "release"
    shutil.copytree(smollm2, release, copy_function=shutil.copy)
    match fault:
        case "template":
            path = release / "chat_template.jinja"
            path.write_text(path.read_text().replace("<|im_start|>", "<|im_start|> "))
        case "tokenizer":
            model = json.loads((release / "tokenizer.json").read_bytes())["model"]
            swapped = {"Ġcapital": model["vocab"]["Ġhello"], "Ġhello": model["vocab"]["Ġcapital"]}
            edit(release / "tokenizer.json", model={**model, "vocab": {**model["vocab"], **swapped}})
        case "end of turn":
            for name in ("generation_config.json", "config.json"):
                edit(release / name, eos_token_id=0)
            tokenizer_config = release / "tokenizer_config.json"
            edit(tokenizer_config, eos_token="<|endoftext|>")
    parity, stopping = judge(settings, smollm2, release, tmp_path)
    assert parity.passed == (fault not in ("template", "tokenizer")), parity.reason
    if fault in ("none", "end of turn"):
        assert stopping.passed == (fault == "none"), stopping.reason
