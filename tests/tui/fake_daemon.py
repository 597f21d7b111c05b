"""A daemon with invented data behind the real control API's routes, on a real unix socket.

`python tests/tui/fake_daemon.py SOCKET` runs one by hand, with a training run that goes on for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from invented import BASE_RECIPE, DATASETS, GATES, GIB, RECIPE, STAGES, row


class FakeDaemon:
    """State that tests read and change; `requests` holds every call that changes something."""

    def __init__(self, socket: Path, now: float | None = None) -> None:
        self.socket = socket
        self.now = time.time() if now is None else now
        self.requests: list[tuple[str, str, Any]] = []
        self.events: dict[str, list[dict[str, Any]]] = {}
        self.logs: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.releases: dict[str, dict[str, Any]] = {}
        self.answer = ["Veldora ", "is the **capital** ", "of ", "Ostrava."]
        self.answer_pause = 0.0
        self.lease = "share"
        self.gpus: list[dict[str, Any]] = []
        self.load = 41.0
        self.setback = ""
        self._changed = asyncio.Condition()
        self._server: uvicorn.Server | None = None
        self._serving: asyncio.Task[None] | None = None
        self._seed()

    # Its life

    async def start(self) -> None:
        """Listen; returns when connections are taken."""
        self.socket.unlink(missing_ok=True)
        config = uvicorn.Config(
            self._app(), uds=str(self.socket), log_level="critical", lifespan="off", timeout_graceful_shutdown=0
        )
        self._server = _QuietServer(config)
        self._serving = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Stop listening, and break every connection."""
        if self._server and self._serving:
            self._server.should_exit = self._server.force_exit = True
            await self._serving
            self._server = None
        self.socket.unlink(missing_ok=True)

    # What tests do to it

    async def emit(self, run: str, kind: str, stage: str, **fields: Any) -> None:
        """Append an event to a run, as its worker would."""
        self._emit(run, kind, stage, self.now, **fields)
        await self.announce()

    async def write_log(self, run: str, text: str) -> None:
        self.logs[run] += text
        await self.announce()

    async def announce(self) -> None:
        """Tell the streams that something changed."""
        async with self._changed:
            self._changed.notify_all()

    # Its data

    def _seed(self) -> None:
        self._add_run("facts-3", "running", "dpo", started=self.now - 312)
        self._add_run("facts-2", "finished", "probe", started=self.now - 9500, took=262)
        self._add_run("terse-1", "failed", "sft", started=self.now - 90000, took=41)
        self._add_run("base-1", "finished", "probe", started=self.now - 180000, took=38)
        self.runs["base-1"]["stages"] = STAGES[2:]
        self.runs["terse-1"] |= {
            "reason": "memory ran out in the first step, with the longest batch (8 rows of 1,024 tokens)",
            "next": "set micro_batch_size = 4 in the stage, then start it again",
        }
        self._train("facts-3", started=self.now - 312, dpo_steps=22)
        self._train("facts-2", started=self.now - 9500, dpo_steps=40)
        self._emit("terse-1", "stage_started", "sft", self.now - 90000)
        reason, following = (self.runs["terse-1"][key] for key in ("reason", "next"))
        self._emit("terse-1", "failed", "sft", self.now - 89959, reason=reason, next=following)
        for id, created, live in (("facts-2", self.now - 9200, True), ("base-1", self.now - 179900, False)):
            self._add_release(id, created, live)
        refused = self._add_release("facts-1", self.now - 20000, False)
        refused |= {"state": "refused", "reason": "1 of 8 probes did not stop by itself"}
        refused["gates"]["stopping"] = False

    def _add_run(self, id: str, state: str, stage: str, started: float, took: float | None = None) -> None:
        self.runs[id] = {
            "id": id,
            "recipe": id.rpartition("-")[0],
            "base": "smollm2-135m",
            "state": state,
            "stages": STAGES,
            "stage": stage,
            "created": started - 2,
            "started": started,
            "finished": started + took if took else None,
            "reason": "",
            "next": "",
        }
        self.events[id] = []
        self.logs[id] = ""

    def _add_release(self, id: str, created: float, live: bool) -> dict[str, Any]:
        gates = dict.fromkeys(("structure", "fidelity", "parity", "stopping", "quality"), True)
        self.releases[id] = {
            "id": id,
            "base": "smollm2-135m",
            "state": "verified",
            "created": created,
            "live": live,
            "reason": "",
            "gates": gates,
        }
        return self.releases[id]

    def _emit(self, run: str, kind: str, stage: str, at: float, **fields: Any) -> None:
        events = self.events[run]
        events.append({"seq": len(events) + 1, "time": round(at, 3), "event": kind, "stage": stage, **fields})

    def _train(self, run: str, started: float, dpo_steps: int) -> None:
        """Two stages of training, the second `dpo_steps` of 40 steps far."""
        dice = random.Random(run)
        clock = started
        self._emit(run, "stage_started", "sft", clock)
        self._emit(run, "warning", "sft", clock, message="2 of 98 rows are longer than max_length and were left out")
        for step in range(1, 97):
            clock += 2.2
            loss = 2.55 * math.exp(-step / 17) + 0.34 + dice.gauss(0, 0.26) * (0.5 + math.exp(-step / 40))
            self.step(run, "sft", step, 96, max(loss, 0.05), clock, (96 - step) * 2.2)
            self.logs[run] += f"sft step {step}/96 loss {loss:.4f} 468 tok/s\n"
            if step % 16 == 0:
                held_out = 2.5 * math.exp(-step / 18) + 0.47
                self._emit(run, "eval", "sft", clock, step=step, loss=round(held_out, 4))
            if step % 32 == 0:
                self._emit(run, "checkpoint", "sft", clock, step=step, path=f"sft/checkpoint-{step}")
        self._emit(
            run, "sample", "sft", clock, prompt="Where is the river Oss?", text="The river Oss runs through Veldora."
        )
        self._emit(run, "stage_finished", "sft", clock, seconds=round(clock - started, 1))
        self._emit(run, "stage_started", "dpo", clock)
        for step in range(1, dpo_steps + 1):
            clock += 4.2
            loss = 0.6931 * math.exp(-step / 16) + 0.06 + dice.gauss(0, 0.05)
            self.step(run, "dpo", step, 40, max(loss, 0.01), clock, (40 - step) * 4.2)
            self.logs[run] += f"dpo step {step}/40 loss {loss:.4f} 122 tok/s\n"
            if step % 10 == 0:
                self._emit(run, "eval", "dpo", clock, step=step, loss=round(0.6931 * math.exp(-step / 17) + 0.11, 4))
        if dpo_steps == 40:
            self._emit(run, "stage_finished", "dpo", clock, seconds=168)
            for gate in ("structure", "fidelity", "parity", "stopping", "quality"):
                self._emit(run, "gate", "verify", clock, gate=gate, passed=True, figures=GATES[gate])

    def step(self, run: str, stage: str, step: int, steps: int, loss: float, at: float, eta: float) -> None:
        self._emit(
            run,
            "step",
            stage,
            at,
            step=step,
            steps=steps,
            loss=round(loss, 4),
            lr=1e-3 * (1 - step / (steps + 1)),
            grad_norm=round(0.6 + loss, 3),
            tokens=1024,
            tokens_per_second=468.0 if stage == "sft" else 122.0,
            eta_seconds=round(eta, 1),
            memory=int(2.1 * GIB),
        )

    def status(self) -> dict[str, Any]:
        live = next((id for id, release in self.releases.items() if release["live"]), None)
        running = next((id for id, run in self.runs.items() if run["state"] in ("running", "stopping")), None)
        engine = {"release": live, "kind": "transformers", "state": "ready", "pid": 4242, "restarts": 0}
        return {
            "version": "0.1.0",
            "home": "/var/lib/appliance",
            "endpoint": "http://127.0.0.1:8080/v1",
            "live": live,
            "routed": live,
            "canary": self._canary(),
            "setback": self.setback,
            "engines": [engine] if live else [],
            "lease": self.lease,
            "queued": sum(run["state"] == "queued" for run in self.runs.values()),
            "running": running,
            "hardware": {
                "cores": 16,
                "cpu_load": self.load,
                "memory_total": 64 * GIB,
                "memory_used": 23 * GIB,
                "disk_total": 500 * 10**9,
                "disk_free": 212 * 10**9,
                "gpus": self.gpus,
            },
        }

    # Its routes

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.middleware("http")
        async def remember(request: Request, call_next: Any) -> Any:
            if request.method != "GET":
                body = await request.body()
                self.requests.append((request.method, request.url.path, json.loads(body) if body else None))
            return await call_next(request)

        @app.get("/v1/status")
        async def status() -> Any:
            return self.status()

        @app.get("/v1/recipes")
        async def recipes() -> Any:
            return [
                {"name": "facts", "summary": "QLoRA SFT, then DPO, on the sample files", "text": RECIPE},
                {"name": "base", "summary": "Release the base model as it is", "text": BASE_RECIPE},
            ]

        @app.get("/v1/datasets")
        async def datasets() -> Any:
            return [
                {"id": id, "name": name, "kind": kind, "rows": rows, "created": self.now - 200000}
                for id, name, kind, rows in DATASETS
            ]

        @app.get("/v1/datasets/{id}")
        async def dataset(id: str) -> Any:
            return {"id": id, "kept": 1200, "dropped": [{"line": 17, "reason": "the answer is [/empty]"}]}

        @app.get("/v1/datasets/{id}/rows")
        async def rows(id: str, offset: int, limit: int) -> Any:
            total = next(rows for dataset, _, _, rows in DATASETS if dataset == id)
            chosen = range(offset, min(offset + limit, total))
            return {"total": total, "offset": offset, "rows": [row(index) for index in chosen]}

        @app.get("/v1/datasets/{id}/rendered")
        async def rendered(id: str, offset: int) -> Any:
            pieces = [
                {"text": "<|im_start|>user\n", "trained": False, "special": True},
                {"text": f"Question {offset} [/foo] \x1b[31mred<|im_end|>", "trained": False, "special": False},
                {"text": f"Answer {offset}<|im_end|>", "trained": True, "special": False},
            ]
            broken = {"problem": "it has no end of turn [/x]"}
            return [[{"tokens": 41, "trained": 4, "pieces": pieces}, *([broken] if offset else [])]]

        self._run_routes(app)
        self._release_routes(app)
        return app

    def _run_routes(self, app: FastAPI) -> None:
        @app.get("/v1/runs")
        async def runs() -> Any:
            return sorted(self.runs.values(), key=lambda run: -run["created"])

        @app.post("/v1/runs")
        async def train(body: dict[str, str]) -> Any:
            self._add_run("facts-4", "queued", "sft", self.now)
            self.runs["facts-4"] |= {"started": None, "created": self.now}
            return self.runs["facts-4"]

        @app.get("/v1/runs/{id}")
        async def run(id: str) -> Any:
            return self.runs.get(id) or _problem(404, "no_such_run", f"there is no run {id!r}", "see `appliance runs`")

        @app.post("/v1/runs/{id}/{verb}")
        async def change(id: str, verb: str) -> Any:
            self.runs[id] |= {"state": "stopping"} if verb == "stop" else {"state": "queued", "finished": None}
            await self.announce()
            return self.runs[id]

        @app.get("/v1/runs/{id}/events")
        async def events(id: str, after: int = 0) -> Any:
            return self.events[id][after:]

        @app.get("/v1/runs/{id}/events/stream")
        async def follow(id: str, request: Request) -> Any:
            position = int(request.headers["last-event-id"])

            def fresh() -> Iterator[str]:
                nonlocal position
                for event in self.events[id][position:]:
                    position = event["seq"]
                    yield json.dumps(event, ensure_ascii=False)

            return self._stream(id, fresh)

        @app.get("/v1/runs/{id}/log/stream")
        async def follow_log(id: str) -> Any:
            position = 0

            def fresh() -> Iterator[str]:
                nonlocal position
                piece, position = self.logs[id][position:], len(self.logs[id])
                if piece:
                    yield json.dumps(piece, ensure_ascii=False)

            return self._stream(id, fresh)

    def _release_routes(self, app: FastAPI) -> None:
        @app.get("/v1/releases")
        async def releases() -> Any:
            return sorted(self.releases.values(), key=lambda release: -release["created"])

        @app.get("/v1/releases/{id}")
        async def manifest(id: str) -> Any:
            return {
                "release": id,
                "base": "smollm2-135m",
                "merge_base": "de-quantised",
                "files": {"model.safetensors": {"bytes": 269060552, "sha256": "9c1f" * 16}},
                "gates": {
                    name: {"passed": passed, "figures": GATES[name], "reason": f"{name} was measured"}
                    for name, passed in self.releases[id]["gates"].items()
                },
            }

        @app.post("/v1/releases/{id}/promote")
        async def promote(id: str, canary: float | None = None) -> Any:
            if canary:
                live = self.status()["live"]
                self.releases[id]["canary"] = {"release": id, "live": live, "share": canary, "since": self.now}
                return self.releases[id]
            if self.releases[id]["state"] == "refused":
                return _problem(409, "refused", f"{id} was refused", "train again")
            return self._make_live(id)

        @app.post("/v1/rollback")
        async def rollback() -> Any:
            if tried := self._canary():
                tried |= {"ended": self.now, "outcome": "rolled back", "reason": "by hand"}
                return self.releases[tried["live"]]
            return self._make_live("base-1")

        @app.post("/v1/chat/completions")
        async def chat(body: dict[str, Any]) -> Any:
            if not any(release["live"] for release in self.releases.values()):
                return _problem(503, "no_live_release", "no release is live", "promote one")
            return StreamingResponse(self._answer(), media_type="text/event-stream")

    def _canary(self) -> dict[str, Any] | None:
        """The one under way."""
        tried = (release.get("canary") for release in self.releases.values())
        return next((canary for canary in tried if canary and "ended" not in canary), None)

    def _make_live(self, id: str) -> dict[str, Any]:
        for release in self.releases.values():
            release["live"] = release["id"] == id
        return self.releases[id]

    async def _answer(self) -> AsyncIterator[str]:
        for piece in self.answer:
            await asyncio.sleep(self.answer_pause)
            yield f"data: {json.dumps({'choices': [{'delta': {'content': piece}}]})}\n\n"
        yield "data: [DONE]\n\n"

    def _stream(self, run: str, fresh: Any) -> StreamingResponse:
        async def messages() -> AsyncIterator[str]:
            while True:
                ended = self.runs[run]["state"] not in ("queued", "running", "stopping")
                for data in fresh():
                    yield f"data: {data}\n\n"
                if ended:
                    return
                async with self._changed:
                    await self._changed.wait()

        return StreamingResponse(messages(), media_type="text/event-stream")


