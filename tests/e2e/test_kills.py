"""kill -9 on the daemon, the worker and the engine: the run still ends with a live verified release."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from box import box
from test_loop import RECIPE, prepare

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.thorough]


async def test_three_kills_in_one_run(smollm2: Path) -> None:
    async with box(smollm2) as running:
        await prepare(running)
        run = (await running.client.train(RECIPE.replace("evaluate_every = 100", "checkpoint_every = 2"))).id

        await running.until_event(run, "step", "sft", 300)
        worker = running.pid("worker", run)
        running.kill_daemon()
        await asyncio.sleep(1)
        assert worker is not None
        os.kill(worker, 0)
        running.start()
        await running.until_event(run, "checkpoint", "sft", 300)
        assert running.pid("worker", run) == worker, "the new daemon goes on with the worker that it finds"

        await running.until_event(run, "stage_started", "dpo", 600)
        running.kill("worker", run)
        running.kill_daemon()
        running.start()
        await running.until_event(run, "warning", "dpo", 60)

        async def engine() -> int | None:
            return running.pid("engine", run)

        await running.until("the candidate's engine", engine, 600, run)
        running.kill("engine", run)

        await running.until_live(run, 600)
        killed = running.kill("engine", run)

        async def another_engine() -> bool:
            return running.pid("engine", run) not in (None, killed)

        await running.until("another engine", another_engine, 60)
        await running.until_live(run, 300)
