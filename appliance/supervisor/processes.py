"""Effects on processes: start, look, stop. Each child leads a session and process group of its own."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from appliance import gpu
from appliance.errors import InvalidInput
from appliance.home import Home
from appliance.store.processes import Kind, ProcessRow

MARK = "APPLIANCE_CHILD"
"""Environment variable of every child; its value is the home. It finds children that no record names."""

_CACHES = {
    "VLLM_CACHE_ROOT": "vllm",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}
"""By the variables that say where, the folders of the home that libraries keep compiled code in."""
_ends: dict[int, int] = {}
"""Exit statuses of dead children that nobody has asked for yet."""


def spawn(
    kind: Kind,
    owner: str,
    stage: str,
    argv: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    home: Path,
    address: str = "",
) -> ProcessRow:
    """Start a child whose output is appended to `log`, and return how to find it again.

    Where `environment` says nothing else, it keeps what it compiles in the home.

    Raises InvalidInput where the program cannot be started.
    """
    program = shutil.which(argv[0])
    if program is None:
        raise InvalidInput("no_program", f"cannot find the program {argv[0]}", "install the appliance again")
    output = (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    pid = os.posix_spawn(
        program,
        list(argv),
        {**_caches(Home(home)), **environment, **gpu.environment(), MARK: str(home)},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            output,
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
    )
    return ProcessRow(kind, owner, stage, pid, _start_ticks(pid) or 0, _boot_id(), address)


def _caches(home: Home) -> dict[str, str]:
    return {variable: str(home.compiled / name) for variable, name in _CACHES.items()}


def alive(row: ProcessRow) -> bool:
    """Whether the very process of `row` still runs. Collects it if it is a dead child of ours."""
    with contextlib.suppress(ChildProcessError):
        pid, status = os.waitpid(row.pid, os.WNOHANG)
        if pid:
            _ends[row.pid] = os.waitstatus_to_exitcode(status)
    return row.boot == _boot_id() and _start_ticks(row.pid) == row.started


def exit_status(row: ProcessRow) -> int | None:
    """Exit status of a dead child, negative for the signal that ended it; None where it was not ours to wait for."""
    return _ends.pop(row.pid, None)


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
    """End the process and its group at once."""
    if alive(row):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(row.pid, signal.SIGKILL)


def terminate(row: ProcessRow) -> None:
    """Ask the process to end."""
    if alive(row):
        with contextlib.suppress(ProcessLookupError):
            os.kill(row.pid, signal.SIGTERM)


async def stop_group(row: ProcessRow, grace: float) -> None:
    """Ask the process to end, wait up to `grace` seconds, then kill whatever is left of its group and wait for that."""
    terminate(row)
    deadline = time.monotonic() + grace
    while alive(row) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    await kill_group(row)


async def kill_group(row: ProcessRow) -> None:
    """Kill all that is left of the group, also after its leader: a dead server's children hold memory."""
    while pids := members(row):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.05)
        alive(row)


def members(row: ProcessRow) -> list[int]:
    """The living processes of the session that the process of `row` leads or led."""
    return [pid for pid in psutil.pids() if _belongs(pid, row)]


def kill_unrecorded(home: Path, rows: Sequence[ProcessRow]) -> int:
    """Kill children of this home that no row names (a daemon died between starting and recording one); their number."""
    recorded = {row.pid for row in rows}
    killed = 0
    for pid in psutil.pids():
        with contextlib.suppress(OSError, psutil.Error):
            if psutil.Process(pid).environ().get(MARK) == str(home) and os.getsid(pid) not in recorded:
                os.kill(pid, signal.SIGKILL)
                killed += 1
    return killed


def _belongs(pid: int, row: ProcessRow) -> bool:
    """Whether `pid` is a living member of the session that the process of `row` leads or led."""
    try:
        started = _start_ticks(pid) if row.boot == _boot_id() else None
        return started is not None and started >= row.started and os.getsid(pid) == row.pid
    except ProcessLookupError:
        return False


@functools.cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _start_ticks(pid: int) -> int | None:
    """Start time of a living process in clock ticks since boot, which no change of the clock moves; None: dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])
