"""Releases: looking, going live and back, checking, and their files for an export."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import FileResponse

from appliance import api
from appliance.archive import MANIFEST
from appliance.errors import Conflict, NotFound
from appliance.home import Home, require_space, sha256
from appliance.models import model_path
from appliance.release.manifest import accept_quality, read_manifest
from appliance.release.recheck import plan_recheck, write_recheck
from appliance.supervisor.queueing import queueing
from appliance.supervisor.supervisor import Supervisor

_LONGEST_ABOUT = 1 << 20
CHECK_SECONDS = 5.0
"""How long a promotion waits for the files of its release to be read; what takes longer goes on without."""


def releases_router(home: Home, supervisor: Supervisor) -> APIRouter:
    """All routes that read or change releases."""
    routes = APIRouter()
    runs, releases = supervisor.runs, supervisor.releases

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

    return routes
