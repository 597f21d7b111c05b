"""Base models: listing them, and pulling one in a process of its own that goes on when nobody looks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path

from fastapi import APIRouter
from pydantic import BaseModel

from appliance import api
from appliance.errors import ApplianceError, InvalidInput, NotFound
from appliance.home import Home, is_name
from appliance.models import list_models
from appliance.pull import local_name_of, progress
from appliance.words import log_line

_COMMAND = (sys.executable, "-m", "appliance.pull")
_LAST_BYTES = 4096
_GRACE_SECONDS = 5.0


class NewPull(BaseModel):
    """`name` as for `appliance pull`; `source`: a folder, tar or GGUF that the daemon can read, or a release."""

    name: str
    source: str | None = None
    serve_only: bool = False


class Pulls:
    """The models that are being pulled, and those that have been since the daemon started."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._jobs: dict[str, _Job] = {}

    async def start(self, asked: NewPull) -> api.Pull:
        """Begin, unless that model is being pulled already. Raises InvalidInput."""
        name = local_name_of(asked.name)
        if not is_name(name):
            raise InvalidInput("bad_name", f"a model cannot be called {name!r}", "use letters, digits, dots and dashes")
        if name not in self._jobs or self._jobs[name].ended:
            self._jobs[name] = await _Job.start(self._home, name, asked)
        return self.get(name)

    def get(self, name: str) -> api.Pull:
        """Raises NotFound."""
        if name not in self._jobs:
            raise NotFound("no_such_pull", f"{name} is not being pulled", "see `appliance models`")
        return self._jobs[name].shown(*progress(self._home, name))

    def all(self) -> list[api.Pull]:
        return [self.get(name) for name in sorted(self._jobs)]

    async def stop(self, name: str) -> api.Pull:
        """End it; what is here stays, and the next pull of it goes on from there. Raises NotFound."""
        self.get(name)
        await self._jobs[name].stop()
        return self.get(name)

    async def close(self) -> None:
        """End all that is under way."""
        await asyncio.gather(*(job.stop() for job in self._jobs.values()))


class _Job:
    """One process that pulls a model; what it says, and its problem, are files in `folder`."""

    def __init__(self, name: str, folder: Path, process: asyncio.subprocess.Process) -> None:
        self._name = name
        self._folder = folder
        self._process = process

    @classmethod
    async def start(cls, home: Home, name: str, asked: NewPull) -> _Job:
        folder = Path(tempfile.mkdtemp(dir=home.incoming, prefix="pull-"))
        arguments = ["--problem", str(folder / "problem.json")]
        arguments += ["--serve-only"] if asked.serve_only else []
        arguments += [f"--from={asked.source}"] if asked.source else []
        environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
        with open(folder / "log.txt", "wb") as log:
            process = await asyncio.create_subprocess_exec(
                *(*_COMMAND, *arguments, "--", asked.name, str(home.root)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        return cls(name, folder, process)

    @property
    def ended(self) -> bool:
        return self._process.returncode is not None

    def shown(self, bytes: int, total: int) -> api.Pull:
        code = self._process.returncode
        state: api.PullState = "pulling" if code is None else "failed" if code else "done"
        problem = self._problem() if state == "failed" else None
        said = problem.message if problem else self._last_line()
        return api.Pull(name=self._name, state=state, bytes=bytes, total=total, said=said, problem=problem)

    async def stop(self) -> None:
        if self.ended:
            return
        self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), _GRACE_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()

    def _problem(self) -> api.Problem:
        with contextlib.suppress(OSError, ValueError):
            left = ApplianceError.from_problem(json.loads((self._folder / "problem.json").read_bytes()))
            return api.Problem(code=left.code, message=left.message, next=left.next)
        fault = f"the pull of {self._name} was stopped, or broke off: {self._last_line()}"
        return api.Problem(code="pull_ended", message=fault, next="pull it again: a download goes on where it was")

    def _last_line(self) -> str:
        """What the process said last; nothing where `gc` has taken its log since."""
        try:
            with open(self._folder / "log.txt", "rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - _LAST_BYTES))
                lines = log.read().decode("utf-8", "replace").splitlines()
        except FileNotFoundError:
            return ""
        return next((line for line in map(log_line, reversed(lines)) if line.strip()), "")


def models_router(home: Home, pulls: Pulls) -> APIRouter:
    """List and pull base models."""
    routes = APIRouter(prefix="/v1")

    @routes.get("/models")
    def models() -> list[api.Model]:
        return list_models(home)

    @routes.get("/pulls")
    async def all_pulls() -> list[api.Pull]:
        return pulls.all()

    @routes.post("/pulls")
    async def start(new: NewPull) -> api.Pull:
        return await pulls.start(new)

    @routes.get("/pulls/{name}")
    async def pull(name: str) -> api.Pull:
        return pulls.get(name)

    @routes.delete("/pulls/{name}")
    async def stop(name: str) -> api.Pull:
        return await pulls.stop(name)

    return routes
