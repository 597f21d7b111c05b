"""Processes of the daemon that do what takes long or needs much memory, for as long as a client waits for it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from fastapi import Request
from pydantic import BaseModel

from appliance import gpu
from appliance.errors import ApplianceError, Conflict
from appliance.home import Home

_WATCH_SECONDS = 0.2


async def run_module(module: str, home: Home, asked: BaseModel, folder: Path, request: Request) -> dict[str, Any]:
    """What the process `module` makes of what is asked. It is killed when the client goes away.

    Raises the process's own problem, or Conflict where it was killed.
    """
    question, result = folder / "request.json", folder / "result.json"
    question.write_text(asked.model_dump_json())
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, str(home.root), str(question), str(result)),
        env={**os.environ, **gpu.environment()},
        start_new_session=True,
    )
    ended = asyncio.ensure_future(process.wait())
    try:
        while not (await asyncio.wait([ended], timeout=_WATCH_SECONDS))[0]:
            if await request.is_disconnected():
                raise Conflict("client_gone", "the client went away", "ask again")
    finally:
        if process.returncode is None:
            process.kill()
            await ended
    if not result.exists():
        raise Conflict("import_died", "the work was interrupted; nothing was kept", "try again")
    outcome: dict[str, Any] = json.loads(result.read_bytes())
    if problem := outcome.get("problem"):
        raise ApplianceError.from_problem(problem)
    return outcome
