"""The daemon's start and end as systemd, a second daemon and other users of the box meet them."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from appliance.errors import InvalidInput
from appliance.home import Home
from appliance.store.database import open_database
from appliance.store.keys import Keys
from serve import daemon

INVENTED = Path(__file__).parent.parent / "e2e" / "invented_daemon.py"


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, "the daemon has ended"
        assert time.monotonic() < deadline, "it did not happen in 60 s"
        time.sleep(0.02)


@contextmanager
def started(home: Home, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real daemon, killed on leaving where it still runs."""
    settings = {"APPLIANCE_HOME": str(home.root), "APPLIANCE_PORT": "0"}
    home.root.mkdir(exist_ok=True)
    with open(home.root / "daemon.log", "ab") as log:
        process = subprocess.Popen(
            [sys.executable, str(INVENTED)], env={**os.environ, **settings, **environment}, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_systemd_hears_that_it_is_ready_that_it_lives_and_that_it_stops(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with closing(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(60)
        with started(home, NOTIFY_SOCKET=str(tmp_path / "notify")) as process:
            heard = {systemd.recv(100), systemd.recv(100)}
            assert heard == {b"READY=1", b"WATCHDOG=1"}
            process.send_signal(signal.SIGTERM)
            assert systemd.recv(100) == b"STOPPING=1"
            assert process.wait(60) == 0


def test_stopped_it_leaves_nothing_behind(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with started(home) as process:
        wait_for(lambda: "chat endpoint" in (home.root / "daemon.log").read_text(), process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert not home.control_socket().exists()
    with closing(open_database(home.database)) as db:
        assert db.execute("SELECT count(*) FROM processes").fetchone()[0] == 0
    assert "Traceback" not in (home.root / "daemon.log").read_text()


def test_its_group_may_operate_it_and_nobody_else(tmp_path: Path) -> None:
    listener = daemon._listen_unix(tmp_path / "control.sock")
    with closing(listener):
        assert stat.S_IMODE((tmp_path / "control.sock").stat().st_mode) == 0o660


def refusal(home: Home, **environment: str) -> str:
    """What a daemon that is not to begin says as it ends."""
    with started(home, **environment) as process:
        assert process.wait(20) != 0
    return (home.root / "daemon.log").read_text().splitlines()[-1]


def test_a_home_has_one_daemon(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with started(home) as process:
        wait_for(lambda: "chat endpoint" in (home.root / "daemon.log").read_text(), process)
        assert f"a daemon (pid {process.pid}) serves {home.root} already" in refusal(home)
        assert home.control_socket().exists(), "the first one can still be asked"
    with started(home) as process:
        wait_for(lambda: (home.root / "daemon.log").read_text().count("chat endpoint") == 2, process)


@pytest.mark.parametrize("revoked", [True, False])
def test_no_address_of_the_network_is_opened_without_a_key(tmp_path: Path, revoked: bool) -> None:
    home = Home(tmp_path / "home")
    home.create()
    if revoked:
        with closing(open_database(home.database)) as db:
            keys = Keys(db)
            keys.revoke(keys.create("laptop").id)
    said = refusal(home, APPLIANCE_HOST="0.0.0.0")
    assert "the endpoint is not opened on 0.0.0.0 while there is no API key" in said
    assert "`appliance keys create NAME`" in said
    assert not home.control_socket().exists()


def test_a_home_that_is_too_long_for_a_socket_is_refused_before_anything_begins(tmp_path: Path) -> None:
    root = Path("/tmp") / ("h" * (107 - len("/tmp/" + "/engines/12345678.sock") + 1))
    with pytest.raises(InvalidInput, match="engine's socket"):
        Home(root, socket=str(tmp_path / "s")).create()
    with pytest.raises(InvalidInput, match="engine's socket"):
        Home(root).create()
    assert not root.exists()
    longest = Home(Path(str(root)[:-1]))
    assert len(str(longest.engine_socket())) == 107
