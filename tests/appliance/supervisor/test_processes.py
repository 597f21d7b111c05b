"""Starting, finding and ending real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from appliance.errors import InvalidInput
from appliance.store.processes import ProcessRow
from appliance.supervisor import processes

FORKS = (
    "import os, signal, sys, time\n"
    "child = os.fork()\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN) if child == 0 else print(child, flush=True)\n"
    "time.sleep(60)\n"
)


def new_row() -> ProcessRow:
    return processes.new_row("worker", "run", "sft")


def start(tmp_path: Path, code: str) -> ProcessRow:
    return processes.spawn(
        new_row(),
        [sys.executable, "-c", code],
        dict(os.environ),
        tmp_path / "log.txt",
        tmp_path,
    )


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in 60 s"
        time.sleep(0.02)


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def test_output_goes_to_the_log_and_the_end_is_seen(tmp_path: Path) -> None:
    row = start(tmp_path, "import sys; print('out'); print('err', file=sys.stderr)")
    wait_for(lambda: not processes.alive(row))
    assert sorted((tmp_path / "log.txt").read_text().split()) == ["err", "out"]


@pytest.mark.parametrize(("code", "status"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 11)", -11)])
async def test_how_a_child_ended_is_known(tmp_path: Path, code: str, status: int) -> None:
    row = start(tmp_path, code)
    wait_for(lambda: not processes.alive(row))
    assert processes.exit_status(row) == status
    assert processes.exit_status(row) is None


async def test_killed_it_leaves_nobody_behind(tmp_path: Path) -> None:
    row = start(tmp_path, FORKS)
    wait_for(lambda: (tmp_path / "log.txt").read_text())
    child = int((tmp_path / "log.txt").read_text())
    processes.kill(row)
    wait_for(lambda: not processes.alive(row) and not exists(child))
    assert processes.exit_status(row) == -9


def test_the_kernels_kills_are_counted() -> None:
    assert processes.kernel_kills() >= 0


async def test_a_pid_with_another_start_time_is_not_the_process(tmp_path: Path) -> None:
    row = start(tmp_path, "import time; time.sleep(60)")
    other = ProcessRow(row.kind, row.owner, row.stage, row.pid, row.started + 1, row.boot)
    other_boot = ProcessRow(row.kind, row.owner, row.stage, row.pid, row.started, "another boot")
    assert processes.alive(row)
    assert not processes.alive(other)
    assert not processes.alive(other_boot)
    await processes.kill_group(other_boot)
    assert processes.alive(row)
    await processes.kill_group(row)
    assert not processes.alive(row)


async def test_stopping_reaps_children_that_ignore_sigterm(tmp_path: Path) -> None:
    row = start(tmp_path, FORKS)
    wait_for(lambda: (tmp_path / "log.txt").read_text().strip())
    child = int((tmp_path / "log.txt").read_text())
    await processes.stop_group(row, grace=5)
    assert not exists(child)
    assert not processes.alive(row)


async def test_children_of_a_dead_leader_are_found(tmp_path: Path) -> None:
    row = start(tmp_path, FORKS)
    wait_for(lambda: (tmp_path / "log.txt").read_text().strip())
    child = int((tmp_path / "log.txt").read_text())
    os.kill(row.pid, signal.SIGKILL)
    wait_for(lambda: not processes.alive(row))
    assert exists(child)
    await processes.kill_group(row)
    assert not exists(child)


async def test_unrecorded_children_of_this_home_are_killed_and_no_others(tmp_path: Path) -> None:
    recorded = start(tmp_path, "import time; time.sleep(60)")
    forgotten = start(tmp_path, "import time; time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True) as stranger:
        try:
            assert processes.kill_unrecorded(tmp_path, [recorded]) == 1
            wait_for(lambda: not processes.alive(forgotten))
            assert processes.alive(recorded)
            assert stranger.poll() is None
        finally:
            stranger.kill()
            await processes.kill_group(recorded)


async def test_a_missing_program_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot find the program no-such-program"):
        processes.spawn(new_row(), ["no-such-program"], {}, tmp_path / "log.txt", tmp_path)


def test_what_it_compiles_stays_in_the_home_unless_the_environment_says_where(tmp_path: Path) -> None:
    given = {"TRITON_CACHE_DIR": "/elsewhere"}
    row = processes.spawn(new_row(), ["/usr/bin/env"], given, tmp_path / "log.txt", tmp_path)
    while processes.alive(row):
        time.sleep(0.01)
    said = dict(line.split("=", 1) for line in (tmp_path / "log.txt").read_text().splitlines())
    assert said["VLLM_CACHE_ROOT"] == str(tmp_path / "compiled" / "vllm")
    assert said["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compiled" / "inductor")
    assert said["TRITON_CACHE_DIR"] == "/elsewhere"


async def test_whoever_has_the_pid_of_a_dead_child_now_is_left_alone(tmp_path: Path) -> None:
    """Its pid comes round as the session of somebody's shell, which has started later."""
    with subprocess.Popen([sys.executable, "-c", FORKS], start_new_session=True, stdout=subprocess.PIPE) as stranger:
        assert stranger.stdout
        child = int(stranger.stdout.readline())
        try:
            mine = start(tmp_path, "import time; time.sleep(60)")
            row = replace(mine, pid=stranger.pid, started=1)
            wait_for(lambda: processes.members(row) == [mine.pid])  # what carries its mark, and nothing else
            await processes.kill_group(replace(row, mark="0" * 16))
            assert stranger.poll() is None
            assert exists(child)
        finally:
            os.kill(child, signal.SIGKILL)
            stranger.kill()
            await processes.kill_group(mine)


