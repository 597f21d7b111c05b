"""The control API as an app: its routes, and how its errors are told."""

from __future__ import annotations

import logging
import sqlite3
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from appliance import __version__, api
from appliance.errors import ApplianceError, InvalidInput
from appliance.home import Home, disk_error
from appliance.sqlite import database_error
from appliance.store.datasets import Datasets
from appliance.store.keys import Keys
from appliance.supervisor.supervisor import Supervisor
from serve.control.arrivals import arrivals_router
from serve.control.box import box_router
from serve.control.datasets import datasets_router
from serve.control.engines import engines_router
from serve.control.keys import keys_router
from serve.control.models import Pulls, models_router
from serve.control.releases import releases_router
from serve.control.runs import following_router, runs_router
from serve.control.submission import Submission

log = logging.getLogger(__name__)


def control_app(
    home: Home, db: sqlite3.Connection, supervisor: Supervisor, keys: Keys, pulls: Pulls, endpoint: str, chat: Any
) -> FastAPI:
    """The control API. `endpoint` is the chat endpoint's URL; `chat` the gateway's ASGI app without keys."""
    app = FastAPI(title="appliance control", version=__version__, docs_url=None, redoc_url=None)
    datasets, runs = Datasets(db), supervisor.runs
    _tell_errors(app, home)
    for routes in (
        box_router(home, supervisor, endpoint),
        models_router(home, pulls),
        runs_router(home, supervisor, Submission(home, supervisor, datasets)),
        following_router(home, runs),
        engines_router(supervisor),
        releases_router(home, supervisor),
        arrivals_router(home, supervisor, datasets),
        datasets_router(home, datasets, runs),
        keys_router(keys),
    ):
        app.include_router(routes)
    app.mount("/", chat)
    return app


def _tell_errors(app: FastAPI, home: Home) -> None:
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
        log.warning("%s %s: %s", request.method, request.url.path, error)
        problem = disk_error(error, home.root)
        return JSONResponse(_body(problem), status_code=problem.status)

    @app.exception_handler(sqlite3.Error)
    async def _database(request: Request, error: sqlite3.Error) -> JSONResponse:
        log.warning("%s %s: %s", request.method, request.url.path, error)
        problem = database_error(error, home.database)
        return JSONResponse(_body(problem), status_code=problem.status)


def _body(error: ApplianceError) -> dict[str, Any]:
    return api.Problem(code=error.code, message=error.message, next=error.next).model_dump()
