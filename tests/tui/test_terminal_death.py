"""The dashboard in a real terminal that goes away, or knows ASCII only."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from rich.segment import Segment
from textual.color import Color

from tui.terminal import AsciiFilter, only_ascii

ROOT = Path(__file__).parents[2]
PROGRAM = "import sys; from pathlib import Path; from tui.app import run; sys.exit(run(Path(sys.argv[1])))"


class Terminal:
    """The dashboard without a daemon, its terminal's master end in our hands."""

    def __init__(self, socket: Path, controlling: bool) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "TERM": "xterm-256color", "SSH_CONNECTION": "there", "LC_ALL": "C.UTF-8"}
        command = [sys.executable, "-c", PROGRAM, str(socket)]
        if controlling:
            command = ["setsid", "--ctty", "--wait", *command]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, cwd=ROOT, start_new_session=True
        )
        os.close(slave)
        self.output = b""

    def read_until(self, text: bytes, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while text not in self.output:
            ready, _, _ = select.select([self.master], [], [], 0.2)
            if ready:
                try:
                    self.output += os.read(self.master, 65536)
                except OSError:
                    break
            assert time.monotonic() < end, self.output

    def dashboard(self) -> psutil.Process:
        """The process of the dashboard itself."""
        process = psutil.Process(self.process.pid)
        return next(iter(process.children()), process) if "setsid" in process.name() else process


@pytest.fixture(params=[False, True], ids=["silent hang-up", "with SIGHUP"])
def terminal(socket: Path, request: pytest.FixtureRequest) -> Iterator[Terminal]:
    terminal = Terminal(socket, controlling=request.param)
    yield terminal
    if terminal.process.poll() is None:
        os.killpg(terminal.process.pid, signal.SIGKILL)
    terminal.process.wait()


def test_dashboard_ends_with_its_terminal_and_without_spinning(terminal: Terminal) -> None:
    terminal.read_until(b"reconnecting")
    process = terminal.dashboard()
    used = sum(process.cpu_times()[:2])
    os.close(terminal.master)
    began = time.monotonic()
    spent = used
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        spent = sum(process.cpu_times()[:2])
        assert time.monotonic() - began < 60
        time.sleep(0.02)
    assert terminal.process.wait(timeout=60) == 0
    assert spent - used < 1.0


def test_sigterm_gives_the_terminal_back(socket: Path) -> None:
    terminal = Terminal(socket, controlling=False)
    terminal.read_until(b"reconnecting")
    terminal.process.terminate()
    terminal.read_until(b"\x1b[?1049l")
    assert terminal.process.wait(timeout=60) == 0
    os.close(terminal.master)


def test_ascii_terminals_are_known() -> None:
    assert only_ascii({"TERM": "linux"})
    assert only_ascii({"TERM": "dumb"})


def test_everything_drawn_has_an_ascii_form() -> None:
    drawn = "─│╭╮╰╯┊└┤┬▶○◐✓✗■●◆•→━⠀⠁⠉⣀⣿…–“”"
    (segment,) = AsciiFilter().apply([Segment(drawn)], Color(0, 0, 0))
    assert segment.text.isascii()
    assert len(segment.text) == len(drawn)
    assert AsciiFilter().apply([Segment("⠉⣀⣿⠀ é")], Color(0, 0, 0))[0].text == "'.:  é"
