"""Datasets: importing, looking, comparing and removing. What takes long is done by processes of its own."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import StreamingResponse
from pydantic import TypeAdapter

from appliance import api
from appliance.data.dataset import Dataset, Rows, canonical_json, compare
from appliance.data.requests import DROPS_RETURNED, ImportRequest, PreviewRequest
from appliance.errors import Conflict, InvalidInput
from appliance.garbage import dataset_users
from appliance.home import Home
from appliance.models import list_models, model_path
from appliance.store.datasets import Datasets
from appliance.store.runs import Runs
from serve.control.children import run_module
from serve.control.uploads import incoming, receive_files


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
        with incoming(home) as folder:
            files = await receive_files(request, folder)
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
        if len(datasets.names(found.id)) == 1 and (user := dataset_users(home, runs).get(found.id)):
            fault = f"dataset {found.name} is needed by {user}"
            raise Conflict("dataset_in_use", fault, "keep it, or remove that first")
        datasets.forget(found.name)
        if not datasets.names(found.id):
            await asyncio.to_thread(_remove, home.datasets / found.id)
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
        with incoming(home) as folder:
            outcome = await run_module("appliance.data.preview", home, asked, folder, request)
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


def _remove(directory: Path) -> None:
    """Remove a dataset, which is gone at once or not at all; what a kill leaves under another name is cleared later."""
    aside = directory.with_name(f".{directory.name}.removed")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        directory.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _base(home: Home, name: str | None) -> Path | None:
    """Directory of the named base model, else of the only one there is. Raises NotFound."""
    if name is not None:
        return model_path(home, name)
    models = list_models(home)
    return model_path(home, models[0].name) if len(models) == 1 else None


def _lines(rows: Rows) -> Iterator[bytes]:
    for row in rows:
        yield canonical_json({key: value for key, value in row.items() if key != "source"}) + b"\n"
