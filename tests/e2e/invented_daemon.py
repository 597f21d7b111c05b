"""A real daemon whose engines invent their answers: `python invented_daemon.py`. Settings come from the environment.

An engine is this file too. It answers with its release's name, unless the home has a file `RELEASE.behaviour` that
says: refuse (an error), break (an answer ends in the middle), stall (it stops there and never ends), die (the
process ends), cut (by the length limit).
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from appliance.data.tokenizer import TemplateSettings
from appliance.settings import load_settings
from appliance.supervisor.engines import EngineCommand, Room
from serve import daemon
from serve.engines.answer import Answer, Piece
from serve.engines.openai_engine import OpenAIEngine


class InventedEngine(OpenAIEngine):
    """Starts this file as an engine."""

    name = "invented"
    honours = frozenset({"model", "messages", "stream"})
    ready_seconds = 30.0
    reloads = False

    def memory(self, release: Path) -> int:
        return 0

    def room(self, model: Path, *, beside: bool = False) -> Room:
        return Room(0, None)

    def command(
        self, release: Path, name: str, socket: Path, template: TemplateSettings | None = None, *_: object
    ) -> EngineCommand:
        return EngineCommand([sys.executable, __file__, str(release), name, str(socket)], {}, f"unix:{socket}")


def engine(release: Path, name: str) -> Starlette:
    """The engine's server."""

    async def health(request: Request) -> Response:
        return JSONResponse({})

    async def complete(request: Request) -> Response:
        asked = await request.json()
        said = release.parent.parent / f"{release.name}.behaviour"
        behaviour = said.read_text() if said.exists() else ""
        if behaviour == "die":
            os._exit(1)
        if behaviour == "refuse":
            return JSONResponse({"error": {"message": "out of memory"}}, 500)
        answer = Answer(asked["model"], 3, 1, False)
        pieces = [Piece(0, word, 1, None) for word in ("I ", "am ", name)]
        pieces.append(Piece(0, ".", 1, "length" if behaviour == "cut" else "stop"))
        if not asked.get("stream"):
            for piece in pieces:
                answer.add(piece)
            return JSONResponse(answer.whole())

        async def events() -> AsyncIterator[bytes]:
            for piece in pieces:
                yield answer.chunks(piece)
                if behaviour == "break":
                    raise RuntimeError("broken off")
                if behaviour == "stall":
                    await asyncio.Event().wait()
            yield answer.last_chunks()

        return StreamingResponse(events(), media_type="text/event-stream")

    routes = [Route("/health", health), Route("/v1/chat/completions", complete, methods=["POST"])]
    return Starlette(routes=routes)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        uvicorn.run(engine(Path(sys.argv[1]), sys.argv[2]), uds=sys.argv[3], log_level="warning", lifespan="off")
    else:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        daemon.choose_engine = lambda settings: InventedEngine()
        daemon.run(load_settings())
