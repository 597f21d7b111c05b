"""The control API's routes about releases: looking, going live and back, merging, export and import, clearing up."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse

from appliance import api
from appliance.adapters import CONFIG, WEIGHTS, About, require_meant_for
from appliance.archive import MANIFEST, unpack
from appliance.errors import Conflict, InvalidInput, NotFound
from appliance.garbage import find_garbage, forget_garbage, remove_garbage
from appliance.home import NAME_PATTERN, Home, building, disk_error, require_space, sha256, write_atomic
from appliance.models import model_path, require_quantisable
from appliance.release.foreign import ForeignRequest
from appliance.release.given import GivenRequest
from appliance.release.manifest import accept_quality, read_foreign, read_manifest
from appliance.release.recheck import plan_recheck, write_recheck
from appliance.store.datasets import Datasets
from appliance.store.releases import Proof
from appliance.supervisor.clearing import clear_up
from appliance.supervisor.engines import Room
from appliance.supervisor.queueing import queueing
from appliance.supervisor.supervisor import Supervisor
from appliance.train.events import EventLog
from appliance.train.recipe import Given, Recipe
from serve.datasets import run_module

_LONGEST_ABOUT = 1 << 20
CHECK_SECONDS = 5.0
"""How long a promotion waits for the files of its release to be read; what takes longer goes on without."""


def release_routes(home: Home, supervisor: Supervisor, datasets: Datasets) -> APIRouter:
    """All routes that read or change releases."""
    routes = APIRouter()
    runs, releases = supervisor.runs, supervisor.releases
    arriving = asyncio.Lock()

    @routes.get("/v1/releases")
    async def all_releases() -> list[api.Release]:
        canaries, checks = supervisor.trial.newest(), {check.release: check for check in supervisor.checks.shown()}
        return [
            release.model_copy(update={"canary": canaries.get(release.id), "check": checks.get(release.id)})
            for release in releases.all()
        ]

    @routes.get("/v1/releases/{id}")
    async def manifest(id: str) -> dict[str, Any]:
        releases.get(id)
        return read_manifest(home, id)

    @routes.get("/v1/releases/{id}/files/{name:path}")
    async def file(id: str, name: str) -> FileResponse:
        releases.require_fit(id)
        if name != MANIFEST and name not in read_manifest(home, id)["files"]:
            raise NotFound("no_such_file", f"release {id} has no file {name}", f"see `appliance releases {id}`")
        check = await supervisor.checks.settle(id, CHECK_SECONDS)
        releases.require_fit(id)
        if check.state != "whole":
            fault = f"the files of {id} are still being read, to see whether they are whole"
            raise Conflict("being_read", fault, "try again when `appliance status` no longer says so")
        return FileResponse(home.releases / id / name)

    @routes.post("/v1/releases/{id}/promote")
    async def promote(
        id: str, accept: Literal["quality"] | None = None, canary: Annotated[float | None, Query(gt=0, lt=1)] = None
    ) -> api.Release:
        """It answers when its files have been read and an engine has started on them; a damaged one is refused."""
        if accept and (refused := releases.get(id)).state == "refused":
            accepted = accept_quality(home, id, releases.proof(id).manifest_sha256, refused.reason)
            releases.accept(id, accepted.reason, sha256(home.releases / id / MANIFEST))
        releases.require_fit(id)
        check = await supervisor.checks.settle(id, CHECK_SECONDS)
        if canary is None:
            release = supervisor.promote(id)
        else:
            release = releases.get(id).model_copy(update={"canary": supervisor.start_canary(id, canary)})
        return release.model_copy(update={"check": check if check.state == "reading" else None})

    @routes.post("/v1/rollback")
    async def rollback() -> api.Release:
        """Where a release goes live again, past those whose files are found damaged."""
        if not (supervisor.trial.status() or supervisor.adapter_status()):
            while (before := releases.before()) and (await supervisor.checks.settle(before, CHECK_SECONDS)).damage:
                pass
        return supervisor.rollback()

    @routes.get("/v1/releases/{id}/check")
    async def check(id: str) -> api.Check:
        return supervisor.checks.view(id)

    @routes.post("/v1/releases/{id}/check")
    async def start_check(id: str) -> api.Check:
        """Read all its files from the disk; `GET` tells how far that is, and in the end what was found."""
        releases.get(id)
        supervisor.checks.start(id, thorough=True)
        return supervisor.checks.view(id)

    @routes.post("/v1/releases/{id}/gates")
    async def repeat_gates(id: str) -> api.Run:
        """Queue a run that judges the release's own files by its gates, with the base and the data that are here."""
        releases.get(id)
        recipe = await asyncio.to_thread(plan_recheck, home, id)
        weights = sum(file.stat().st_size for file in model_path(home, recipe.base).glob("*.safetensors"))
        require_space(home.root, weights, "a merge to compare with")
        with queueing(home, runs, recipe) as (run, directory):
            await asyncio.to_thread(write_recheck, home, directory, recipe, id)
        supervisor.poke()
        return runs.get(run)

    @routes.post("/v1/releases")
    async def import_release(request: Request, name: str | None = None) -> api.Release:
        """Take in what another box has exported; where a damaged release is that very one, in its place."""
        with _incoming(home) as folder:
            await _receive(request, folder / "release.tar")
            require_space(home.releases, (folder / "release.tar").stat().st_size, "unpacking the release")
            files = folder / "release"
            await asyncio.to_thread(unpack, folder / "release.tar", files)
            manifest = read_foreign((files / MANIFEST).read_bytes(), supervisor.engines.kind.name)
            if manifest.state != "verified":
                raise InvalidInput("refused_release", f"the release was refused: {manifest.reason}", "import another")
            id = _checked_name(name or manifest.release)
            gates = {gate: bool(outcome["passed"]) for gate, outcome in manifest.gates.items()}
            await run_module("appliance.release.foreign", home, ForeignRequest(folder=files, name=id), folder, request)
            digest = sha256(files / MANIFEST)
            async with arriving:
                recorded = any(release.id == id for release in releases.all())
                if not _may_take(home, id, digest, releases.proof(id) if recorded else None):
                    raise Conflict(
                        "name_taken", f"there is another release or run {id} here", "choose another with --name"
                    )
                if not recorded or (await supervisor.checks.settle(id, CHECK_SECONDS)).damage:
                    await asyncio.to_thread(_place, files, home.releases / id)
                    releases.add(id, manifest.base, "verified elsewhere", manifest.reason, gates, False, digest)
                    supervisor.checks.start(id)
                await supervisor.checks.settle(id, CHECK_SECONDS)
        return releases.get(id)

    @routes.post("/v1/adapters")
    async def merge(
        request: Request,
        name: str,
        base: str,
        dataset: str = "",
        quantised: bool = False,
        same_base: bool = False,
        base_template: bool = False,
    ) -> api.Run:
        """Queue a run that merges an adapter of PEFT. The body is About in one line, then its safetensors."""
        weights = sum(file.stat().st_size for file in model_path(home, base).glob("*.safetensors"))
        if quantised:
            require_quantisable(model_path(home, base))
        room = supervisor.engines.kind.room(model_path(home, base))
        room.require(base)
        judged_on = datasets.find(dataset).id if dataset else ""
        with _incoming(home) as folder:
            await _receive(request, folder / "upload")
            require_space(home.root, 2 * weights, "a merge and its release")
            (folder / "adapter").mkdir()
            about = await asyncio.to_thread(_split_adapter, folder / "upload", folder / "adapter")
            require_meant_for(model_path(home, base), about, same_base=same_base, base_template=base_template)
            await run_module(
                "appliance.release.given", home, GivenRequest(adapter=folder / "adapter", base=base), folder, request
            )
            given = Given(sha256=sha256(folder / "adapter" / WEIGHTS), quantised=quantised, dataset=judged_on)
            recipe = Recipe(name=_checked_name(name), base=base, given=given)
            with queueing(home, runs, recipe) as (id, directory):
                (folder / "adapter").rename(directory / "adapter")
                warn_of_fp8(directory, recipe, room)
        supervisor.poke()
        return runs.get(id)

    @routes.post("/v1/gc")
    async def gc(keep: Annotated[int, Query(ge=0)] = 5, dry_run: bool = False) -> api.Garbage:
        async with arriving:
            serving = {engine.release for engine in supervisor.engines.shown()}
            clear_up(home, runs, releases)
            garbage = find_garbage(home, releases, runs, datasets, serving, keep)
            if not dry_run:
                forget_garbage(garbage, releases)
                await asyncio.to_thread(remove_garbage, home, garbage)
        return garbage

    return routes