async def test_a_process_that_started_at_another_time_is_not_killed(tmp_path: Path) -> None:
    row = start(tmp_path, "import time; time.sleep(60)")
    await processes.kill_group(replace(row, started=row.started - 1, mark=""))
    await processes.kill_group(replace(row, started=row.started - 1, mark="0" * 16))
    assert processes.alive(row)
    await processes.kill_group(row)


async def test_what_may_not_be_killed_is_told_of_and_not_tried_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = start(tmp_path, "import time; time.sleep(60)")

    def refuse(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(processes, "KILL_SECONDS", 0.1)
        patch.setattr(processes.os, "kill", refuse)
        patch.setattr(processes.os, "killpg", refuse)
        processes.kill(row)
        assert await processes.stop_group(row, grace=0.1) == [row.pid]
    assert await processes.stop_group(row, grace=5) == []


async def test_a_child_with_a_title_of_its_own_still_carries_its_mark(tmp_path: Path) -> None:
    """What gives itself a title writes it where its arguments were, and by default over its environment too."""
    pytest.importorskip("setproctitle")
    code = "setproctitle.setproctitle('x' * 5000); print(1, flush=True); time.sleep(60)"
    row = start(tmp_path, f"import setproctitle, time; {code}")
    wait_for(lambda: (tmp_path / "log.txt").read_text())
    assert processes._belongs(row.pid, row)
    await processes.kill_group(row)


async def test_a_child_whose_first_thread_has_ended_lives_until_it_is_collected(tmp_path: Path) -> None:
    code = (
        "import ctypes, os\n"
        "libc = ctypes.CDLL(None)\n"
        "other = ctypes.c_ulong()\n"
        "libc.pthread_create(ctypes.byref(other), None, libc.sleep, ctypes.c_void_p(60))\n"
        "print(1, flush=True)\n"
        "libc.pthread_exit(None)\n"
    )
    row = start(tmp_path, code)
    wait_for(lambda: Path(f"/proc/{row.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    assert processes.alive(row)
    processes.kill(row)
    wait_for(lambda: not processes.alive(row))
    assert processes.exit_status(row) is not None
    assert not Path(f"/proc/{row.pid}").exists(), "it is no zombie"
