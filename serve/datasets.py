"""The control API's part about datasets. What takes long is done by processes of its own."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, TypeAdapter, ValidationError

from appliance import api, gpu
from appliance.data.dataset import Dataset, Rows, canonical_json, compare
from appliance.data.requests import DROPS_RETURNED, ImportRequest, PreviewRequest, Source
from appliance.errors import ApplianceError, Conflict, InvalidInput
from appliance.garbage import dataset_users
from appliance.home import Home, disk_error, require_space
from appliance.models import list_models, model_path
from appliance.store.datasets import Datasets
from appliance.store.runs import Runs

_WATCH_SECONDS = 0.2
_MOST_FILES = 1 << 22
"""Bytes of the list of files that an upload begins with."""


class Upload(BaseModel):
    """One of the files that follow in an upload; `bytes` None: all that is left."""

    filename: str
    bytes: int | None = None
    about: dict[str, Any] = {}
    """The entry of a dataset_info.json beside it."""


def datasets_router(home: Home, datasets: Datasets, runs: Runs) -> APIRouter:
    """Import, look at, compare and remove datasets."""
    routes = APIRouter(prefix="/v1/datasets")

    @routes.get("")
    async def all_datasets() -> list[api.Dataset]:
        return datasets.all()

    @routes.post("")
    async def import_dataset(
        request: Request,
        name: str,
        format: str | None = None,
        columns: str | None = None,
        base: str | None = None,
        max_length: Annotated[int | None, Query(ge=1)] = None,
        encoding: str = "utf-8",
        ignore: Annotated[tuple[str, ...], Query()] = (),
        drop_untrainable: bool = False,
        salvage: bool = False,
        redact: bool = False,
    ) -> dict[str, Any]:
        """The body is a line of JSON, a list of Upload, then the files one after another."""
        folder = Path(tempfile.mkdtemp(dir=home.incoming))
        try:
            files = await _receive(request, folder)
            asked = ImportRequest(
                files=files,
                name=name,
                format=format,
                columns=columns,
                base=_base(home, base),
                max_length=max_length,
                encoding=encoding,
                ignore=list(ignore),
                drop_untrainable=drop_untrainable,
                salvage=salvage,
                redact=redact,
            )
            outcome = await run_module("appliance.data.importer", home, asked, folder, request)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        report: dict[str, Any] = outcome["report"]
        if not (home.datasets / report["id"]).exists():
            raise Conflict("removed_meanwhile", "the dataset was removed while it was imported", "import it again")
        datasets.record(report)
        return report

    @routes.get("/{name}")
    async def dataset(name: str) -> dict[str, Any]:
        found = datasets.find(name)
        report = (await asyncio.to_thread(Dataset.open, home, found.id)).report
        return {**report, "name": found.name, "drops": report["drops"][:DROPS_RETURNED]}

    @routes.delete("/{name}")
    async def remove(name: str) -> api.Dataset:
        """Remove the name; with the last name of it, the dataset."""
        found = datasets.find(name)
        if len(datasets.names(found.id)) == 1:
            if user := dataset_users(home, runs).get(found.id):
                fault = f"dataset {found.name} is needed by {user}"
                raise Conflict("dataset_in_use", fault, "keep it, or remove that first")
            shutil.rmtree(home.datasets / found.id)
        datasets.forget(found.name)
        return found

    @routes.get("/{name}/rows")
    async def rows(
        name: str, offset: Annotated[int, Query(ge=0)] = 0, limit: Annotated[int, Query(ge=1, le=1000)] = 50
    ) -> api.Page:
        all_rows = Rows(home.datasets / datasets.find(name).id)
        chosen = range(offset, min(offset + limit, len(all_rows)))
        return api.Page(total=len(all_rows), offset=offset, rows=tuple(all_rows[index] for index in chosen))

    @routes.get("/{name}/rendered")
    async def rendered(
        request: Request,
        name: str,
        base: str | None = None,
        offset: Annotated[int, Query(ge=0)] = 0,
        limit: Annotated[int, Query(ge=1, le=100)] = 1,
    ) -> list[list[api.Conversation]]:
        """Rows as a base model is trained on them: the conversations of each."""
        chosen = _base(home, base)
        if chosen is None:
            raise InvalidInput("no_base", "no base model is named, and there is not just one", "name one with --base")
        asked = PreviewRequest(dataset=datasets.find(name).id, base=chosen, offset=offset, limit=limit)
        with tempfile.TemporaryDirectory(dir=home.incoming) as folder:
            outcome = await run_module("appliance.data.preview", home, asked, Path(folder), request)
        return TypeAdapter(list[list[api.Conversation]]).validate_python(outcome["rows"])

    @routes.get("/{name}/diff/{other}")
    async def diff(name: str, other: str) -> api.DatasetDiff:
        """What rows two datasets share."""
        one, two = (Dataset.open(home, datasets.find(which).id) for which in (name, other))
        only_one, only_two, shared = await asyncio.to_thread(compare, one, two)
        return api.DatasetDiff(
            shared=shared,
            only=(len(only_one), len(only_two)),
            examples=(
                tuple(one.rows[index] for index in only_one[:10]),
                tuple(two.rows[index] for index in only_two[:10]),
            ),
        )

    @routes.get("/{name}/export")
    async def export(name: str) -> StreamingResponse:
        """The rows as JSON Lines, without where they came from: importing them gives the same dataset."""
        rows = Rows(home.datasets / datasets.find(name).id)
        return StreamingResponse(_lines(rows), media_type="application/jsonl")

    return routes


def _base(home: Home, name: str | None) -> Path | None:
    """Directory of the named base model, else of the only one there is. Raises NotFound."""
    if name is not None:
        return model_path(home, name)
    models = list_models(home)
    return model_path(home, models[0].name) if len(models) == 1 else None


def _lines(rows: Rows) -> Iterator[bytes]:
    for row in rows:
        yield canonical_json({key: value for key, value in row.items() if key != "source"}) + b"\n"


async def _receive(request: Request, folder: Path) -> list[Source]:
    """Write the files of an upload into `folder`. Raises NoSpace before or while the disk runs full."""
    require_space(folder, int(request.headers.get("content-length") or 0), "the upload")
    chunks = request.stream()
    uploads, rest = await _listed(chunks)
    files = []
    try:
        for number, upload in enumerate(uploads):
            path = folder / f"upload-{number}"
            left = upload.bytes
            with open(path, "wb") as file:
                while left is None or left > 0:
                    rest = rest or await anext(chunks, b"")
                    if not rest:
                        break
                    piece, rest = rest[:left], rest[len(rest) if left is None else left :]
                    await asyncio.to_thread(file.write, piece)
                    left = None if left is None else left - len(piece)
            if left:
                raise InvalidInput("short_upload", f"{upload.filename} ended {left} bytes too early", "import it again")
            files.append(Source(path=path, filename=upload.filename, about=upload.about))
    except OSError as error:
        raise disk_error(error, folder) from error
    return files


async def _listed(chunks: AsyncIterator[bytes]) -> tuple[list[Upload], bytes]:
    """The list that an upload begins with, and what of its files has come with it."""
    held = b""
    async for chunk in chunks:
        held += chunk
        if b"\n" in chunk or len(held) > _MOST_FILES:
            break
    first, _, rest = held.partition(b"\n")
    try:
        return TypeAdapter(list[Upload]).validate_json(first), rest
    except ValidationError:
        raise InvalidInput(
            "bad_upload", "the upload does not begin with a list of its files", "see the control API's schema"
        ) from None


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
