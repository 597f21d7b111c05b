"""The main job from start to end: pull, import, train (SFT, then DPO), merge, verify, serve, ask.

`make demo` runs it. Progress goes to stderr; the last line on stdout is one JSON object.
`KEEP=1` leaves the daemon running, `APPLIANCE_HOME` moves its home (default: .demo in the checkout).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from appliance.cli.console import say
from appliance.client import Client
from appliance.errors import ApplianceError, Unreachable
from appliance.home import Home
from appliance.sources import find_sources
from appliance.words import event_line

EXAMPLES = Path(__file__).parent
BASE = "smollm2-135m"
ENOUGH = 4
COMMAND = [sys.executable, "-m", "appliance.cli"]


class Daemon:
    """The daemon that the demo starts, and starts again should it die."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {**os.environ, "APPLIANCE_HOME": str(home), "APPLIANCE_PORT": str(_free_port(8080))}
        self.socket = Home(home, os.environ.get("APPLIANCE_SOCKET", "")).control_socket()
        self._process: subprocess.Popen[bytes] | None = None

    def ensure(self) -> None:
        """Start it unless it runs. Raises ApplianceError where it ends at once."""
        if self._process is not None and self._process.poll() is None:
            return
        if self._process is not None:
            say(f"the daemon ended with status {self._process.returncode}; starting it again")
        with open(self.home / "daemon.log", "ab") as log:
            self._process = subprocess.Popen(
                [*COMMAND, "serve"], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        time.sleep(0.5)
        if self._process.poll() is not None:
            last = (self.home / "daemon.log").read_text().strip().splitlines()[-1]
            raise ApplianceError("no_daemon", f"the daemon did not start: {last}", f"see {self.home / 'daemon.log'}")

    def stop(self) -> None:
        """Stop it with all that it started, and wait."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(90)

    async def follow(self, client: Client, run: str) -> AsyncIterator[dict[str, Any]]:
        """The events of a run to its end, through deaths of the daemon."""
        seen = 0
        while True:
            try:
                async for event in client.follow(run, seen):
                    seen = event["seq"]
                    yield event
                if (await client.run(run)).state in ("finished", "failed", "stopped"):
                    return
            except Unreachable:
                await asyncio.sleep(0.5)
                self.ensure()


class Clock:
    """Seconds that each named part took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def time(self, part: str) -> Iterator[None]:
        say(f"== {part}")
        began = time.monotonic()
        yield
        self.seconds[part] = round(time.monotonic() - began, 1)


async def demo(daemon: Daemon, clock: Clock, keep: bool) -> int:
    """The whole job; the exit status."""
    questions = json.loads((EXAMPLES / "questions.json").read_text())
    async with Client(daemon.socket) as client:
        while True:
            try:
                endpoint = (await client.status()).endpoint
                break
            except Unreachable:
                daemon.ensure()
                await asyncio.sleep(0.2)
        with clock.time("import"):
            for file, name in (("facts.json", "facts"), ("preferences.jsonl", "preferences")):
                report = await client.import_dataset(find_sources([str(EXAMPLES / file)]), name)
                say(f"{file}: {report['kept']} of {report['rows_in']} rows kept as {report['id']}")
        key = (await client.create_key("demo")).key
        with clock.time("base"):
            await _release(client, daemon, "base", clock)
        with clock.time("ask base"):
            before = [_ask(endpoint, key, question["question"]) for question in questions]
        with clock.time("train to live"):
            run, losses = await _release(client, daemon, "demo", clock)
        with clock.time("ask live"):
            after = [_ask(endpoint, key, question["question"]) for question in questions]
        manifest = await client.manifest(run)
        status = await client.status()
    right = _print_comparison(questions, before, after)
    gates = {name: bool(gate["passed"]) for name, gate in manifest["gates"].items()}
    print(
        "held-out loss  " + "  ".join(f"{stage}: {first:.3f} -> {last:.3f}" for stage, (first, last) in losses.items())
    )
    print(
        "gates          " + "  ".join(f"{name}: {'passed' if passed else 'FAILED'}" for name, passed in gates.items())
    )
    print("seconds        " + "  ".join(f"{part}: {seconds:.0f}" for part, seconds in clock.seconds.items()))
    if keep:
        print(f"\nchat endpoint  {endpoint}/chat/completions\nAPI key        {key}")
        print(f"dashboard      APPLIANCE_HOME={shlex.quote(str(daemon.home))} {shlex.join([*COMMAND, 'tui'])}")
        print(f"stop it        kill {daemon._process.pid if daemon._process else ''}")
    summary = {
        "right": right,
        "asked": len(questions),
        "gates": gates,
        "seconds": clock.seconds,
        "engine": status.engines[0].kind,
    }
    print(json.dumps(summary), flush=True)
    return 0 if right >= ENOUGH and all(gates.values()) else 1


async def _release(
    client: Client, daemon: Daemon, recipe: str, clock: Clock
) -> tuple[str, dict[str, tuple[float, float]]]:
    """Run a shipped recipe until its release answers: its id, and each stage's first and last held-out loss."""
    run = await client.train((EXAMPLES / "recipes" / f"{recipe}.toml").read_text())
    losses: dict[str, tuple[float, float]] = {}
    async for event in daemon.follow(client, run.id):
        say(event_line(event))
        if event["event"] == "eval":
            first, _ = losses.get(event["stage"], (event["loss"], 0.0))
            losses[event["stage"]] = (first, event["loss"])
        if event["event"] == "stage_finished" and recipe == "demo":
            clock.seconds[event["stage"]] = round(event["seconds"], 1)
    ended = await client.run(run.id)
    if ended.state != "finished" or ended.reason:
        raise ApplianceError(
            "run_ended", f"the run {run.id} {ended.state}: {ended.reason}", ended.next or "see its log"
        )
    deadline = time.monotonic() + 900
    while (await client.status()).routed != run.id:
        if time.monotonic() > deadline:
            raise ApplianceError("not_live", f"the release {run.id} does not answer", f"see {daemon.home / 'engines'}")
        await asyncio.sleep(0.2)
    return run.id, losses


def _ask(endpoint: str, key: str, question: str) -> str:
    """One greedy answer through the public endpoint, tried again while an engine comes back."""
    body = {"model": "live", "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 80}
    request = urllib.request.Request(
        f"{endpoint}/chat/completions",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    for _ in range(60):
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return str(json.load(response)["choices"][0]["message"]["content"]).strip()
        except (urllib.error.URLError, ConnectionError) as error:
            say(f"no answer yet: {error}")
            time.sleep(2)
    raise ApplianceError("no_answer", "the endpoint does not answer", "see the daemon's log")


def _print_comparison(questions: list[dict[str, Any]], before: list[str], after: list[str]) -> int:
    """Base and live model side by side; how many of the live model's answers are right."""
    right = 0
    for question, base, live in zip(questions, before, after, strict=True):
        good = any(accepted.lower() in live.lower() for accepted in question["expect"])
        right += good
        print(f"\n{question['question']}\n  expected: {question['answer']}")
        left = textwrap.wrap(f"base: {base}", 54) or [""]
        other = textwrap.wrap(f"live: {'[right]' if good else '[wrong]'} {live}", 54) or [""]
        for line in range(max(len(left), len(other))):
            print(f"  {left[line] if line < len(left) else '':54}  {other[line] if line < len(other) else ''}".rstrip())
    print(f"\n{right} of {len(questions)} right")
    return right


def _free_port(wanted: int) -> int:
    """`wanted`, or where that is taken, any free one."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> int:
    keep = os.environ.get("KEEP", "") not in ("", "0")
    home = Path(os.environ.get("APPLIANCE_HOME") or EXAMPLES.parent / ".demo").absolute()
    home.mkdir(parents=True, exist_ok=True)
    daemon, clock = Daemon(home), Clock()
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    status = 1
    try:
        with clock.time("pull"):
            if subprocess.run([*COMMAND, "pull", BASE], env=daemon.environment, check=False).returncode:
                raise ApplianceError("no_base", f"could not get {BASE}", "see the line above")
        daemon.ensure()
        status = asyncio.run(demo(daemon, clock, keep))
    except ApplianceError as error:
        say(f"demo: error: {error}")
    except KeyboardInterrupt:
        say("interrupted")
        status = 130
    finally:
        if not (keep and status == 0):
            daemon.stop()
    return status


if __name__ == "__main__":
    sys.exit(main())
