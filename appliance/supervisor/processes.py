"""Effects on processes: start, look, stop. Each child leads a session and process group of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import secrets
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import psutil

from appliance import gpu
from appliance.errors import InvalidInput
from appliance.home import Home
from appliance.store.processes import Kind, Processes, ProcessRow

MARK = "APPLIANCE_CHILD"
"""Environment variable of every child and of what that starts: the mark in its row, a colon, the home."""
KILL_SECONDS = 5.0
"""How long a killed process is waited for before it counts as one that does not end."""

_CACHES = {
    "VLLM_CACHE_ROOT": "vllm",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}
"""By the variables that say where, the folders of the home that libraries keep compiled code in."""
_ends: dict[tuple[int, int], int] = {}
"""Exit statuses of dead children that nobody has asked for yet, by pid and start."""
_unrecorded: set[int] = set()
"""Children that were killed because they could not be recorded, and are still to be collected."""


def new_row(kind: Kind, owner: str, stage: str = "", address: str = "") -> ProcessRow:
    """The record of a child that is about to be started."""
    mark = secrets.token_hex(8)
    return ProcessRow(kind, owner, stage, address=address, mark=mark, life="starting" if kind == "engine" else "")


def start(
    records: Processes, row: ProcessRow, argv: Sequence[str], environment: Mapping[str, str], log: Path, home: Path
) -> ProcessRow:
    """Start the child of `row` and record which process it is. A process that cannot be recorded is killed at once.

    Raises InvalidInput where the program is missing, OSError where there can be no more processes, and sqlite3.Error
    where the database cannot be written to; then nothing runs, and the row, where there is one, has no pid.
    """
    while _unrecorded and _collected(next(iter(_unrecorded))):
        _unrecorded.pop()
    records.add(row)
    started = spawn(row, argv, environment, log, home)
    try:
        records.add(started)
    except BaseException:
        kill(started)
        _unrecorded.add(started.pid)
        raise
    return started


def spawn(row: ProcessRow, argv: Sequence[str], environment: Mapping[str, str], log: Path, home: Path) -> ProcessRow:
    """Start a child whose output is appended to `log`, and return `row` with how to find it again.

    Where `environment` says nothing else, it keeps what it compiles in the home.

    Raises InvalidInput where the program cannot be found.
    """
    program = shutil.which(argv[0])
    if program is None:
        raise InvalidInput("no_program", f"cannot find the program {argv[0]}", "install the appliance again")
    output = (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    # With SPT_NOENV a process that gives itself a title, as vLLM's do, does not write it over its environment.
    ours = {**gpu.environment(), MARK: f"{row.mark}:{home}", "SPT_NOENV": "1"}
    pid = os.posix_spawn(
        program,
        list(argv),
        {**_caches(Home(home)), **environment, **ours},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            output,
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    return replace(row, pid=pid, started=_stat(pid)[1], boot=_boot_id())


def _caches(home: Home) -> dict[str, str]:
    return {variable: str(home.compiled / name) for variable, name in _CACHES.items()}


def alive(row: ProcessRow) -> bool:
    """Whether the very process of `row` still runs. Collects it if it is a dead child of ours.

    A child of ours whose leading thread has ended before the others is alive until it can be collected.
    """
    if not row.pid or row.boot != _boot_id():
        return False
    state, started = _stat(row.pid)
    if started != row.started:
        return False
    try:
        pid, status = os.waitpid(row.pid, os.WNOHANG)
    except ChildProcessError:
        return state not in "ZX"
    if pid:
        _ends[row.pid, row.started] = os.waitstatus_to_exitcode(status)
    return not pid


def exit_status(row: ProcessRow) -> int | None:
    """Exit status of a dead child, negative for the signal that ended it; None where it was not ours to wait for."""
    return _ends.pop((row.pid, row.started), None)


def kernel_kills() -> int:
    """How often the kernel has killed for want of memory: in our control group, else on the whole machine."""
    group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
    for counters in (Path("/sys/fs/cgroup", group, "memory.events"), Path("/proc/vmstat")):
        with contextlib.suppress(OSError):
            found = dict(line.split() for line in counters.read_text().splitlines())
            if "oom_kill" in found:
                return int(found["oom_kill"])
    return 0


def kill(row: ProcessRow) -> None:
    """End the process and its group at once. It may take a while to be gone, or not be ours to end."""
    if alive(row):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(row.pid, signal.SIGKILL)


def terminate(row: ProcessRow) -> None:
    """Ask the process to end."""
    if alive(row):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(row.pid, signal.SIGTERM)


async def stop_group(row: ProcessRow, grace: float) -> list[int]:
    """Ask the process to end, wait up to `grace` seconds, then kill whatever is left of it; see `kill_group`."""
    terminate(row)
    deadline = time.monotonic() + grace
    while alive(row) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    return await kill_group(row)


async def kill_group(row: ProcessRow) -> list[int]:
    """Kill all that is left of the process, also after its leader: a dead server's children hold memory.

    Returns what has not ended within `KILL_SECONDS`: an operation of a driver may not be interrupted.
    """
    deadline = time.monotonic() + KILL_SECONDS
    while (pids := members(row)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.05)
    return pids


def members(row: ProcessRow) -> list[int]:
    """The process of `row`, and the living ones that carry its mark, wherever they have gone."""
    leader = [row.pid] if alive(row) else []
    return leader + [pid for pid in psutil.pids() if pid != row.pid and _belongs(pid, row)]


def kill_unrecorded(home: Path, rows: Sequence[ProcessRow]) -> int:
    """Kill children of this home that no row names (a daemon died between starting and recording one); their number."""
    recorded = {row.mark for row in rows if row.pid}
    killed = 0
    for pid in psutil.pids():
        mark, _, where = _mark(pid).partition(":")
        if where == str(home) and mark not in recorded:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
                killed += 1
    return killed


def _belongs(pid: int, row: ProcessRow) -> bool:
    """Whether `pid` is a living process with the mark of `row`."""
    return bool(row.mark) and _mark(pid).startswith(f"{row.mark}:") and _stat(pid)[0] not in "ZX"


def _mark(pid: int) -> str:
    """The mark and the home of a child of some daemon; empty for other processes, and for those of other users."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return ""
    ours = (one for one in environment.split(b"\0") if one.startswith(f"{MARK}=".encode()))
    return os.fsdecode(next(ours, b"").partition(b"=")[2])


def _collected(pid: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, os.WNOHANG)[0] != 0
    return True


@functools.cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> tuple[str, int]:
    """State of a process, Z for one that is to be collected and X for none, and its start in clock ticks since boot,
    which no change of the clock moves."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "X", -1
    return fields[0], int(fields[19])
