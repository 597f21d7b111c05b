"""What it says of an engine that it could not be asked."""

from __future__ import annotations

import asyncio
import errno

import pytest

from appliance.settings import Settings
from serve.engines.transformers import TransformersEngine


@pytest.mark.parametrize(("number", "raises"), [(errno.EMFILE, True), (errno.ECONNREFUSED, False)])
async def test_what_keeps_this_process_from_asking_is_no_answer(
    monkeypatch: pytest.MonkeyPatch, number: int, raises: bool
) -> None:
    async def connect(*arguments: object, **named: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(asyncio.get_running_loop(), "create_unix_connection", connect)
    asked = TransformersEngine(Settings()).ready("unix:/nowhere")
    if raises:
        with pytest.raises(OSError, match=r"Errno 24"):
            await asked
    else:
        assert await asked is False
