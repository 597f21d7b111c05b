"""A newly trained adapter that answers before it is merged, against waiting for its release: `make bench-adapter`.

    python bench/adapter.py [--rounds N] [--clients N] [--base DIRECTORY]

On vLLM. The live release has an adapter of its own merged in, so that what is served is the difference of the two.
Times are taken from the promotion to the answer that the adapter is live, and to the first token of a new request,
while the merge works beside. From then on clients stream without pause until its release has taken over. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import aiohttp
from box import EXAMPLES, Box, box
from swap import BASE, QUESTIONS, TRAINED, Asker, Load, machine, stream_without_pause

from appliance.sources import find_sources

TARGETS = {"failed": 0, "seconds": 1.0, "sooner": 3.0}
"""Failed requests and seconds until it is live at most; how many times sooner than its release a token comes."""
RANK = 32


async def measure(rounds: int, clients: int, model: Path) -> dict[str, Any]:
    """Figures of `rounds` runs, each on top of the same release."""
    os.environ |= {"APPLIANCE_ENGINE": "vllm", "APPLIANCE_ADAPTER_RANK": str(RANK), "APPLIANCE_LEASE": "share"}
    timeout = aiohttp.ClientTimeout(total=300)
    load = Load()
    figures: list[dict[str, float]] = []
    async with (
        box(model) as running,
        aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        await running.client.import_dataset(find_sources([str(EXAMPLES / "facts.json")]), "facts")
        await running.until_live((await running.client.train(BASE)).id, 900)
        # Trained for less, so that the quality gate lets what is trained for longer go live in its place.
        first = (await running.client.train("promote = true" + TRAINED.replace("max_steps = 12", "max_steps = 4"))).id
        endpoint = (await running.client.status()).endpoint
        asker = Asker(session, endpoint, (await running.client.create_key("bench")).key)
        expected: dict[str, dict[str, str]] = {question: {} for question in QUESTIONS}
        for number in range(rounds):
            if number:
                await running.client.promote(first)
            await running.until_live(first, 900)
            figures.append(await _one(running, asker, load, expected, number, clients))
            print(f"round {number + 1}: {figures[-1]}", flush=True)
    print("\n".join(load.failed[:10]), flush=True)
    medians = {name: round(statistics.median(one[name] for one in figures), 2) for name in figures[0]}
    return medians | {"rounds": rounds, "answers": load.answers.total(), "failed": len(load.failed)}


async def _one(
    running: Box, asker: Asker, load: Load, expected: dict[str, dict[str, str]], number: int, clients: int
) -> dict[str, float]:
    run = (await running.client.train(f"seed = {number}\n{TRAINED}")).id

    async def trained() -> bool:
        return (await running.client.run(run)).stage == "merge"

    await running.until("the end of training", trained, 900, run)
    begun, at = time.monotonic(), list[float]()
    name = (await running.client.promote_adapter(run)).name
    live = time.monotonic() - begun
    model, _ = await asker.ask(QUESTIONS[0], at)
    assert model == name, f"{model} answers in place of {name}"
    done = asyncio.Event()
    tasks = [asyncio.create_task(stream_without_pause(asker, each, expected, load, done)) for each in range(clients)]
    said = [await asker.ask(question, []) for question in QUESTIONS]

    async def taken_over() -> bool:
        return (await running.client.status()).routed == run

    await running.until("the merged release", taken_over, 600, run)
    merged: list[float] = []
    await asker.ask(QUESTIONS[0], merged)
    done.set()
    await asyncio.gather(*tasks)
    says = [await asker.ask(question, []) for question in QUESTIONS]
    assert {model for model, _ in says} == {run}
    same = sum(one == other for (_, one), (_, other) in zip(said, says, strict=True))
    return {
        "live_s": round(live, 3),
        "adapter_s": round(at[0] - begun, 3),
        "release_s": round(merged[0] - begun, 3),
        "same_answers": same / len(QUESTIONS),
    }


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--clients", type=int, default=4)
    arguments.add_argument("--base", type=Path, default=Path(".cache/home/models/smollm2-135m"))
    given = arguments.parse_args()
    found = asyncio.run(measure(given.rounds, given.clients, given.base.resolve()))
    sooner = round(found["release_s"] / found["adapter_s"], 1)
    ratios = {"failed": found["failed"], "seconds": found["live_s"], "sooner": sooner}
    met = found["failed"] == 0 and found["live_s"] <= TARGETS["seconds"] and sooner >= TARGETS["sooner"]
    record = {"bench": "adapter", "ratios": ratios, "targets": TARGETS, "met": met, "machine": machine()}
    print(json.dumps(record | {"figures": found}))


if __name__ == "__main__":
    main()
