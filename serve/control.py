"""The control API: typed routes and server-sent events on a unix socket, for the CLI and the TUI."""

from __future__ import annotations

import asyncio
import codecs
import json
import os
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Header, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel

from appliance import __version__, api, hardware
from appliance.data.dataset import Dataset
from appliance.data.tokenizer import thinking_switches
from appliance.errors import ApplianceError, InvalidInput, NotFound
from appliance.home import Home, disk_error, require_space
from appliance.models import count_parameters, list_models, model_path, require_trainable, template_and_end
from appliance.recipes import shipped_recipes
from appliance.release.lineage import copy_start, going_on
from appliance.store.datasets import Datasets
from appliance.store.keys import Keys
from appliance.store.runs import ACTIVE
from appliance.supervisor.engines import Room
from appliance.supervisor.queueing import queueing
from appliance.supervisor.supervisor import Supervisor
from appliance.train.dry_run import DryRunRequest
from appliance.train.events import EventLog
from appliance.train.fit import require_fit
from appliance.train.recipe import Recipe, dump_recipe, parse_recipe
from serve.datasets import datasets_router, run_module
from serve.releases import release_routes, warn_of_fp8

_FOLLOW_SECONDS = 0.25
_BEAT_SECONDS = 15.0


def _thinking(inherited: Literal["auto", "on", "off"], thoughts: Sequence[int | None]) -> Literal["auto", "on", "off"]:
    """Whether a model thinks whose recipe leaves it open: by the rows with a thought in each dataset, None where an
    earlier version has not counted them, and by the release that it goes on from."""
    if any(thoughts):
        return "on"
    return "off" if inherited == "auto" and None not in thoughts else inherited


class NewRun(BaseModel):
    """`recipe` is TOML text."""

    recipe: str


class NewKey(BaseModel):
    name: str


