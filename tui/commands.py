"""The keys, told once: the command palette and the help are both made from the bindings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from textual.app import App
from textual.binding import Binding
from textual.command import DiscoveryHit, Hit, Hits, Provider
from textual.types import IgnoreReturnCallbackType

from tui.dashboard import Dashboard

_MOVEMENTS = frozenset({"list", "lines", "rows", "text", "panes"})
"""Areas of bindings that only move about; the palette leaves them out."""


@dataclass(frozen=True)
class KeySection:
    """Bindings that belong together, each with its keys as they are shown."""

    title: str
    keys: list[tuple[str, Binding]]


def key_sections(app: App[Any]) -> list[KeySection]:
    """All bindings of the present screen, of the kinds of widgets in it, and of the app."""
    screen = app.screen
    kinds = [type(screen), type(app), *dict.fromkeys(type(widget) for widget in screen.query("*"))]
    sections = []
    seen: set[str] = set()
    for kind in kinds:
        keys = []
        for declaring in kind.__mro__:
            for binding in declaring.__dict__.get("BINDINGS", ()):
                if isinstance(binding, Binding) and binding.id and binding.id not in seen:
                    seen.add(binding.id)
                    keys.append((_shown_keys(app, binding), binding))
        if keys:
            sections.append(KeySection(kind.BINDING_GROUP_TITLE or kind.__name__, keys))
    return sections


def _shown_keys(app: App[Any], binding: Binding) -> str:
    return ", ".join(app.get_key_display(single) for single in Binding.make_bindings([binding]))


@dataclass(frozen=True)
class Command:
    """What the palette offers."""

    title: str
    help: str
    call: IgnoreReturnCallbackType


class ApplianceCommands(Provider):
    """Every action that has a key now, as `area: Verb`; and on a search every record, to go to."""

    async def discover(self) -> Hits:
        for command in self._actions():
            yield DiscoveryHit(command.title, command.call, help=command.help)

    async def search(self, query: str) -> Hits:
        matcher = self.matcher(query)
        for command in [*self._actions(), *self._records()]:
            if (score := matcher.match(command.title)) > 0:
                yield Hit(score, matcher.highlight(command.title), command.call, help=command.help)

    def _actions(self) -> Iterator[Command]:
        told = {"command_palette"}
        for node, binding, enabled, _ in self.screen.active_bindings.values():
            area = (binding.id or "").partition(".")[0]
            if not area or area in _MOVEMENTS or not enabled or binding.action in told:
                continue
            told.add(binding.action)
            title = f"{area}: {binding.description}"
            keys = f"({self.app.get_key_display(binding)})"
            call = partial(self.app.run_action, binding.action, node)
            yield Command(title, " ".join(filter(None, (binding.tooltip, keys))), call)

    def _records(self) -> Iterator[Command]:
        app = cast(Dashboard, self.app)
        if app.box is None:
            return
        for page, noun, records in (
            ("runs", "run", app.box.runs),
            ("releases", "release", app.box.releases),
            ("data", "dataset", app.box.datasets),
        ):
            for record in records:
                name = getattr(record, "name", record.id)
                call = partial(app.open_record, page, record.id)
                yield Command(f"go to {noun} {name}", "Open it on its page", call)
