"""How the daemon begins and ends, as a process."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from shell import Shell

SCRIPT = """
from appliance.settings import load_settings
from serve import daemon
import asyncio

async def broken(self):
    await asyncio.sleep(0.5)
    raise RuntimeError("the bottom fell out")

daemon.%s = broken
import logging, sys
logging.basicConfig(stream=sys.stderr)
daemon.run(load_settings())
"""


def ready(shell: Shell, daemon: subprocess.Popen[str], **environment: str) -> None:
    deadline = time.monotonic() + 60
    while shell.run("status", **environment).returncode:
        assert daemon.poll() is None, daemon.communicate()
        assert time.monotonic() < deadline


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_it_ends_in_order(lonely: Shell, number: signal.Signals) -> None:
    daemon = lonely.start()
    ready(lonely, daemon)
    daemon.send_signal(number)
    _, said = daemon.communicate(timeout=60)
    assert daemon.returncode == 0, said
    assert "stopping: workers write a checkpoint" in said
    assert not (lonely.home / "control.sock").exists()


def test_a_terminal_that_goes_ends_nothing_under_nohup(lonely: Shell) -> None:
    daemon = subprocess.Popen(
        ["nohup", sys.executable, "-m", "appliance.cli", "serve"],
        env={**lonely.environment, "APPLIANCE_PORT": "0"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    ready(lonely, daemon)
    daemon.send_signal(signal.SIGHUP)
    assert lonely.run("status").returncode == 0
    daemon.terminate()
    daemon.communicate(timeout=60)
    assert daemon.returncode == 0


@pytest.mark.parametrize(("part", "name"), [("Supervisor.serve", "supervisor"), ("Server.serve", "control API")])
def test_what_ended_a_part_of_it_is_in_the_log(lonely: Shell, part: str, name: str) -> None:
    script = SCRIPT % part
    if part == "Server.serve":
        script = script.replace("async def broken(self)", "async def broken(self, listeners)")
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**lonely.environment, "APPLIANCE_PORT": "0"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "RuntimeError: the bottom fell out" in done.stderr
    assert f"{name} ended by itself" in done.stderr


def test_two_homes_do_not_share_a_socket(lonely: Shell, tmp_path: Path) -> None:
    shared = str(tmp_path / "s.sock")
    daemon = lonely.start(APPLIANCE_SOCKET=shared)
    ready(lonely, daemon, APPLIANCE_SOCKET=shared)
    other = Shell(tmp_path / "other")
    said = other.refuses(5, "serve", APPLIANCE_SOCKET=shared, APPLIANCE_PORT="0")
    assert "another home listens" in said
    shown = json.loads(other.run("status", "--json", APPLIANCE_SOCKET=shared).stdout)
    assert shown["home"] == str(lonely.home)
    daemon.kill()
    daemon.communicate()
    second = other.start(APPLIANCE_SOCKET=shared)
    ready(other, second, APPLIANCE_SOCKET=shared)
    other.kill()


def test_an_address_of_systemd_that_nobody_listens_on(lonely: Shell, tmp_path: Path) -> None:
    stale = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as gone:
        gone.bind(str(stale))
    daemon = lonely.start(NOTIFY_SOCKET=str(stale))
    ready(lonely, daemon)
    daemon.terminate()
    daemon.communicate(timeout=60)
    assert daemon.returncode == 0