def control_app(
    home: Home,
    db: sqlite3.Connection,
    supervisor: Supervisor,
    keys: Keys,
    endpoint: str,
    chat: Any,
) -> FastAPI:
    """The control API. `endpoint` is the chat endpoint's URL; `chat` the gateway's ASGI app without keys."""
    app = FastAPI(title="appliance control", version=__version__, docs_url=None, redoc_url=None)
    datasets = Datasets(db)
    runs, releases = supervisor.runs, supervisor.releases

    @app.exception_handler(ApplianceError)
    async def _problem(request: Request, error: ApplianceError) -> JSONResponse:
        return JSONResponse(_body(error), status_code=error.status)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        problem = InvalidInput(
            "bad_request", f"{where}: {first['msg']}", "see the control API's schema at /openapi.json"
        )
        return JSONResponse(_body(problem), status_code=problem.status)

    @app.exception_handler(OSError)
    async def _disk(request: Request, error: OSError) -> JSONResponse:
        problem = disk_error(error, home.root)
        return JSONResponse(_body(problem), status_code=problem.status)

    @app.get("/v1/status")
    async def status() -> api.Status:
        active = runs.active()
        return api.Status(
            version=__version__,
            home=str(home.root),
            endpoint=endpoint,
            live=releases.live(),
            routed=supervisor.routed,
            canary=supervisor.trial.status(),
            unmerged=supervisor.adapter_status(),
            engines=supervisor.engines.shown(),
            setback=releases.setback(),
            checks=supervisor.checks.shown(),
            lease="exclusive" if supervisor.exclusive else "share",
            queued=sum(run.state == "queued" for run in active),
            running=next((run.id for run in active if run.state != "queued"), None),
            hardware=hardware.measure(home.root),
        )

    @app.get("/v1/models")
    def models() -> list[api.Model]:
        return list_models(home)

    @app.get("/v1/recipes")
    def recipes() -> list[api.ShippedRecipe]:
        return shipped_recipes()

    def complete(text: str) -> Recipe:
        """The recipe with its datasets by id and its learning rates. Raises ApplianceError where it cannot be run."""
        recipe = parse_recipe(text)
        if recipe.given:
            raise InvalidInput("given_adapter", "the recipe has a given adapter", "use `appliance merge --adapter DIR`")
        if recipe.rechecks:
            raise InvalidInput("rechecks", "the recipe names a release", "use `appliance verify RELEASE --gates`")
        base = model_path(home, recipe.base)
        if recipe.stages:
            require_trainable(base, quantised=recipe.quantised, experts=bool(recipe.adapter.target_parameters))
        asked = recipe.thinking
        recipe = going_on(home, recipe, base).for_base(count_parameters(base))
        found = [datasets.find(stage.dataset) for stage in recipe.stages]
        for stage, dataset in zip(recipe.stages, found, strict=True):
            require_fit(stage, Dataset.open(home, dataset.id), recipe.base, dataset.name)
        stages = tuple(
            stage.model_copy(update={"dataset": dataset.id})
            for stage, dataset in zip(recipe.stages, found, strict=True)
        )
        if asked == "auto" and stages and thinking_switches(template_and_end(base)[0]):
            counts = [Dataset.open(home, dataset.id).report.get("thoughts") for dataset in found]
            recipe = recipe.model_copy(update={"thinking": _thinking(recipe.thinking, counts)})
        return recipe.model_copy(update={"stages": stages})

    def room_to_serve(recipe: Recipe) -> Room | None:
        """What the recipe's release takes to be served; None where it makes none."""
        return supervisor.engines.kind.room(model_path(home, recipe.base)) if recipe.end == "release" else None

    @app.post("/v1/forecasts")
    async def forecast(request: Request, new: NewRun) -> api.Forecasts:
        """What each training stage of a recipe would take, and serving its release, without a run."""
        recipe = complete(new.recipe)
        room = room_to_serve(recipe)
        freed = supervisor.engines.held() if supervisor.exclusive else 0
        asked = DryRunRequest(recipe=dump_recipe(recipe), freed=freed)
        with tempfile.TemporaryDirectory(dir=home.incoming) as folder:
            outcome = await run_module("appliance.train.dry_run", home, asked, Path(folder), request)
        serving = room and api.Serving(
            needed=room.needed, available=room.available, fits=room.suffices, precision=room.precision
        )
        return api.Forecasts(stages=outcome["stages"], serving=serving)

    @app.post("/v1/runs")
    async def train(new: NewRun) -> api.Run:
        recipe = complete(new.recipe)
        room = room_to_serve(recipe)
        if room:
            room.require(recipe.base)
        weights = sum(file.stat().st_size for file in model_path(home, recipe.base).glob("*.safetensors"))
        require_space(home.root, 2 * weights, "a run with its checkpoints and its release")
        with queueing(home, runs, recipe) as (id, directory):
            copy_start(home, recipe, directory)
            if room:
                warn_of_fp8(directory, recipe, room)
        supervisor.poke()
        return runs.get(id)

    @app.get("/v1/runs")
    async def all_runs() -> list[api.Run]:
        return runs.all()

    @app.get("/v1/runs/{id}")
    async def run(id: str) -> api.Run:
        return runs.get(id)

    @app.post("/v1/runs/{id}/stop")
    async def stop(id: str, how: api.StopWish = "pause") -> api.Run:
        return supervisor.stop(id, how)

    @app.post("/v1/runs/{id}/resume")
    async def resume(id: str) -> api.Run:
        return supervisor.resume(id)

    @app.post("/v1/runs/{id}/promote-adapter")
    async def promote_adapter(id: str) -> api.Unmerged:
        return await supervisor.promote_adapter(id)

    @app.get("/v1/runs/{id}/events")
    async def events(id: str, after: int = 0) -> list[dict[str, Any]]:
        runs.get(id)
        return await asyncio.to_thread(EventLog(home.runs / id / "events.jsonl").read, after)

    @app.get("/v1/runs/{id}/events/stream")
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

        return _event_stream(id, fresh)

    @app.get("/v1/runs/{id}/log")
    async def run_log(id: str, lines: int = 200) -> str:
        runs.get(id)
        return await asyncio.to_thread(_tail, home.runs / id / "log.txt", lines)

    @app.get("/v1/runs/{id}/log/stream")
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

        return _event_stream(id, fresh)

    @app.get("/v1/engines/{release}/log")
    async def engine_log(release: str, lines: int = 200) -> str:
        """The last lines that the engines of a release have written."""
        log = supervisor.engines.log(release)
        if not log.exists():
            raise NotFound("no_engine_log", f"no engine has run for {release!r}", "see `appliance releases`")
        return await asyncio.to_thread(_tail, log, lines)

    app.include_router(release_routes(home, supervisor, datasets))

    @app.get("/v1/keys")
    async def all_keys() -> list[api.Key]:
        return keys.all()

    @app.post("/v1/keys")
    async def create_key(new: NewKey) -> api.NewKey:
        return keys.create(new.name)

    @app.delete("/v1/keys/{id}")
    async def revoke_key(id: str) -> api.Key:
        return keys.revoke(id)

    def _event_stream(id: str, fresh: Callable[[], list[str]]) -> StreamingResponse:
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

    app.include_router(datasets_router(home, datasets, runs))
    app.mount("/", chat)
    return app


def _body(error: ApplianceError) -> dict[str, Any]:
    return api.Problem(code=error.code, message=error.message, next=error.next).model_dump()


def _tail(path: Path, lines: int) -> str:
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
