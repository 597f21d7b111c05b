"""What clients send, on its way to disk."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import Request
from pydantic import BaseModel, TypeAdapter, ValidationError

from appliance.data.requests import Source
from appliance.errors import InvalidInput
from appliance.home import Home, disk_error, require_space

_MOST_FILES = 1 << 22
"""Bytes of the list of files that an upload begins with."""


class Upload(BaseModel):
    """One of the files that follow in an upload; `bytes` None: all that is left."""

    filename: str
    bytes: int | None = None
    about: dict[str, Any] = {}
    """The entry of a dataset_info.json beside it."""


@contextmanager
def incoming(home: Home) -> Iterator[Path]:
    """A folder for what is being received, gone afterwards."""
    folder = Path(tempfile.mkdtemp(dir=home.incoming))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def receive(request: Request, path: Path) -> None:
    """Write the request's body to `path`. Raises NoSpace before or while the disk runs full."""
    require_space(path.parent, int(request.headers.get("content-length") or 0), "the upload")
    try:
        with open(path, "wb") as file:
            async for chunk in request.stream():
                await asyncio.to_thread(file.write, chunk)
    except OSError as error:
        raise disk_error(error, path.parent) from error


async def receive_files(request: Request, folder: Path) -> list[Source]:
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
