"""What comes in from elsewhere, releases and adapters to be merged, and what goes because nothing needs it."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Query, Request

from appliance import api
from appliance.adapters import CONFIG, WEIGHTS, About, require_meant_for
from appliance.archive import MANIFEST, unpack
from appliance.errors import Conflict, InvalidInput
from appliance.garbage import find_garbage, forget_garbage, remove_garbage
from appliance.home import Home, building, is_name, require_space, sha256, write_atomic
from appliance.models import model_path, require_quantisable
from appliance.release.foreign import ForeignRequest
from appliance.release.given import GivenRequest
from appliance.release.manifest import read_foreign
from appliance.store.datasets import Datasets
from appliance.store.releases import Proof
from appliance.supervisor.clearing import clear_up
from appliance.supervisor.queueing import queueing
from appliance.supervisor.supervisor import Supervisor
from appliance.train.recipe import Given, Recipe
from serve.control.children import run_module
from serve.control.releases import CHECK_SECONDS
from serve.control.submission import warn_of_fp8
from serve.control.uploads import incoming, receive

_LONGEST_ABOUT = 1 << 20


def arrivals_router(home: Home, supervisor: Supervisor, datasets: Datasets) -> APIRouter:
    """Take in releases and adapters, and clear up."""
    routes = APIRouter()
    runs, releases = supervisor.runs, supervisor.releases
    arriving = asyncio.Lock()

    @routes.post("/v1/releases")
    async def import_release(request: Request, name: str | None = None) -> api.Release:
        """Take in what another box has exported; where a damaged release is that very one, in its place."""
        with incoming(home) as folder:
            await receive(request, folder / "release.tar")
            require_space(home.releases, (folder / "release.tar").stat().st_size, "unpacking the release")
            files = folder / "release"
            await asyncio.to_thread(unpack, folder / "release.tar", files)
            manifest = read_foreign((files / MANIFEST).read_bytes(), supervisor.engines.kind.name)
            if manifest.state != "verified":
                raise InvalidInput("refused_release", f"the release was refused: {manifest.reason}", "import another")
            id = checked_name(name or manifest.release)
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
        with incoming(home) as folder:
            await receive(request, folder / "upload")
            require_space(home.root, 2 * weights, "a merge and its release")
            (folder / "adapter").mkdir()
            about = await asyncio.to_thread(_split_adapter, folder / "upload", folder / "adapter")
            require_meant_for(model_path(home, base), about, same_base=same_base, base_template=base_template)
            await run_module(
                "appliance.release.given", home, GivenRequest(adapter=folder / "adapter", base=base), folder, request
            )
            given = Given(sha256=sha256(folder / "adapter" / WEIGHTS), quantised=quantised, dataset=judged_on)
            recipe = Recipe(name=checked_name(name), base=base, given=given)
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


def checked_name(name: str) -> str:
    if not is_name(name):
        raise InvalidInput("bad_name", f"{name!r} is no name", "use letters, digits, dots and dashes")
    return name
