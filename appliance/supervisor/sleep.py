"""Engines that give the memory of the GPU back for a while, and how it is seen that they have."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from appliance import hardware
from appliance.store.processes import ProcessRow
from appliance.supervisor import processes
from appliance.supervisor.engines import EngineKind

log = logging.getLogger(__name__)

SLEEP_SECONDS = 60.0
"""How long an engine may take to fall asleep."""
FREE_SECONDS = 10.0
"""How long it may then take until its memory is seen to be free: what the driver takes back comes within these."""
LOOK_SECONDS = 0.1
"""Between two looks at that."""
KEPT_SHARE = 16
"""An engine that sleeps may keep a sixteenth of the GPU's memory: CUDA's context, graphs, and the like."""
_SPARED_SHARE = 64
"""As much may be missing besides, when it is to wake."""


class Sleep:
    """Whether engines can sleep here, and how one falls asleep and may wake."""

    def __init__(self, kind: EngineKind) -> None:
        self.kept = 0
        """Bytes that the engine which fell asleep last keeps."""
        self.started = False
        """Whether an engine that can sleep has been seen ready."""
        self._kind = kind
        self._most_free = 0

    @property
    def possible(self) -> bool:
        """Whether an engine can sleep, and what it keeps can be seen: it was this daemon that started one."""
        return self._kind.sleeps and self._most_free > 0

    def before_start(self) -> None:
        """Look how much memory there is without an engine, as one is about to be started."""
        if self._kind.sleeps:
            self._most_free = max(self._most_free, hardware.free_memory() or 0)

    def doubt(self) -> None:
        """An engine has failed: where none has ever started, the next is started as one that cannot sleep."""
        if self._kind.sleeps and not self.started:
            self._kind.sleeps = False
            log.warning("no engine has started that could sleep: from now on they are stopped instead")

    async def fall_asleep(self, row: ProcessRow) -> None:
        """Let an engine that answers nobody fall asleep, and see that it has.

        Raises TimeoutError where that takes too long, ConnectionError where it fails, and ApplianceError where the
        engine refuses.
        """
        async with asyncio.timeout(SLEEP_SECONDS):
            await self._kind.sleep(row.address)
        self.kept = await self._seen_to_keep(row)
        log.info("the engine of %s sleeps, and keeps %d MiB", row.owner, self.kept >> 20)

    async def until_it_may_wake(self) -> None:
        """Wait until what a worker had is free again, as long as the driver may take; with less an engine fails."""
        spared = (hardware.total_memory() or 0) // _SPARED_SHARE
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FREE_SECONDS):
                while self._missing() > self.kept + spared:
                    await asyncio.sleep(LOOK_SECONDS)

    async def _seen_to_keep(self, row: ProcessRow) -> int:
        """Bytes that it keeps, as soon as they are few enough: what is missing, or what the driver says of it.

        Raises ConnectionError where they do not become so few: the next engine would keep as much, and cannot sleep.
        """
        most = (hardware.total_memory() or 0) // KEPT_SHARE
        try:
            async with asyncio.timeout(FREE_SECONDS):
                while (kept := max(self._missing(), hardware.held_by(set(processes.members(row))))) > most:
                    await asyncio.sleep(LOOK_SECONDS)
        except TimeoutError:
            self._kind.sleeps = False
            raise ConnectionError("it keeps too much memory, and from now on engines are stopped instead") from None
        return kept

    def _missing(self) -> int:
        """Bytes that are less free than when an engine was to be started."""
        return max(0, self._most_free - (hardware.free_memory() or 0))
