"""The engine processes: starting, listening to, exchanging their weights, stopping. Each is a row of the database."""

from __future__ import annotations

import asyncio
import logging
import os
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
from appliance.release.manifest import manifest_to_be, read_manifest, same_but_for_weights, template_of
from appliance.store.processes import ASLEEP, SWAPPING, Processes, ProcessRow
from appliance.store.releases import Releases
from appliance.supervisor import processes
from appliance.supervisor.engines import EngineKind
from appliance.supervisor.references import first_difference, reference_answers, repeat, speaker
from appliance.supervisor.sleep import Sleep
from appliance.supervisor.snapshot import EngineView
from appliance.supervisor.trial import CanaryRoutes
from appliance.train.recipe import parse_recipe

log = logging.getLogger(__name__)

GRACE_SECONDS = 10.0
HUNG_SECONDS = 60.0
"""An engine that was ready and has not answered for so long is restarted."""
LONGEST_REST_SECONDS = 60.0
REPLAY_REST_SECONDS = 1.0
MOST_REPLAY_TRIES = 3
"""An engine that has so often not answered when it was asked for reference answers has failed."""


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
        self._fresh: set[str] = set()
        """Addresses of processes that have served no other weights than those they were started with."""
        self._sleep = Sleep(kind, self._drained, changed)

    def rows(self) -> list[ProcessRow]:
        return [row for row in self._records.all() if row.kind == "engine"]

    def row(self, release: str) -> ProcessRow:
        """The process that serves `release`. Raises StopIteration where there is none."""
        return next(row for row in self.rows() if row.owner == release)

    # Looking

    async def listen(self) -> None:
        """Ask every engine whether it answers."""
        rows = [row for row in self.rows() if row.owner not in self._stops and not row.stage]
        answers = await asyncio.gather(*(self.kind.ready(row.address) for row in rows), return_exceptions=True)
        for row, answer in zip(rows, answers, strict=True):
            self._begun.setdefault(row.owner, time.monotonic())
            if answer is True:
                self._sleep.started |= row.address in self._fresh
                self._ready_since.setdefault(row.owner, time.monotonic())
                self._answered[row.owner] = time.monotonic()
            elif isinstance(answer, OSError):
                # That it was not asked says nothing about it: its time begins anew.
                clock = self._answered if row.owner in self._answered else self._begun
                clock[row.owner] = time.monotonic()

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
                abandoned=self._abandoned(row),
                falling_asleep=row.owner in self._sleep.falling_asleep,
                asleep=row.owner in self._sleep.asleep,
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
                state=self._state(rows.get(release)),
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
        return frozenset(
            owner
            for owner in owners
            if same_but_for_weights(self._manifest(owner), wanted) and self.precision(owner) == self.precision(live)
        )

    @property
    def sleeps(self) -> bool:
        """Whether an engine can sleep, and it could be seen how much memory it keeps."""
        return self._sleep.possible

    def wakeable(self, releases: Iterable[str]) -> frozenset[str]:
        """Of `releases` those with whose weights the engine that sleeps could go on."""
        sleeper = next(iter(self._sleep.asleep), None)
        if sleeper is None or not self.kind.reloads:
            return frozenset()
        before = self._read_at_start(sleeper)
        return frozenset(
            release
            for release in releases
            if release not in self._unswappable
            and same_but_for_weights(before, self._read_at_start(release))
            and self.precision(sleeper) == self.precision(release)
            and self._could_be_told(release)
        )

    def room(self, releases: Iterable[str]) -> bool:
        """Whether the memory lets an engine start for the largest of `releases`, as far as is known."""
        needed = max((self.kind.memory(self.directory(release)) for release in releases), default=0)
        free = hardware.free_memory()
        return free is None or needed <= free

    def precision(self, release: str) -> Precision:
        """In which an engine serves the release: in that of its proof here, and a candidate as there is room for it.

        One that was proven elsewhere is served as there is room for it too.
        """
        manifest = self._manifest(release)
        if manifest and self._releases.get(release).state != "verified elsewhere":
            proven: Precision = manifest.get("reference", {}).get("precision", "16-bit")
            return proven
        return self.kind.room(self.directory(release)).precision

    def held(self) -> int:
        """Bytes that engines hold and that a worker will have: they stop for it, or keep what they keep asleep."""
        awake = {pid for row in self.rows() if row.owner not in self._sleep.asleep for pid in processes.members(row)}
        return max(0, hardware.held_by(awake) - self._sleep.kept)

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
        command = self.kind.command(
            self.directory(release), release, socket, self._template(release), self.precision(release)
        )
        self._sleep.before_start()
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
        self._fresh.add(command.address)

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

    def start_afresh(self, release: str, reason: str) -> bool:
        """Stop a process that has served other weights before, for one of the release's own; whether it was such a one.

        What it gets wrong, the `reason`, may be of those weights, and says nothing of the release.
        """
        rows = [row for row in self.rows() if row.owner == release and row.address not in self._fresh]
        if rows and release not in self._stops:
            log.warning("%s is asked once more, in a process of its own: %s", release, reason)
            self.stop(release, failed=False)
        return bool(rows)

    def sleep(self, release: str) -> None:
        """Let its answers end, then its process give the memory back. Where that does not work it is abandoned."""
        before = self.row(release)
        # On record first: it says that it is healthy while it sleeps, and the next daemon would believe it.
        row = replace(before, stage=ASLEEP)
        self._records.replace(before, row)
        self._forget(release)
        self._sleep.begin(row)

    def swap(self, old: str, new: str) -> None:
        """Let the answers of `old` end, then load the weights of `new` into its process. One that sleeps wakes."""
        before, slept = self.row(old), old in self._sleep.asleep
        row = replace(before, owner=new, stage=SWAPPING)
        self._records.replace(before, row)
        self._forget(old)
        self._fresh.discard(row.address)
        self._begun[new] = time.monotonic()
        self._swaps[new] = asyncio.create_task(self._swap(row, old, slept))

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
        for tasks in (self._stops, self._swaps, self._loads, self._replays):
            for task in tasks.values():
                task.cancel()
        self._sleep.cancel()

    def log(self, release: str) -> Path:
        return self._home.engines / f"{release}.log"

    async def _drained(self, address: str) -> None:
        """Wait until its answers have ended, as long as they may take."""
        await self._frontage.drained(address, self._drain_seconds)

    async def _stop(self, row: ProcessRow) -> None:
        try:
            if processes.alive(row) and row.owner in self._ready_since:
                await self._drained(row.address)
            await processes.stop_group(row, GRACE_SECONDS)
            socket = Path(row.address.removeprefix("unix:"))
            socket.unlink(missing_ok=True)
            shutil.rmtree(socket.with_suffix(""), ignore_errors=True)
            self._records.remove(row)
        finally:
            self._forget(row.owner)
            self._stops.pop(row.owner, None)
            self._changed()

    async def _swap(self, row: ProcessRow, old: str, slept: bool) -> None:
        """What fails leaves the row marked as swapping: an engine of which nobody can say what it serves.

        Where it `slept` that says nothing of the release, which is not given up.
        """
        new = row.owner
        try:
            await (self._sleep.until_it_may_wake() if slept else self._drained(row.address))
            if reason := await self._load(row, new):
                self._unswappable.add(new)
                fallback = self._releases.fallback() if self._releases.live() == new else None
                if fallback == old and not slept:
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
            answers = reference_answers(self._manifest(release), self._speaker_here(release))
            if said := await first_difference(self.kind, row.address, release, answers):
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

    async def _replay(self, row: ProcessRow) -> None:
        """Ask for the reference answers. An engine that dies meanwhile is started again, and asked again."""
        release = row.owner
        try:
            reference = self._manifest(release).get("reference", {})
            made_on, here = speaker(reference), self._speaker_here(release)
            if made_on == here and not reference.get("answers"):
                self._releases.refuse(release, "its archive names no reference answers to be repeated")
                return
            if made_on != here:
                what = f"are those of another engine ({made_on})" if made_on else "are not in its archive"
                self._releases.note(release, f"its reference answers {what}, so none was repeated here")
                return
            count, wrong = await repeat(self.kind, row.address, release, reference["answers"])
            log.info("%s: %s", release, count)
            if wrong:
                self._releases.refuse(release, wrong)
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
        return speaker({"engine": self.kind.name, "precision": self.precision(release)})

    def _manifest(self, release: str) -> dict[str, Any]:
        """Empty where the release is not recorded yet, or its manifest cannot be read."""
        try:
            return read_manifest(self._home, release)
        except ApplianceError:
            return {}

    def _could_be_told(self, release: str) -> bool:
        """Whether weights that are not its own would be found out: by what it has said, or as it will be probed."""
        manifest = self._manifest(release)
        return not manifest or bool(reference_answers(manifest, self._speaker_here(release)))

    def _read_at_start(self, release: str) -> dict[str, Any]:
        """Its manifest, or as much of that as there is of a run's merged model."""
        return self._manifest(release) or manifest_to_be(self._home.runs / release)

    def _abandoned(self, row: ProcessRow) -> bool:
        """Whether it swaps or sleeps, as its row says, and this daemon is not at it."""
        if row.stage == ASLEEP:
            return row.owner not in self._sleep.falling_asleep | self._sleep.asleep
        return row.stage == SWAPPING and row.owner not in self._swaps

    def _state(self, row: ProcessRow | None) -> api.EngineState:
        if row is None:
            return "backoff"
        if row.stage == ASLEEP:
            return "asleep"
        return "ready" if row.owner in self._ready_since else "starting"

    def _template(self, release: str) -> TemplateSettings:
        """What the chat template of a release is told, or of a run's merged model that is to become one."""
        if manifest := self._manifest(release):
            return template_of(manifest)
        recipe = self._home.runs / release / "recipe.toml"
        return parse_recipe(recipe.read_text()).template if recipe.exists() else TemplateSettings(today=date.today())

    def _forget(self, release: str) -> None:
        for memory in (self._begun, self._ready_since, self._answered, self._adapters, self._replay_tries):
            memory.pop(release, None)
        self._sleep.asleep.discard(release)

    def _count_failure(self, release: str) -> None:
        """Engines that keep failing are started ever more rarely; one that had served for long starts afresh."""
        log.warning("the engine of %s failed; see %s", release, self.log(release))
        self._sleep.doubt()
        served = time.monotonic() - self._ready_since.get(release, time.monotonic())
        failures = 1 if served > LONGEST_REST_SECONDS else self.failures.get(release, 0) + 1
        self.failures[release] = failures
        self._rest_until[release] = time.monotonic() + min(2.0 ** (failures - 1), LONGEST_REST_SECONDS)
