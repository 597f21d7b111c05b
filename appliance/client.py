"""The control API as Python calls. The CLI and the TUI use nothing else."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypedDict, TypeVar, Unpack
from urllib.parse import quote

from pydantic import TypeAdapter

from appliance import api
from appliance.archive import MANIFEST, TAR_END, tar_header, tar_padding
from appliance.errors import ApplianceError, Conflict, InvalidInput, NotAllowed, NotFound, Unanswered, Unreachable
from appliance.home import building, disk_error, replacing
from appliance.light_httpx import httpx
from appliance.sources import SourceFile

T = TypeVar("T")

_BY_STATUS = {400: InvalidInput, 403: NotAllowed, 404: NotFound, 409: Conflict, 503: Unreachable}
_UPLOAD_CHUNK = 1 << 20
_CHECK_SECONDS = 0.2
_LONG_CALL = 600.0
"""Seconds for what the daemon may take long over: it waits for an engine, or a model thinks before its first word."""
_CHAT_TEMPERATURE = 0.2
"""An operator chats to judge the model: close to its best guess, not a draw from all it might say."""


class ImportOptions(TypedDict, total=False):
    """How rows are read and what is done with them; an option that is None, empty or false is not given."""

    format: str | None
    columns: str | None
    base: str | None
    max_length: int | None
    encoding: str | None
    ignore: Sequence[str]
    drop_untrainable: bool
    salvage: bool
    redact: bool


class Client:
    """An async client of the daemon on the unix socket `socket`.

    Every call raises Unreachable where no daemon answers, and the ApplianceError that the daemon reports.
    `transport` replaces the socket in tests.
    """

    def __init__(self, socket: Path, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self.socket = socket
        self._http = httpx.AsyncClient(
            # Without TLS no list of authorities has to be read.
            transport=transport or httpx.AsyncHTTPTransport(uds=str(socket), verify=False),
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

    async def pull(self, name: str, source: str | None = None, serve_only: bool = False) -> AsyncIterator[api.Pull]:
        """Have the daemon pull a base model: how far that is, and at last the outcome. It goes on when nobody looks.

        `source` is a path that the daemon can read, or a release of its.
        """
        asked = {"name": name, "source": source, "serve_only": serve_only}
        now = await self._call("POST", "/v1/pulls", api.Pull, json=asked)
        yield now
        while now.state == "pulling":
            await asyncio.sleep(_CHECK_SECONDS)
            now = await self._call("GET", _path("pulls", now.name), api.Pull)
            yield now

    async def pulls(self) -> list[api.Pull]:
        """The models that are being pulled, and those that have been since the daemon started."""
        return await self._call("GET", "/v1/pulls", list[api.Pull])

    async def stop_pull(self, name: str) -> api.Pull:
        """End the pulling of a model; what is here of it stays for the next time."""
        return await self._call("DELETE", _path("pulls", name), api.Pull)

    async def datasets(self) -> list[api.Dataset]:
        return await self._call("GET", "/v1/datasets", list[api.Dataset])

    async def import_dataset(
        self, files: Sequence[SourceFile], name: str, **how: Unpack[ImportOptions]
    ) -> dict[str, Any]:
        """Send files to the daemon and return the import's report. Raises InvalidInput for an unreadable file."""
        try:
            sizes = [None if file.path is None else file.path.stat().st_size for file in files]
            uploads = [
                {"filename": file.name, "bytes": size, "about": file.about}
                for file, size in zip(files, sizes, strict=True)
            ]
            head = json.dumps(uploads).encode() + b"\n"
            length = len(head) + sum(size or 0 for size in sizes)
            return await self._call(
                "POST",
                "/v1/datasets",
                dict[str, Any],
                params={"name": name, **{key: value for key, value in how.items() if value}},
                content=_upload(head, files),
                headers={} if None in sizes else {"content-length": str(length)},
                timeout=None,
            )
        except OSError as error:
            where = error.filename or "a file"
            raise InvalidInput("unreadable_file", f"cannot read {where}: {error.strerror}", "check it") from None

    async def remove_dataset(self, name: str) -> api.Dataset:
        """Take the name away; with the last name of it, the dataset."""
        return await self._call("DELETE", _path("datasets", name), api.Dataset)

    async def diff_datasets(self, name: str, other: str) -> api.DatasetDiff:
        return await self._call("GET", _path("datasets", name, "diff", other), api.DatasetDiff)

    async def export_dataset(self, name: str) -> AsyncIterator[bytes]:
        """The rows as JSON Lines, piece by piece."""
        try:
            async with self._http.stream("GET", _path("datasets", name, "export"), timeout=60) as response:
                if response.is_error:
                    raise _problem(response.status_code, await response.aread())
                async for piece in response.aiter_bytes():
                    yield piece
        except httpx.TransportError as error:
            raise self._no_answer(error) from None

    async def rendered(
        self, name: str, base: str | None = None, offset: int = 0, limit: int = 1
    ) -> list[list[api.Conversation]]:
        """Rows as a base model is trained on them: the conversations of each."""
        params = {"offset": offset, "limit": limit, **({"base": base} if base else {})}
        shape = list[list[api.Conversation]]
        return await self._call("GET", _path("datasets", name, "rendered"), shape, params=params, timeout=120)

    async def dataset(self, name: str) -> dict[str, Any]:
        """The report of the dataset called (or identified by) `name`."""
        return await self._call("GET", _path("datasets", name), dict[str, Any])

    async def rows(self, name: str, offset: int = 0, limit: int = 50) -> api.Page:
        params = {"offset": offset, "limit": limit}
        return await self._call("GET", _path("datasets", name, "rows"), api.Page, params=params)

    async def recipes(self) -> list[api.ShippedRecipe]:
        return await self._call("GET", "/v1/recipes", list[api.ShippedRecipe])

    async def train(self, recipe: str) -> api.Run:
        """Queue a run of the recipe, given as TOML text."""
        return await self._call("POST", "/v1/runs", api.Run, json={"recipe": recipe}, timeout=_LONG_CALL)

    async def forecast(self, recipe: str) -> api.Forecasts:
        """What each training stage of the recipe would take, and serving its release."""
        return await self._call("POST", "/v1/forecasts", api.Forecasts, json={"recipe": recipe}, timeout=_LONG_CALL)

    async def runs(self, limit: int = 200, before: str | None = None) -> list[api.Run]:
        """The newest runs, at most `limit` (1,000), newest first; with `before`, those queued before that run."""
        params = {"limit": limit, **({"before": before} if before else {})}
        return await self._call("GET", "/v1/runs", list[api.Run], params=params)

    async def run(self, run: str) -> api.Run:
        return await self._call("GET", _path("runs", run), api.Run)

    async def stop(self, run: str, how: api.StopWish = "pause") -> api.Run:
        """Stop a run. A run that has ended is returned as it is.

        pause: at a checkpoint, from which it can be resumed. keep: end the stage that trains, and go on with what it
        has learnt; raises Conflict where none trains. discard: take away the run's work, also if it has stopped
        already; raises Conflict for one that has finished.
        """
        return await self._call("POST", _path("runs", run, "stop"), api.Run, params={"how": how})

    async def resume(self, run: str) -> api.Run:
        """Queue a stopped or failed run again, from its last checkpoint."""
        return await self._call("POST", _path("runs", run, "resume"), api.Run)

    async def events(self, run: str, after: int = 0) -> list[dict[str, Any]]:
        """The run's events with a seq above `after`."""
        return await self._call("GET", _path("runs", run, "events"), list[dict[str, Any]], params={"after": after})

    async def follow(self, run: str, after: int = 0) -> AsyncIterator[dict[str, Any]]:
        """Events with a seq above `after` as they come, until the run ends or the connection breaks."""
        async for data in self._stream(_path("runs", run, "events", "stream"), {"last-event-id": str(after)}):
            yield json.loads(data)

    async def log(self, run: str, lines: int = 200) -> str:
        """The last lines of the run's log."""
        return await self._call("GET", _path("runs", run, "log"), str, params={"lines": lines})

    async def engine_log(self, release: str, lines: int = 200) -> str:
        """The last lines that the engines of a release have written."""
        return await self._call("GET", f"/v1/engines/{release}/log", str, params={"lines": lines})

    async def follow_log(self, run: str) -> AsyncIterator[str]:
        """The run's log from its start, in pieces as it grows, until the run ends."""
        async for data in self._stream(_path("runs", run, "log", "stream"), {}):
            yield json.loads(data)

    async def releases(self) -> list[api.Release]:
        """All releases, newest first."""
        return await self._call("GET", "/v1/releases", list[api.Release])

    async def manifest(self, release: str) -> dict[str, Any]:
        return await self._call("GET", _path("releases", release), dict[str, Any])

    async def promote(self, release: str, accept: str | None = None, canary: float | None = None) -> api.Release:
        """Make a release live, or let it answer the share `canary` of the conversations first.

        `accept` names a gate that may have failed: quality, or none. Raises Conflict where it cannot.
        """
        params = {"accept": accept} if accept else {}
        params |= {"canary": str(canary)} if canary else {}
        return await self._call("POST", _path("releases", release, "promote"), api.Release, params=params)

    async def check(self, release: str) -> AsyncIterator[api.Check]:
        """Have all files of a release read and compared with its manifest: how far that is, and at last the outcome."""
        now = await self._call("POST", _path("releases", release, "check"), api.Check)
        yield now
        while now.state == "reading":
            await asyncio.sleep(_CHECK_SECONDS)
            now = await self._call("GET", _path("releases", release, "check"), api.Check)
            yield now

    async def repeat_gates(self, release: str) -> api.Run:
        """Queue a run that judges a release's own files by its gates. Raises Conflict where its base is not here."""
        return await self._call("POST", _path("releases", release, "gates"), api.Run)

    async def promote_adapter(self, run: str) -> api.Unmerged:
        """Let the adapter of a run answer before its release can. Raises Conflict where it cannot."""
        return await self._call("POST", _path("runs", run, "promote-adapter"), api.Unmerged, timeout=_LONG_CALL)

    async def rollback(self) -> api.Release:
        """End the canary, or where there is none make the release that was live before the live one live again."""
        return await self._call("POST", "/v1/rollback", api.Release)

    async def merge(
        self,
        adapter: Path,
        base: str,
        name: str,
        dataset: str = "",
        *,
        quantised: bool = False,
        same_base: bool = False,
        base_template: bool = False,
    ) -> api.Run:
        """Queue a run that merges the adapter in directory `adapter` into `base`.

        It was trained over the base in NF4 (`quantised`), the base that it names has the same weights (`same_base`),
        and the base's chat template is to be served (`base_template`), where a person says so. Raises InvalidInput
        where it is no adapter that can be read, or one for another base.
        """
        from appliance.adapters import WEIGHTS, read_about

        about = read_about(adapter).model_dump_json().encode() + b"\n"
        given = {"name": name, "base": base, "dataset": dataset}
        said = {"quantised": quantised, "same_base": same_base, "base_template": base_template}
        given |= {key: str(value).lower() for key, value in said.items()}
        return await self._send(adapter / WEIGHTS, "/v1/adapters", api.Run, given, about)

    async def export(self, release: str, path: Path) -> None:
        """Write a release to `path`, checking every hash: as a folder, or where the name ends in .tar, as an archive.

        It is there whole in the end or not at all. Raises InvalidInput where it cannot be written.
        """
        manifest = await self.manifest(release)
        hashes = {**manifest["files"], MANIFEST: None}
        try:
            if path.suffix == ".tar":
                with replacing(path) as archive:
                    for name, digest in hashes.items():
                        await self._fetch(release, name, digest, archive, f"{release}/{name}")
                    archive.write(TAR_END)
                return
            with building(path.absolute()) as folder:
                for name, digest in hashes.items():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    with open(folder / name, "wb") as file:
                        await self._fetch(release, name, digest, file)
        except OSError as error:
            raise disk_error(error, path.parent) from None

    async def import_release(self, path: Path, name: str | None = None) -> api.Release:
        """Send an archive that `export` has written. Raises InvalidInput for one that is damaged."""
        return await self._send(path, "/v1/releases", api.Release, {"name": name} if name else {})

    async def gc(self, keep: int, dry_run: bool = False) -> api.Garbage:
        """Remove what nothing needs, or only say what that would be."""
        params = {"keep": keep, "dry_run": str(dry_run).lower()}
        return await self._call("POST", "/v1/gc", api.Garbage, params=params, timeout=None)

    async def keys(self) -> list[api.Key]:
        return await self._call("GET", "/v1/keys", list[api.Key])

    async def create_key(self, name: str) -> api.NewKey:
        return await self._call("POST", "/v1/keys", api.NewKey, json={"name": name})

    async def revoke_key(self, key: str) -> api.Key:
        return await self._call("DELETE", _path("keys", key), api.Key)

    async def chat(self, messages: list[dict[str, Any]], **options: Any) -> AsyncIterator[str]:
        """The live release's answer, piece by piece. `options` are chat completion fields."""
        body = {"messages": messages, "stream": True, "temperature": _CHAT_TEMPERATURE, **options}
        async for data in self._stream("/v1/chat/completions", {}, _LONG_CALL, method="POST", json=body):
            if data == "[DONE]":
                return
            chunk = json.loads(data)
            if "error" in chunk:
                raise ApplianceError("engine_error", str(chunk["error"]), "try again")
            for choice in chunk.get("choices", ()):
                if piece := choice.get("delta", {}).get("content"):
                    yield piece

    async def _fetch(self, release: str, name: str, digest: str | None, file: BinaryIO, member: str = "") -> None:
        """Write a file of a release to `file`, with `member` as that member of a tar. Raises ApplianceError."""
        found = hashlib.sha256()
        try:
            async with self._http.stream("GET", f"{_path('releases', release, 'files')}/{quote(name)}") as response:
                if response.is_error:
                    raise _problem(response.status_code, await response.aread())
                size = int(response.headers["content-length"])
                file.write(tar_header(member, size) if member else b"")
                async for chunk in response.aiter_bytes():
                    file.write(chunk)
                    found.update(chunk)
                file.write(tar_padding(size) if member else b"")
        except httpx.TransportError as error:
            raise self._no_answer(error) from None
        if digest is not None and found.hexdigest() != digest:
            raise ApplianceError(
                "changed_file", f"{name} of {release} is not what its manifest says", "promote another release"
            )

    async def _send(self, path: Path, url: str, shape: type[T], params: dict[str, str], head: bytes = b"") -> T:
        """Send `head` and the content of the file `path`. Raises InvalidInput where it cannot be read."""
        try:
            length = {"content-length": str(len(head) + path.stat().st_size)}
            content = _upload(head, [SourceFile(path, path.name)])
            return await self._call("POST", url, shape, params=params, content=content, headers=length, timeout=None)
        except OSError as error:
            raise InvalidInput("unreadable_file", f"cannot read {path}: {error.strerror}", "check it") from None

    async def _call(self, method: str, path: str, shape: type[T], **options: Any) -> T:
        try:
            response = await self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise self._no_answer(error) from None
        if response.is_error:
            raise _problem(response.status_code, response.content)
        return TypeAdapter(shape).validate_json(response.content)

    async def _stream(
        self, path: str, headers: dict[str, str], silence: float = 60, method: str = "GET", **options: Any
    ) -> AsyncIterator[str]:
        """The data of each server-sent event; `silence`: the seconds after which it is no longer waited for."""
        timeout = httpx.Timeout(silence, connect=5)
        try:
            async with self._http.stream(method, path, headers=headers, timeout=timeout, **options) as response:
                if response.is_error:
                    raise _problem(response.status_code, await response.aread())
                async for line in _lines(response.aiter_text()):
                    if line.startswith("data:"):
                        yield line[5:].strip()
        except httpx.TransportError as error:
            raise self._no_answer(error) from None

    def _no_answer(self, error: httpx.TransportError) -> ApplianceError:
        """What it means that no answer came, or not all of it."""
        if isinstance(error, httpx.TimeoutException):
            return Unanswered(
                "daemon_busy",
                f"the daemon on {self.socket} is there, and has not answered in time",
                "what was asked may still be done: see `appliance status`, and the daemon's log where this goes on",
            )
        if _is_caused_by(error, PermissionError):
            return NotAllowed(
                "no_permission",
                f"{self.socket} may not be used by this user",
                "join the group of the service, `sudo usermod -aG appliance $USER`, then log in again",
            )
        if isinstance(error, httpx.ConnectError):
            return Unreachable(
                "daemon_unreachable",
                f"no daemon answers on {self.socket}",
                "start it with `appliance serve`, or `systemctl start appliance`",
            )
        return Unreachable(
            "daemon_gone", f"the daemon on {self.socket} ended before it had answered", "see its log, then ask again"
        )


def _is_caused_by(error: BaseException | None, kind: type[OSError]) -> bool:
    """Whether a cause of `error` is of that kind."""
    while error is not None and not isinstance(error, kind):
        error = error.__cause__ or error.__context__
    return error is not None


def _path(*parts: str) -> str:
    """The path of what `parts` name, whatever characters are in them."""
    return "/v1/" + "/".join(quote(part, safe="") for part in parts)


async def _upload(head: bytes, files: Sequence[SourceFile]) -> AsyncIterator[bytes]:
    yield head
    for source in files:
        with sys.stdin.buffer if source.path is None else open(source.path, "rb") as file:
            while chunk := file.read(_UPLOAD_CHUNK):
                yield chunk


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