def warn_of_fp8(run: Path, recipe: Recipe, room: Room) -> None:
    """Say in the events of a new run that its release will be served in FP8, where it will."""
    if room.precision == "FP8":
        message = f"the release does not fit in 16 bits: it takes {room.figures}"
        EventLog(run / "events.jsonl").append("warning", recipe.pipeline()[0], code="fp8", message=message)


@contextmanager
def _incoming(home: Home) -> Iterator[Path]:
    """A folder for what is being received, gone afterwards."""
    folder = Path(tempfile.mkdtemp(dir=home.incoming))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _receive(request: Request, path: Path) -> None:
    """Write the request's body to `path`. Raises NoSpace before or while the disk runs full."""
    require_space(path.parent, int(request.headers.get("content-length") or 0), "the upload")
    try:
        with open(path, "wb") as file:
            async for chunk in request.stream():
                await asyncio.to_thread(file.write, chunk)
    except OSError as error:
        raise disk_error(error, path.parent) from error


def _may_take(home: Home, id: str, digest: str, recorded: Proof | None) -> bool:
    """Whether a release with a manifest of that hash may be called `id`: nothing else is, or it is the very one."""
    if recorded is None and (home.runs / id).exists():
        return False
    if recorded is None and not (home.releases / id).exists():
        return True
    present = home.releases / id / MANIFEST
    known = recorded.manifest_sha256 if recorded else ""
    return digest == (known or (sha256(present) if present.is_file() else ""))


def _place(files: Path, final: Path) -> None:
    """Move a release to where it belongs, in the place of what is there. Killed in between, it is not there."""
    aside = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    with building(final) as folder:
        for path in files.iterdir():
            path.rename(folder / path.name)
    shutil.rmtree(aside, ignore_errors=True)


def _split_adapter(upload: Path, folder: Path) -> About:
    """Write the two files of an adapter from what was received; what it says of itself."""
    with open(upload, "rb") as source:
        try:
            about = About.model_validate_json(source.readline(_LONGEST_ABOUT))
        except ValueError:
            raise InvalidInput("bad_adapter", "what was sent is no adapter", "send it by `appliance merge`") from None
        write_atomic(folder / CONFIG, json.dumps(about.config, indent=1).encode())
        with open(folder / WEIGHTS, "wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    return about


def _checked_name(name: str) -> str:
    if not re.match(NAME_PATTERN, name):
        raise InvalidInput("bad_name", f"{name!r} is no name", "use letters, digits, dots and dashes")
    return name
