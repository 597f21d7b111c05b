"""What the client says of a daemon that does not answer."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import httpx
import pytest

from appliance.client import Client
from appliance.errors import ApplianceError, Exit, NotAllowed, NotFound, Unanswered, Unreachable
from appliance.home import is_there

SOCKET = Path("/run/x/control.sock")


def client(failure: Exception | httpx.Response) -> Client:
    """A client whose daemon does only this."""

    def answer(request: httpx.Request) -> httpx.Response:
        if isinstance(failure, Exception):
            raise failure
        return failure

    return Client(SOCKET, httpx.MockTransport(answer))


@pytest.mark.parametrize("late", [httpx.ReadTimeout, httpx.WriteTimeout, httpx.PoolTimeout, httpx.ConnectTimeout])
async def test_a_daemon_that_is_late_is_not_said_to_be_missing(late: type[httpx.TimeoutException]) -> None:
    with pytest.raises(Unanswered, match="is there, and has not answered in time") as told:
        await client(late("")).status()
    assert told.value.exit == Exit.FAILED
    assert "appliance serve" not in told.value.next
    with pytest.raises(Unanswered):
        async for _ in client(late("")).follow("r-1"):
            pass


async def test_a_socket_that_may_not_be_used_is_told_with_its_group() -> None:
    refused = httpx.ConnectError("all connection attempts failed")
    refused.__cause__ = PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(NotAllowed, match="may not be used") as told:
        await client(refused).status()
    assert "usermod -aG appliance" in told.value.next


async def test_a_socket_in_a_directory_of_another_group(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("becoming another user needs root")
    tmp_path.chmod(0o700)
    async with Client(tmp_path / "control.sock") as asking:
        os.seteuid(65534)
        try:
            with pytest.raises(NotAllowed, match="may not be used"):
                await asking.status()
            assert is_there(tmp_path / "control.sock")
        finally:
            os.seteuid(0)


async def test_no_daemon_and_one_that_ends_meanwhile() -> None:
    with pytest.raises(Unreachable, match="no daemon answers"):
        await client(httpx.ConnectError("")).status()
    with pytest.raises(Unreachable, match="ended before it had answered"):
        await client(httpx.RemoteProtocolError("")).status()


@pytest.mark.parametrize("name", ["evil\n", "a/../b", "\x1b[2J", "?x#y"])
async def test_any_name_can_be_asked_for(name: str) -> None:
    problem = {"code": "no_such_release", "message": "there is none", "next": "look"}
    with pytest.raises(NotFound):
        await client(httpx.Response(404, json=problem)).promote(name)


async def test_an_answer_that_is_none_of_ours() -> None:
    with pytest.raises(ApplianceError, match="answered 500"):
        await client(httpx.Response(500, text="Internal Server Error")).status()
