"""The terminal as it really is: it may go away, and it may not know every character."""

from __future__ import annotations

import asyncio
import locale
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Mapping
from types import FrameType

from rich.segment import Segment
from textual.color import Color
from textual.filter import LineFilter

_GRACE = 3.0
_PLAIN_TERMINALS = ("linux", "dumb", "vt100", "vt220")


def leave_with_terminal(leave: Callable[[], object], fileno: int) -> None:
    """Call `leave` in the running loop when the terminal behind `fileno` hangs up, or on SIGHUP and SIGTERM.

    Textual takes the end of its input for a pause and reads on for ever, and blocks for ever once what it writes
    is not taken; so the terminal is watched from a thread that ends the process if the loop does not.
    """
    loop = asyncio.get_running_loop()
    for number in (signal.SIGHUP, signal.SIGTERM):
        loop.add_signal_handler(number, leave)
    _continue_on_a_terminal_only(fileno)

    def watch() -> None:
        poll = select.poll()
        poll.register(fileno, 0)  # A hang-up is reported whatever is asked for.
        poll.poll()
        loop.call_soon_threadsafe(leave)
        time.sleep(_GRACE)
        os._exit(128 + signal.SIGHUP)

    if os.isatty(fileno):
        threading.Thread(target=watch, name="terminal-watch", daemon=True).start()


def _continue_on_a_terminal_only(fileno: int) -> None:
    """Keep Textual's SIGCONT handler from the SIGCONT that the kernel sends after a hang-up's SIGHUP.

    It would start its output a second time, on a terminal that is gone.
    """
    resume = signal.getsignal(signal.SIGCONT)

    def on_continue(number: int, frame: FrameType | None) -> None:
        if callable(resume) and os.isatty(fileno):
            resume(number, frame)

    signal.signal(signal.SIGCONT, on_continue)


def only_ascii(environ: Mapping[str, str]) -> bool:
    """Whether the terminal can be trusted with ASCII only."""
    return environ.get("TERM") in _PLAIN_TERMINALS or locale.getpreferredencoding(False).upper() not in (
        "UTF-8",
        "UTF8",
    )


class AsciiFilter(LineFilter):
    """Draws borders, glyphs and braille with ASCII characters. Text is left as it is."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        return [Segment(text.translate(_ASCII), style, control) for text, style, control in segments]


def _ascii_table() -> dict[int, str]:
    table = {0x2800: " "}
    for mask in range(1, 256):
        upper, lower = mask & 0x1B, mask & 0xE4
        table[0x2800 + mask] = ":" if upper and lower else "'" if upper else "."
    for characters, replacement in (
        ("─━╌╍╸╺═▔▁▂▄▀", "-"),
        ("│┃┊╎║▏▕▎▊▌▐", "|"),
        ("╭╮╰╯┌┐└┘├┤┬┴┼┏┓┗┛╔╗╚╝", "+"),
        ("▶→", ">"),
        ("●◆", "*"),
        ("○•", "o"),
        ("◐", "~"),
        ("■█▅▆▇", "#"),
        ("✓", "+"),
        ("✗", "x"),
        ("–", "-"),
        ("·", "."),
        ("…", "."),
        ("“”", '"'),
        ("⏎", "<"),
    ):
        table |= {ord(character): replacement for character in characters}
    return table


_ASCII = _ascii_table()
