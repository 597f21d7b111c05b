"""Engines: what they have written."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter

from appliance.errors import NotFound
from appliance.supervisor.supervisor import Supervisor
from serve.control.runs import tail


def engines_router(supervisor: Supervisor) -> APIRouter:
    """Read the logs of engines."""
    routes = APIRouter()

    @routes.get("/v1/engines/{release}/log")
    async def engine_log(release: str, lines: int = 200) -> str:
        """The last lines that the engines of a release have written."""
        log = supervisor.engines.log(release)
        if not log.exists():
            raise NotFound("no_engine_log", f"no engine has run for {release!r}", "see `appliance releases`")
        return await asyncio.to_thread(tail, log, lines)

    return routes
