"""What the readers of the daemon's streams tell the app and its pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from textual.message import Message

from tui.link import Link
from tui.viewmodels.box import Box


@dataclass
class BoxRead(Message):
    """The daemon answered; this is the box now."""

    box: Box


@dataclass
class LinkLost(Message):
    """The daemon did not answer."""

    link: Link


@dataclass
class RunSaid(Message):
    """New events of a run."""

    run: str
    events: list[dict[str, Any]]


@dataclass
class RunLogged(Message):
    """More of a run's log, from the character `position` on."""

    run: str
    position: int
    piece: str
