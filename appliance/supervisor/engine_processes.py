"""The engine processes: starting, listening to, exchanging their weights, stopping. Each is a row of the database."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, Protocol

from appliance import api, hardware
from appliance.api import Precision
from appliance.data.tokenizer import TemplateSettings
from appliance.errors import ApplianceError, reason
from appliance.home import Home
from appliance.release.manifest import read_manifest, same_but_for_weights, template_of
from appliance.store.processes import SWAPPING, Processes, ProcessRow
from appliance.store.releases import Releases
from appliance.supervisor import processes
from appliance.supervisor.engines import EngineKind, Probe
from appliance.supervisor.snapshot import EngineView
from appliance.supervisor.trial import CanaryRoutes
from appliance.train.recipe import parse_recipe

log = logging.getLogger(__name__)

GRACE_SECONDS = 10.0
HUNG_SECONDS = 60.0
"""An engine that was ready and has not answered for so long is restarted."""
LONGEST_REST_SECONDS = 60.0
REFERENCE_PROMPTS = 3
REFERENCE_TOKENS = 16
"""How much of its recorded answers a release has to repeat after its weights were loaded in place."""
_BETWEEN = re.compile(r"</?think>|\s+")
"""What one version of an engine has between a thought and a text, and another leaves out."""
REPLAY_REST_SECONDS = 1.0
MOST_REPLAY_TRIES = 3
"""An engine that has so often not answered when it was asked for reference answers has failed."""
MOST_REPLAYED = 10
DIFFERING_SHARE = 5
"""Of the reference answers of a release from elsewhere one in so many may begin otherwise here, and one always may: on
other hardware sums are rounded otherwise, and where two tokens are nearly as likely, the other one is said."""


class Frontage(CanaryRoutes, Protocol):
    """The public face, which the supervisor tells who answers."""

    def route(self, model: str | None, address: str, beneath: str | None) -> None:
        """Let the engine at `address` answer as `model` from now on, or nobody.

        Where `model` is an adapter, `beneath` is the release on whose weights it is.
        """
        ...

    def hold(self, on: bool) -> None:
        """Let new requests wait while nobody answers, or refuse them at once."""
        ...

    async def drained(self, address: str, timeout: float) -> None:
        """Wait until no answer comes from `address` any more, at most `timeout` seconds."""
        ...


class EngineProcesses:
    """`changed` is called when something has happened that decisions rest on.

    Answers that have begun may go on for `drain_seconds` when their engine is to stop or to change its weights.
    """

    def __init__(
        self,
        home: Home,
        kind: EngineKind,
        releases: Releases,
        records: Processes,
        frontage: Frontage,
        drain_seconds: float,
        changed: Callable[[], None],
    ) -> None:
        self.kind = kind
        self.failures: dict[str, int] = {}
        """Failures in a row, by release."""
        self._home = home
        self._releases = releases
        self._records = records
        self._frontage = frontage
        self._drain_seconds = drain_seconds
        self._changed = changed
        self._answered: dict[str, float] = {}
        self._begun: dict[str, float] = {}
        self._ready_since: dict[str, float] = {}
        self._rest_until: dict[str, float] = {}
        self._stops: dict[str, asyncio.Task[None]] = {}
        self._swaps: dict[str, asyncio.Task[None]] = {}
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._replays: dict[str, asyncio.Task[None]] = {}
        self._replay_tries: dict[str, int] = {}
        self._adapters: dict[str, str] = {}
        self._unswappable: set[str] = set()

    def rows(self) -> list[ProcessRow]:
        return [row for row in self._records.all() if row.kind == "engine"]

    def row(self, release: str) -> ProcessRow:
        """The process that serves `release`. Raises StopIteration where there is none."""
        return next(row for row in self.rows() if row.owner == release)

    # Looking

    async def listen(self) -> None:
        """Ask every engine whether it answers."""
        rows = [row for row in self.rows() if row.owner not in self._stops and row.stage != SWAPPING]
        answers = await asyncio.gather(*(self.kind.ready(row.address) for row in rows), return_exceptions=True)
        for row, answer in zip(rows, answers, strict=True):
            self._begun.setdefault(row.owner, time.monotonic())
            if answer is True:
                self._ready_since.setdefault(row.owner, time.monotonic())
                self._answered[row.owner] = time.monotonic()

    def views(self) -> tuple[EngineView, ...]:
        """The engines as decisions see them."""
        now = time.monotonic()
        return tuple(
            EngineView(
                row.owner,
                processes.alive(row),
                row.owner in self._ready_since,
                self._overdue(row.owner, now),
                swapping=row.stage == SWAPPING,
                abandoned=row.stage == SWAPPING and row.owner not in self._swaps,
                adapter=self._adapters.get(row.owner),
                loading=row.owner in self._loads,
            )
            for row in self.rows()
        )

    def shown(self) -> tuple[api.Engine, ...]:
        """The engines as people see them."""
        rows = {row.owner: row for row in self.rows()}
        return tuple(
            api.Engine(
                release=release,
                kind=self.kind.name,
                state="backoff" if release not in rows else "ready" if release in self._ready_since else "starting",
                pid=rows[release].pid if release in rows else None,
                restarts=self.failures.get(release, 0),
            )
            for release in dict.fromkeys([*rows, *sorted(self.resting)])
        )

    @property
    def resting(self) -> frozenset[str]:
        """Releases whose engine failed a moment ago and is not started again yet."""
        now = time.monotonic()
        return frozenset(release for release, until in self._rest_until.items() if until > now)

    @property
    def replaying(self) -> frozenset[str]:
        return frozenset(self._replays)

    @property
    def stopping(self) -> frozenset[str]:
        return frozenset(self._stops)

    def swappable(self, live: str | None) -> frozenset[str]:
        """Releases with an engine that could go on with the weights of the live release, which has none of its own."""
        owners = {row.owner for row in self.rows()}
        if not self.kind.reloads or live is None or live in owners | self._unswappable:
            return frozenset()
        wanted = self._manifest(live)
        return frozenset(owner for owner in owners if same_but_for_weights(self._manifest(owner), wanted))

    def room(self, releases: Iterable[str]) -> bool:
        """Whether the memory lets an engine start for the largest of `releases`, as far as is known."""
        needed = max((self.kind.memory(self.directory(release)) for release in releases), default=0)
        free = hardware.free_memory()
        return free is None or needed <= free

    def precision(self, release: str) -> Precision:
        """In which an engine serves the release, or the run's merged model that is to become one."""
        return self.kind.room(self.directory(release)).precision

    def held(self) -> int:
        """Bytes that engines hold, which are free when they have stopped."""
        return hardware.held_by({pid for row in self.rows() for pid in processes.members(row)})

    def directory(self, release: str) -> Path:
        """The model files of a release, or of a run's merged model that is to become one."""
        directory = self._home.releases / release
        return directory if directory.exists() else self._home.runs / release / "merge" / "model"

    def _overdue(self, release: str, now: float) -> bool:
        if release in self._answered:
            return now - self._answered[release] > HUNG_SECONDS
        return now - self._begun.get(release, now) > self.kind.ready_seconds

    # Acting

    def start(self, release: str) -> None:
        """Start a process for the release. Raises ApplianceError where that cannot be done."""
        # A name of its own, because the process may go on with another release's weights while this one starts again.
        socket = self._home.engines / f"{secrets.token_hex(6)}.sock"
        command = self.kind.command(self.directory(release), release, socket, self._template(release))
        self._begun[release] = time.monotonic()
        row = processes.spawn(
            "engine",
            release,
            "",
            command.argv,
            {**os.environ, **command.environment, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"},
            self.log(release),
            self._home.root,
            command.address,
        )
        self._records.add(row)

    def start_failed(self, release: str) -> None:
        """Count that no process could be started for it: it rests, as after a failure of its engine."""
        self._forget(release)
        self._count_failure(release)

    def stop(self, release: str, failed: bool) -> None:
        """Let its answers end, then its whole process group. `failed`: it rests before it is started again."""
        if failed:
            self._count_failure(release)
        else:
            self.failures.pop(release, None)
        self._stops[release] = asyncio.create_task(self._stop(self.row(release)))

    def stop_silent(self, release: str) -> None:
        """Stop its engine, if it is there: it has not answered, which is a failure however long it has run."""
        if release not in self._stops and any(row.owner == release and processes.alive(row) for row in self.rows()):
            self._ready_since.pop(release, None)
            self.stop(release, failed=True)

    def swap(self, old: str, new: str) -> None:
        """Let the answers of `old` end, then load the weights of `new` into its process."""
        before = self.row(old)
        row = replace(before, owner=new, stage=SWAPPING)
        self._records.replace(before, row)
        self._forget(old)
        self._begun[new] = time.monotonic()
        self._swaps[new] = asyncio.create_task(self._swap(row, old))

    def load_adapter(self, release: str, run: str, files: Path, name: str, failed: Callable[[str], None]) -> None:
        """Give the engine of `release` the adapter of `run` as model `name`. `failed` is told why that did not work."""
        task = asyncio.create_task(self._load_adapter(self.row(release), run, files, name, failed))
        self._loads[release] = task

    def replay(self, release: str) -> None:
        """Ask its engine for the reference answers in its manifest, and record what becomes of that."""
        self._replays[release] = asyncio.create_task(self._replay(self.row(release)))

    def give_up(self, release: str, reason: str) -> None:
        """The release, which was to go live, does not come up: what was live before is so again."""
        log.warning("%s does not go live: %s", release, reason)
        self._releases.give_up(release, reason)
        self.forgive(release)

    def forgive(self, release: str) -> None:
        """Let its failures count no longer."""
        self.failures.pop(release, None)
        self._rest_until.pop(release, None)

    def cancel(self) -> None:
        """End what is under way; the processes stay, and the database says what they are."""
        for task in (*self._stops.values(), *self._swaps.values(), *self._loads.values(), *self._replays.values()):
            task.cancel()

    def log(self, release: str) -> Path:
        return self._home.engines / f"{release}.log"

    async def _stop(self, row: ProcessRow) -> None:
        try:
            if processes.alive(row) and row.owner in self._ready_since:
                await self._frontage.drained(row.address, self._drain_seconds)
            await processes.stop_group(row, GRACE_SECONDS)
            socket = Path(row.address.removeprefix("unix:"))
            socket.unlink(missing_ok=True)
            shutil.rmtree(socket.with_suffix(""), ignore_errors=True)
            self._records.remove(row)
        finally:
            self._forget(row.owner)
            self._stops.pop(row.owner, None)
            self._changed()

    async def _swap(self, row: ProcessRow, old: str) -> None:
        """What fails leaves the row marked as swapping: an engine of which nobody can say what it serves."""
        new = row.owner
        try:
            await self._frontage.drained(row.address, self._drain_seconds)
            if reason := await self._load(row, new):
                self._unswappable.add(new)
                fallback = self._releases.fallback() if self._releases.live() == new else None
                if fallback == old:
                    self.give_up(new, f"its weights could not be loaded in place: {reason}")
                    back = replace(row, owner=old)
                    self._records.replace(row, back)
                    self._swaps[old] = self._swaps[new]
                    await self._load(back, old)
        except Exception:
            log.exception("the engine of %s could not be swapped to %s", old, new)
        finally:
            self._swaps.pop(new, None)
            self._swaps.pop(old, None)
            self._changed()

    async def _load(self, row: ProcessRow, release: str) -> str:
        """Load the weights and see that they are those; why not, where it did not work."""
        begun = time.monotonic()
        try:
            await self.kind.reload(row.address, self.directory(release), release, self._template(release).today)
            reference = self._manifest(release).get("reference", {})
            if _speaker(reference) == self._speaker_here(release):
                for asked in reference["answers"][:REFERENCE_PROMPTS]:
                    if said := await self._says_otherwise(row, asked):
                        return said
        except (ApplianceError, ConnectionError) as error:
            log.warning("the weights of %s were not loaded: %s", release, error)
            return str(error)
        with open(self.log(release), "a") as file:
            file.write(f"its weights are served by process {row.pid}, whose log is that of the release it began with\n")
        log.info("the weights of %s were loaded in %.1f s", release, time.monotonic() - begun)
        self._records.replace(row, replace(row, stage=""))
        self._ready_since[release] = self._answered[release] = time.monotonic()
        return ""

    async def _says_otherwise(self, row: ProcessRow, asked: dict[str, Any]) -> str:
        """How an engine's answer begins otherwise than it did when its release was verified; empty: it does not."""
        answer = await self.kind.probe(row.address, row.owner, Probe(asked["messages"], [], REFERENCE_TOKENS))
        said, expected = (_BETWEEN.sub("", text) for text in (answer.text.rstrip("\ufffd"), asked["text"]))
        if expected.startswith(said) and bool(said) == bool(expected):
            return ""
        return f"it answers {answer.text!r}, and answered {asked['text']!r} when it was verified"

    async def _does_not_repeat(self, row: ProcessRow, asked: dict[str, Any]) -> str:
        """The same of an engine that may refuse to be asked: then it has repeated nothing."""
        try:
            return await self._says_otherwise(row, asked)
        except ApplianceError as error:
            return f"it cannot be asked for {asked['text']!r:.80}: {error.message}"

    async def _replay(self, row: ProcessRow) -> None:
        """Ask for the reference answers. An engine that dies meanwhile is started again, and asked again."""
        release = row.owner
        try:
            reference = self._manifest(release).get("reference", {})
            made_on, here = _speaker(reference), self._speaker_here(release)
            if made_on == here and not reference.get("answers"):
                self._releases.refuse(release, "its archive names no reference answers to be repeated")
                return
            if made_on != here:
                what = f"are those of another engine ({made_on})" if made_on else "are not in its archive"
                self._releases.note(release, f"its reference answers {what}, so none was repeated here")
                return
            answers = reference["answers"][:MOST_REPLAYED]
            differing = [said for asked in answers if (said := await self._does_not_repeat(row, asked))]
            count = f"{len(answers) - len(differing)} of {len(answers)} reference answers were repeated here"
            log.info("%s: %s", release, count)
            if len(differing) > max(1, len(answers) // DIFFERING_SHARE) or len(differing) == len(answers):
                self._releases.refuse(release, f"only {count}: {differing[0]}")
            else:
                self._releases.note(release, count)
        except ConnectionError as error:
            log.warning("the engine went away while %s repeated its reference answers: %s", release, error)
            self._replay_tries[release] = self._replay_tries.get(release, 0) + 1
            await asyncio.sleep(REPLAY_REST_SECONDS)
            if self._replay_tries[release] >= MOST_REPLAY_TRIES and row in self.rows():
                self.stop_silent(release)
        except Exception as error:
            log.exception("the reference answers of %s cannot be asked for", release)
            self._releases.refuse(release, f"its reference answers could not be asked for here: {reason(error)}")
        finally:
            self._replays.pop(release, None)
            self._changed()

    async def _load_adapter(
        self, row: ProcessRow, run: str, files: Path, name: str, failed: Callable[[str], None]
    ) -> None:
        """An engine that dies meanwhile is started again, and asked again."""
        begun = time.monotonic()
        try:
            await self.kind.load_adapter(row.address, files, name)
            if row in self.rows():
                self._adapters[row.owner] = run
                log.info("the adapter of %s was loaded in %.1f s", run, time.monotonic() - begun)
        except ConnectionError as error:
            log.warning("the adapter of %s was not loaded: %s", run, error)
            if processes.alive(row):
                failed(str(error))
        except Exception as error:
            log.exception("the adapter of %s was not loaded", run)
            failed(reason(error))
        finally:
            self._loads.pop(row.owner, None)
            self._changed()

    def _speaker_here(self, release: str) -> str:
        """Which kind of engine says the answers of a release here."""
        return _speaker({"engine": self.kind.name, "precision": self.precision(release)})

    def _manifest(self, release: str) -> dict[str, Any]:
        """Empty where the release is not recorded yet, or its manifest cannot be read."""
        try:
            return read_manifest(self._home, release)
        except ApplianceError:
            return {}

    def _template(self, release: str) -> TemplateSettings:
        """What the chat template of a release is told, or of a run's merged model that is to become one."""
        if manifest := self._manifest(release):
            return template_of(manifest)
        recipe = self._home.runs / release / "recipe.toml"
        return parse_recipe(recipe.read_text()).template if recipe.exists() else TemplateSettings(today=date.today())

    def _forget(self, release: str) -> None:
        for memory in (self._begun, self._ready_since, self._answered, self._adapters, self._replay_tries):
            memory.pop(release, None)

    def _count_failure(self, release: str) -> None:
        """Engines that keep failing are started ever more rarely; one that had served for long starts afresh."""
        log.warning("the engine of %s failed; see %s", release, self.log(release))
        served = time.monotonic() - self._ready_since.get(release, time.monotonic())
        failures = 1 if served > LONGEST_REST_SECONDS else self.failures.get(release, 0) + 1
        self.failures[release] = failures
        self._rest_until[release] = time.monotonic() + min(2.0 ** (failures - 1), LONGEST_REST_SECONDS)


def _speaker(reference: dict[str, Any]) -> str:
    """Which kind of engine has said reference answers; empty where nothing says so.

    Those in FP8 are another kind's: another word is now and then the likeliest.
    """
    kind = str(reference.get("engine") or "")
    return f"{kind} in FP8" if reference.get("precision") == "FP8" else kind