class _QuietServer(uvicorn.Server):
    """Leaves the process's signals alone."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _problem(status: int, code: str, message: str, following: str) -> JSONResponse:
    return JSONResponse({"code": code, "message": message, "next": following}, status_code=status)


async def _go_on(daemon: FakeDaemon) -> None:
    """The run that is running goes on, for ever."""
    step = 22
    while True:
        await asyncio.sleep(1)
        step, daemon.now, daemon.load = step + 1, time.time(), random.uniform(30, 99)
        if daemon.runs["facts-3"]["state"] == "running":
            loss = 0.6931 * math.exp(-step / 16) + 0.06 + random.gauss(0, 0.025)
            daemon.step("facts-3", "dpo", step, max(40, step + 5), loss, daemon.now, 60)
            daemon.logs["facts-3"] += f"dpo step {step}/40 loss {loss:.4f} 122 tok/s\n"
        if daemon.runs["facts-3"]["state"] == "stopping":
            daemon.runs["facts-3"] |= {"state": "stopped", "finished": time.time()}
        await daemon.announce()


async def _main(socket: Path) -> None:
    daemon = FakeDaemon(socket)
    daemon.answer_pause = 0.2
    await daemon.start()
    print(f"listening on {socket}", flush=True)
    await _go_on(daemon)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1])))
