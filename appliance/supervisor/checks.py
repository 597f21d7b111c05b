"""Reading the files of releases, in a thread, to see that they are still what their manifests list."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

from appliance import api
from appliance.errors import NotFound
from appliance.home import Home
from appliance.release.integrity import Reading, examine, unchanged
from appliance.release.manifest import MANIFEST
from appliance.store.releases import Proof, Releases

log = logging.getLogger(__name__)

RETRY_SECONDS = 5.0
"""How long a release is left alone where this process could not look at it."""


@dataclass(frozen=True)
class _Check:
    reading: Reading
    thorough: bool
    task: asyncio.Task[None]


class Checks:
    """What a check finds is recorded in `releases`; `changed` is called then. Thorough ones take turns."""

    def __init__(self, home: Home, releases: Releases, changed: Callable[[], None]) -> None:
        self._home = home
        self._releases = releases
        self._changed = changed
        self._checks: dict[str, _Check] = {}
        self._turn = asyncio.Lock()

    def whole(self, release: str) -> bool:
        """Whether nothing has been written to its files since they were found whole. Looks at times and sizes only."""
        seen = self._releases.proof(release).seen
        try:
            return unchanged(self._home.releases / release, seen)
        except OSError as error:
            log.warning("cannot look at the files of %s: %s", release, error)
            return bool(seen)

    @property
    def under_way(self) -> frozenset[str]:
        return frozenset(self._checks)

    def start(self, release: str, thorough: bool = False) -> None:
        """Read what has changed, or where `thorough` all of it, and from the disk. One that is under way goes on."""
        present = self._checks.get(release)
        if present is not None and (present.thorough or not thorough):
            return
        if present is not None:
            _end(present)
        reading = Reading(from_disk=thorough)
        self._checks[release] = _Check(reading, thorough, asyncio.create_task(self._check(release, reading)))

    async def settle(self, release: str, seconds: float) -> api.Check:
        """What is known of its files after at most that time; they are read where it is not known yet."""
        if self.view(release).state == "unread":
            self.start(release)
        if check := self._checks.get(release):
            await asyncio.wait({check.task}, timeout=seconds)
        return self.view(release)

    def view(self, release: str) -> api.Check:
        """What is known of its files now. Raises NotFound."""
        if check := self._checks.get(release):
            reading = check.reading
            return api.Check(release=release, state="reading", read=reading.read, bytes=reading.bytes)
        if damage := self._releases.get(release).damage:
            return api.Check(release=release, state="damaged", damage=damage)
        return api.Check(release=release, state="whole" if self.whole(release) else "unread")

    def shown(self) -> tuple[api.Check, ...]:
        """The checks under way."""
        return tuple(self.view(release) for release in sorted(self._checks))

    def cancel(self) -> None:
        """End what is under way, and forget it."""
        for check in self._checks.values():
            _end(check)

    async def _check(self, release: str, reading: Reading) -> None:
        try:
            async with self._turn if reading.from_disk else contextlib.nullcontext():
                await self._examine(release, reading)
        except NotFound:
            log.info("release %s was removed while its files were read", release)
        except Exception:
            log.exception("the files of %s could not be read; trying again", release)
            await asyncio.sleep(RETRY_SECONDS)
        finally:
            if (check := self._checks.get(release)) and check.reading is reading:
                del self._checks[release]
            self._changed()

    async def _examine(self, release: str, reading: Reading) -> None:
        proof = self._releases.proof(release)
        seen = {} if reading.from_disk else proof.seen
        folder = self._home.releases / release
        found = await asyncio.to_thread(examine, folder, proof.manifest_sha256, seen, reading)
        if self._releases.proof(release).manifest_sha256 != proof.manifest_sha256:
            return
        if found.damage:
            log.error("release %s is damaged: %s", release, found.damage)
            self._releases.found_damaged(release, found.damage)
        else:
            self._releases.found_whole(release, Proof(found.seen[MANIFEST].sha256, found.seen))


def _end(check: _Check) -> None:
    check.reading.ended.set()
    check.task.cancel()
