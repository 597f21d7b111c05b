"""Runs: queueing, listing, stopping and resuming, and what they say as it comes."""

from __future__ import annotations

import asyncio
import codecs
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from appliance import api
from appliance.api import ACTIVE
from appliance.home import Home
from appliance.store.runs import Runs
from appliance.supervisor.supervisor import Supervisor
from appliance.train.events import EventLog
from serve.control.submission import Submission

_FOLLOW_SECONDS = 0.25
_BEAT_SECONDS = 15.0


class NewRun(BaseModel):
    """`recipe` is TOML text."""

    recipe: str


def runs_router(home: Home, supervisor: Supervisor, submission: Submission) -> APIRouter:
    """Queue runs, and change what is queued."""
    routes = APIRouter()
    runs = supervisor.runs

    @routes.post("/v1/forecasts")
    async def forecast(request: Request, new: NewRun) -> api.Forecasts:
        """What each training stage of a recipe would take, and serving its release, without a run."""
        return await submission.forecast(new.recipe, request)

    @routes.post("/v1/runs")
    async def train(request: Request, new: NewRun) -> api.Run:
        run = await submission.queue(new.recipe, request)
        supervisor.poke()
        return run

    @routes.get("/v1/runs")
    async def newest(limit: Annotated[int, Query(ge=1, le=1000)] = 200, before: str | None = None) -> list[api.Run]:
        """Newest first; with `before`, those that were queued before that run."""
        return runs.newest(limit, before)

    @routes.get("/v1/runs/{id}")
    async def run(id: str) -> api.Run:
        return runs.get(id)

    @routes.post("/v1/runs/{id}/stop")
    async def stop(id: str, how: api.StopWish = "pause") -> api.Run:
        return supervisor.stop(id, how)

    @routes.post("/v1/runs/{id}/resume")
    async def resume(id: str) -> api.Run:
        return supervisor.resume(id)

    @routes.post("/v1/runs/{id}/promote-adapter")
    async def promote_adapter(id: str) -> api.Unmerged:
        return await supervisor.promote_adapter(id)

    return routes


def following_router(home: Home, runs: Runs) -> APIRouter:
    """The events and the log of a run: what there is, and what comes."""
    routes = APIRouter()

    @routes.get("/v1/runs/{id}/events")
    async def events(id: str, after: int = 0) -> list[dict[str, Any]]:
        runs.get(id)
        return await asyncio.to_thread(EventLog(home.runs / id / "events.jsonl").read, after)

    @routes.get("/v1/runs/{id}/events/stream")
    async def follow(id: str, last_event_id: Annotated[int, Header()] = 0) -> StreamingResponse:
        runs.get(id)
        log, position = EventLog(home.runs / id / "events.jsonl"), 0

        def fresh() -> list[str]:
            nonlocal position
            news, position = log.read_from(position)
            return [
                f"id: {event['seq']}\nevent: {event['event']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"
                for event in news
                if event["seq"] > last_event_id
            ]

        return _event_stream(runs, id, fresh)

    @routes.get("/v1/runs/{id}/log")
    async def run_log(id: str, lines: int = 200) -> str:
        runs.get(id)
        return await asyncio.to_thread(tail, home.runs / id / "log.txt", lines)

    @routes.get("/v1/runs/{id}/log/stream")
    async def follow_log(id: str) -> StreamingResponse:
        runs.get(id)
        path, position = home.runs / id / "log.txt", 0
        decoder = codecs.getincrementaldecoder("utf-8")("replace")

        def fresh() -> list[str]:
            nonlocal position
            piece = _read_from(path, position)
            position += len(piece)
            text = decoder.decode(piece)
            return [f"data: {json.dumps(text, ensure_ascii=False)}\n\n"] if text else []

        return _event_stream(runs, id, fresh)

    return routes


def _event_stream(runs: Runs, id: str, fresh: Callable[[], list[str]]) -> StreamingResponse:
    """Server-sent events: what `fresh` returns, as it comes, until the run has ended and all is said."""

    async def messages() -> AsyncIterator[str]:
        spoke = time.monotonic()
        while True:
            ended = runs.get(id).state not in ACTIVE
            news = await asyncio.to_thread(fresh)
            for message in news:
                yield message
            if news:
                spoke = time.monotonic()
            elif ended:
                return
            elif time.monotonic() - spoke > _BEAT_SECONDS:
                spoke = time.monotonic()
                yield ": still here\n\n"
            else:
                await asyncio.sleep(_FOLLOW_SECONDS)

    return StreamingResponse(messages(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def tail(path: Path, lines: int) -> str:
    """The last `lines` lines, read from the end."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 400 * max(lines, 1)))
            text = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    return "\n".join(text.splitlines()[-max(lines, 1) :])


def _read_from(path: Path, position: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(position)
            return file.read(1 << 16)
    except FileNotFoundError:
        return b""
