"""`appliance serve`: the supervisor, the control API and the gateway, in one process without torch."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import ipaddress
import logging
import os
import shutil
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from appliance import hardware
from appliance.canary import Comparison
from appliance.errors import ApplianceError, Conflict, InvalidInput, NotAllowed
from appliance.home import Home
from appliance.probe_gpu import require_working_gpu
from appliance.settings import Settings
from appliance.store.database import open_database
from appliance.store.keys import Keys
from appliance.store.releases import Releases
from appliance.store.runs import Runs
from appliance.supervisor.supervisor import Supervisor
from appliance.traffic import Traffic
from serve.absence import Absences
from serve.control.app import control_app
from serve.control.models import Pulls
from serve.engines.choose import choose_engine
from serve.gateway.admission import Route
from serve.gateway.edge import Gateway
from serve.gateway.ledger import Ledger
from serve.notify import notify
from serve.wire.door import Limits, Server, limits_by_descriptors

log = logging.getLogger(__name__)

WORKER_GRACE_SECONDS = 20.0
_FOR_OPERATORS = Limits(whole_seconds=None, unread_seconds=None, connections=128, backlog=32)
"""Of the control socket: an upload takes its time, and who follows a log may stop reading for a while."""
_ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""SIGHUP comes where the terminal goes that the daemon was started in."""


def run(settings: Settings) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP. Raises ApplianceError where it cannot begin."""
    home = Home(settings.home, settings.socket)
    home.create()
    require_working_gpu()
    with _only_daemon(home), contextlib.closing(open_database(home.database)) as db:
        _empty(home.incoming)
        asyncio.run(_serve(settings, home, db))


async def _serve(settings: Settings, home: Home, db: sqlite3.Connection) -> None:
    keys = Keys(db)
    if not _is_loopback(settings.host) and not keys.any_valid():
        raise NotAllowed(
            "no_keys",
            f"the endpoint is not opened on {settings.host} while there is no API key",
            "start on loopback, make one with `appliance keys create NAME`, then start again",
        )
    engine = choose_engine(settings)
    traffic = Traffic(home.traffic, settings.traffic_days, settings.traffic_gib)
    traffic.start()
    releases = Releases(db)
    exclusive = settings.lease == "exclusive" or (settings.lease == "auto" and hardware.has_gpu())
    gateway = Gateway(
        keys.authenticate,
        Ledger(traffic),
        engine,
        wanted=releases.wanted,
        hold_seconds=settings.drain_seconds + 60,
        absence=Absences(home, releases, Runs(db), exclusive).now,
    )
    supervisor = Supervisor(
        home,
        db,
        engine,
        _Frontage(gateway),
        exclusive=exclusive,
        on_tick=_watchdog(),
        canary_requests=settings.canary_requests,
        drain_seconds=settings.drain_seconds,
        ratings=traffic.ratings,
    )
    public = _listen_tcp(settings.host, settings.port)
    control = _listen_unix(home.control_socket())
    endpoint = f"http://{settings.host}:{public.getsockname()[1]}/v1"
    pulls = Pulls(home)
    app = control_app(home, db, supervisor, keys, pulls, endpoint, gateway.operator)
    servers = [Server(gateway, limits_by_descriptors()), Server(app, _FOR_OPERATORS)]
    serving = [
        asyncio.create_task(server.serve([listener]), name=name)
        for server, listener, name in zip(servers, (public, control), ("chat endpoint", "control API"), strict=True)
    ]
    ended = asyncio.Event()
    for number in _ENDING_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it for SIGHUP
            asyncio.get_running_loop().add_signal_handler(number, ended.set)
    supervising = asyncio.create_task(supervisor.serve(), name="supervisor")
    notify("READY=1")
    log.info("chat endpoint %s, control socket %s, engine %s", endpoint, home.control_socket(), engine.name)
    waiting = asyncio.create_task(ended.wait())
    parts = [supervising, *serving]
    await asyncio.wait([waiting, *parts], return_when=asyncio.FIRST_COMPLETED)
    broken = [part for part in parts if part.done()]
    for part in broken:
        log.error("the %s ended by itself", part.get_name(), exc_info=part.exception())
    notify("STOPPING=1")
    log.info("stopping: workers write a checkpoint, answers under way are finished")
    supervising.cancel()
    waiting.cancel()
    await asyncio.gather(supervising, waiting, return_exceptions=True)
    gateway.hold(False)
    for server in servers:
        server.should_exit = True
    await asyncio.gather(*serving, return_exceptions=True)
    await asyncio.to_thread(traffic.close)
    await asyncio.gather(pulls.close(), supervisor.close(WORKER_GRACE_SECONDS))
    home.control_socket().unlink(missing_ok=True)
    if broken:
        names = " and ".join(part.get_name() for part in broken)
        raise ApplianceError("daemon_failed", f"the {names} ended by itself", "see the log above, then start again")


class _Frontage:
    """Tells the gateway of the supervisor's choice."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def route(self, model: str | None, address: str, beneath: str | None) -> None:
        self._gateway.route(Route(address, model, beneath) if model else None)

    def hold(self, on: bool) -> None:
        self._gateway.hold(on)

    def route_canary(self, release: str, address: str, share: float, comparison: Comparison) -> None:
        self._gateway.route_canary(Route(address, release), share, comparison)

    def end_canary(self) -> None:
        self._gateway.end_canary()

    async def drained(self, address: str, timeout: float) -> None:
        await self._gateway.drained(address, timeout)


@contextlib.contextmanager
def _only_daemon(home: Home) -> Iterator[None]:
    """Hold the home's lock. Raises Conflict where another daemon does."""
    with open(home.lock, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise Conflict(
                "already_running",
                f"a daemon (pid {file.read().strip() or '?'}) serves {home.root} already",
                "use it, or set APPLIANCE_HOME to another directory",
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def _listen_tcp(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, or asyncio leaves Nagle's algorithm on, which holds pieces of an answer back for 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise Conflict(
                "port_in_use",
                f"port {port} on {host} is in use",
                "set APPLIANCE_PORT (or --port) to a free one",
            ) from None
        raise InvalidInput(
            "cannot_listen",
            f"cannot listen on {host}:{port}: {error.strerror}",
            "check APPLIANCE_HOST and APPLIANCE_PORT",
        ) from None
    return listener


def _listen_unix(path: Path) -> socket.socket:
    """The control socket, for its group. Raises Conflict where a daemon of another home listens there."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if _is_listened_to(path):
            raise Conflict(
                "socket_in_use",
                f"a daemon of another home listens on {path}",
                "use that one, or set APPLIANCE_SOCKET to another path",
            )
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        os.chmod(path, 0o660)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise InvalidInput(
            "cannot_listen", f"cannot listen on {path}: {error.strerror}", "check APPLIANCE_SOCKET"
        ) from None
    return listener


def _is_listened_to(path: Path) -> bool:
    """Whether a process, however busy, has this socket open."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
        caller.setblocking(False)
        return caller.connect_ex(str(path)) in (0, errno.EAGAIN, errno.EINPROGRESS)


def _watchdog() -> Callable[[], None]:
    """A function that tells systemd, a few times a minute, that the supervisor's loop is alive."""
    last = 0.0

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > 5:
            last = time.monotonic()
            notify("WATCHDOG=1")

    return beat


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        shutil.rmtree(path, ignore_errors=True)
