"""The control API as Python calls. The CLI and the TUI use nothing else."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx
from pydantic import TypeAdapter

from appliance import api
from appliance.errors import ApplianceError, Conflict, InvalidInput, NotAllowed, NotFound, Unreachable

T = TypeVar("T")

_BY_STATUS = {400: InvalidInput, 403: NotAllowed, 404: NotFound, 409: Conflict, 503: Unreachable}
_UPLOAD_CHUNK = 1 << 20
_CHAT_TEMPERATURE = 0.2
"""An operator chats to judge the model: close to its best guess, not a draw from all it might say."""


class Client:
    """An async client of the daemon on the unix socket `socket`.

    Every call raises Unreachable where no daemon answers, and the ApplianceError that the daemon reports.
    `transport` replaces the socket in tests.
    """

    def __init__(self, socket: Path, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.socket = socket
        self._http = httpx.AsyncClient(
            transport=transport or httpx.AsyncHTTPTransport(uds=str(socket)),
            base_url="http://appliance",
            timeout=httpx.Timeout(30, connect=5),
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def status(self) -> api.Status:
        return await self._call("GET", "/v1/status", api.Status)

    async def models(self) -> list[api.Model]:
        return await self._call("GET", "/v1/models", list[api.Model])

    async def datasets(self) -> list[api.Dataset]:
        return await self._call("GET", "/v1/datasets", list[api.Dataset])

    async def import_dataset(
        self, path: Path, name: str, format: str | None = None, columns: str | None = None
    ) -> dict[str, Any]:
        """Send the file to the daemon and return the import's report. Raises InvalidInput for an unreadable file.

        `columns` names the file's columns for the formats: "instruction=question,output=answer".
        """
        if not path.is_file():
            what = "is a directory" if path.is_dir() else "does not exist"
            raise InvalidInput("unreadable_file", f"{path} {what}", "name a file")

        async def chunks() -> AsyncIterator[bytes]:
            with path.open("rb") as file:
                while chunk := file.read(_UPLOAD_CHUNK):
                    yield chunk

        given = {"name": name, "filename": path.name, "format": format, "columns": columns}
        params = {key: value for key, value in given.items() if value is not None}
        try:
            return await self._call(
                "POST",
                "/v1/datasets",
                dict[str, Any],
                params=params,
                content=chunks(),
                headers={"content-length": str(path.stat().st_size)},
                timeout=None,
            )
        except OSError as error:
            raise InvalidInput("unreadable_file", f"cannot read {path}: {error.strerror}", "check it") from None

    async def dataset(self, name: str) -> dict[str, Any]:
        """The report of the dataset called (or identified by) `name`."""
        return await self._call("GET", f"/v1/datasets/{name}", dict[str, Any])

    async def rows(self, name: str, offset: int = 0, limit: int = 50) -> api.Page:
        return await self._call("GET", f"/v1/datasets/{name}/rows", api.Page, params={"offset": offset, "limit": limit})

    async def recipes(self) -> list[api.ShippedRecipe]:
        return await self._call("GET", "/v1/recipes", list[api.ShippedRecipe])

    async def train(self, recipe: str) -> api.Run:
        """Queue a run of the recipe, given as TOML text."""
        return await self._call("POST", "/v1/runs", api.Run, json={"recipe": recipe})

    async def runs(self) -> list[api.Run]:
        """All runs, newest first."""
        return await self._call("GET", "/v1/runs", list[api.Run])

    async def run(self, run: str) -> api.Run:
        return await self._call("GET", f"/v1/runs/{run}", api.Run)

    async def stop(self, run: str, discard: bool = False) -> api.Run:
        """Ask a run to write a checkpoint and stop. `discard` takes away its work, also if it has stopped already.

        A run that has ended is returned as it is; with `discard`, raises Conflict for one that has finished.
        """
        return await self._call("POST", f"/v1/runs/{run}/stop", api.Run, params={"discard": discard})

    async def resume(self, run: str) -> api.Run:
        """Queue a stopped or failed run again, from its last checkpoint."""
        return await self._call("POST", f"/v1/runs/{run}/resume", api.Run)

    async def events(self, run: str, after: int = 0) -> list[dict[str, Any]]:
        """The run's events with a seq above `after`."""
        return await self._call("GET", f"/v1/runs/{run}/events", list[dict[str, Any]], params={"after": after})

    async def follow(self, run: str, after: int = 0) -> AsyncIterator[dict[str, Any]]:
        """Events with a seq above `after` as they come, until the run ends or the connection breaks."""
        async for data in self._stream(f"/v1/runs/{run}/events/stream", {"last-event-id": str(after)}):
            yield json.loads(data)

    async def log(self, run: str, lines: int = 200) -> str:
        """The last lines of the run's log."""
        return await self._call("GET", f"/v1/runs/{run}/log", str, params={"lines": lines})

    async def follow_log(self, run: str) -> AsyncIterator[str]:
        """The run's log from its start, in pieces as it grows, until the run ends."""
        async for data in self._stream(f"/v1/runs/{run}/log/stream", {}):
            yield json.loads(data)

    async def releases(self) -> list[api.Release]:
        """All releases, newest first."""
        return await self._call("GET", "/v1/releases", list[api.Release])

    async def manifest(self, release: str) -> dict[str, Any]:
        return await self._call("GET", f"/v1/releases/{release}", dict[str, Any])

    async def promote(self, release: str) -> api.Release:
        return await self._call("POST", f"/v1/releases/{release}/promote", api.Release)

    async def rollback(self) -> api.Release:
        """Make the release that was live before the live one live again."""
        return await self._call("POST", "/v1/rollback", api.Release)

    async def keys(self) -> list[api.Key]:
        return await self._call("GET", "/v1/keys", list[api.Key])

    async def create_key(self, name: str) -> api.NewKey:
        return await self._call("POST", "/v1/keys", api.NewKey, json={"name": name})

    async def revoke_key(self, key: str) -> api.Key:
        return await self._call("DELETE", f"/v1/keys/{key}", api.Key)

    async def chat(self, messages: list[dict[str, Any]], **options: Any) -> AsyncIterator[str]:
        """The live release's answer, piece by piece. `options` are chat completion fields."""
        body = {"messages": messages, "stream": True, "temperature": _CHAT_TEMPERATURE, **options}
        async for data in self._stream("/v1/chat/completions", {}, method="POST", json=body):
            if data == "[DONE]":
                return
            chunk = json.loads(data)
            if "error" in chunk:
                raise ApplianceError("engine_error", str(chunk["error"]), "try again")
            for choice in chunk.get("choices", ()):
                if piece := choice.get("delta", {}).get("content"):
                    yield piece

    async def _call(self, method: str, path: str, shape: type[T], **options: Any) -> T:
        try:
            response = await self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise self._unreachable(error) from None
        if response.is_error:
            raise _problem(response.status_code, response.content)
        return TypeAdapter(shape).validate_json(response.content)

    async def _stream(
        self, path: str, headers: dict[str, str], method: str = "GET", **options: Any
    ) -> AsyncIterator[str]:
        """The data of each server-sent event."""
        timeout = httpx.Timeout(60, connect=5)
        try:
            async with self._http.stream(method, path, headers=headers, timeout=timeout, **options) as response:
                if response.is_error:
                    raise _problem(response.status_code, await response.aread())
                async for line in _lines(response.aiter_text()):
                    if line.startswith("data:"):
                        yield line[5:].strip()
        except httpx.TransportError as error:
            raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> Unreachable:
        return Unreachable(
            "daemon_unreachable",
            f"no daemon answers on {self.socket}",
            "start it with `appliance serve`, or `systemctl start appliance`",
        )


async def _lines(pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    """Lines that a newline ends. httpx's own end at U+2028 and U+0085 too, which JSON text may hold."""
    rest = ""
    async for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        for line in lines:
            yield line


def _problem(status: int, content: bytes) -> ApplianceError:
    try:
        body = json.loads(content)
        if "error" in body:
            problem = api.Problem(code=str(body["error"].get("code")), message=body["error"]["message"], next="")
        else:
            problem = api.Problem.model_validate(body)
    except (ValueError, KeyError, AttributeError, TypeError):
        problem = api.Problem(code="unexpected_answer", message=f"the daemon answered {status}", next="see its log")
    kind = _BY_STATUS.get(status, ApplianceError)
    return kind(problem.code, problem.message, problem.next or "try again")
