"""The whole loop on the real small model: SFT -> DPO -> merge -> verify -> serve -> chat, by real processes."""

from __future__ import annotations

import os
from pathlib import Path

import openai
import pytest
from box import EXAMPLES, Box, box

from appliance.release.manifest import read_manifest
from appliance.sources import find_sources

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

RECIPE = """
name = "loop"
base = "smollm2-135m"
promote = true

[[stages]]
method = "sft"
dataset = "facts"
learning_rate = 1e-3
epochs = 1
batch_size = 8
schedule = "constant"
evaluate_every = 100

[[stages]]
method = "dpo"
dataset = "preferences"
max_steps = 2
batch_size = 4
evaluate_every = 100
"""


async def prepare(running: Box) -> None:
    await running.client.import_dataset(find_sources([str(EXAMPLES / "facts.json")]), "facts")
    await running.client.import_dataset(find_sources([str(EXAMPLES / "preferences.jsonl")]), "preferences")


async def test_from_a_local_file_to_an_answer(smollm2: Path) -> None:
    async with box(smollm2) as running:
        await prepare(running)
        run = (await running.client.train(RECIPE)).id
        await running.until_live(run, 900)
        figures = read_manifest(running.home, run)["gates"]["fidelity"]["figures"]
        assert ("served" in figures) == (os.environ.get("APPLIANCE_ENGINE") == "vllm"), "which says log-probabilities"

        events = await running.client.events(run)
        assert [event["stage"] for event in events if event["event"] == "stage_finished"] == [
            "sft",
            "dpo",
            "merge",
            "verify",
            "probe",
        ]
        held_out = [event["loss"] for event in events if event["event"] == "eval" and event["stage"] == "sft"]
        assert held_out[-1] < held_out[0] - 0.1
        first_dpo = next(event for event in events if event["event"] == "step" and event["stage"] == "dpo")
        assert first_dpo["loss"] == pytest.approx(0.6931, abs=0.01)

        status = await running.client.status()
        key = (await running.client.create_key("test")).key
        async with openai.AsyncOpenAI(base_url=status.endpoint, api_key=key) as chat:
            assert run in [model.id async for model in chat.models.list()]
            answer = await chat.chat.completions.create(
                model="live", messages=[{"role": "user", "content": "Say hello."}], temperature=0, max_tokens=24
            )
            assert answer.choices[0].message.content
            assert answer.model == run
        async with openai.AsyncOpenAI(base_url=status.endpoint, api_key="sk-wrong", max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()

        pieces = [
            piece async for piece in running.client.chat([{"role": "user", "content": "Say hello."}], max_tokens=8)
        ]
        assert "".join(pieces)
