"""Releases: which gates each passed, which is live, and the way forward and back."""

from __future__ import annotations

import time
from typing import Any, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content

from appliance import api
from tui.link import PROBLEMS, explain
from tui.screens.page import RecordPage
from tui.viewmodels.box import Box
from tui.viewmodels.outline import gates, outline
from tui.viewmodels.permits import why_not_promote, why_not_roll_back, why_not_try
from tui.viewmodels.records import release_entry
from tui.widgets.panes import Panes
from tui.widgets.text_pane import TextPane

_SHARE = 0.1
"""Of the conversations, for a canary from here."""


class ReleasesPage(RecordPage):
    NAME = "releases"
    LABEL = "Releases"
    EMPTY = "No releases yet.\n\nA run ends in one: merged, measured by the gates, and verified or refused."
    ABOUT = (
        "A release is a merged model with its manifest. It can go live only when every gate passed: structure, "
        "fidelity to the adapter that was trained, parity of trainer and engine, stopping, and quality. "
        "Promoting swaps it in without a failed request; rolling back brings back the one that was live before. "
        "As a canary (c) it answers a share of the conversations first, and goes live or back by itself."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("p", "promote", "Promote", tooltip="Make this release live", id="release.promote"),
        Binding(
            "c",
            "try_out",
            "Canary",
            tooltip="Let it answer 10% of the conversations first",
            show=False,
            id="release.try_out",
        ),
        Binding("b", "roll_back", "Roll back", tooltip="Bring back the release before", id="release.roll_back"),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._manifests: dict[str, dict[str, Any]] = {}

    def compose_detail(self) -> ComposeResult:
        yield Panes({"Gates": TextPane(id="gates"), "Manifest": TextPane(id="manifest")})

    def entries(self, box: Box) -> list[tuple[str, Content]]:
        now = time.time()
        return [(release.id, release_entry(release, now)) for release in box.releases]

    def show_record(self, box: Box, id: str) -> None:
        release = box.release(id)
        if release is None:
            return
        manifest = self._manifests.get(id)
        self.query_one("#gates", TextPane).show(gates(release, manifest))
        self.query_one("#manifest", TextPane).show(outline(manifest) if manifest else Content("reading it …"))
        if manifest is None:
            self._read_manifest(id)

    @work(exclusive=True, group="manifest", exit_on_error=False)
    async def _read_manifest(self, id: str) -> None:
        try:
            self._manifests[id] = await self.appliance.client.manifest(id)
        except PROBLEMS as error:
            if id == self.chosen:
                self.query_one("#manifest", TextPane).show(Content(explain(error)))
            return
        if id == self.chosen and self.appliance.box:
            self.show_record(self.appliance.box, id)

    def action_promote(self) -> None:
        box = self.appliance.box
        release = box.release(self.chosen) if box else None
        if self.appliance.refused(why_not_promote(release)) or release is None:
            return
        live = box.status.live if box else None
        self.appliance.confirm(
            f"Promote {release.id}?",
            f"It takes over from {live}, which stays ready to be rolled back to." if live else "It becomes live.",
            "Promote",
            lambda: self.appliance.perform(
                self.appliance.client.promote(release.id), lambda promoted: f"{promoted.id} is going live"
            ),
        )

    def action_try_out(self) -> None:
        box = self.appliance.box
        release = box.release(self.chosen) if box else None
        if self.appliance.refused(why_not_try(release, box.status if box else None)) or release is None:
            return
        self.appliance.confirm(
            f"Make {release.id} the canary?",
            f"It answers {_SHARE:.0%} of the conversations, and goes live or back by itself on what it shows.",
            "Canary",
            lambda: self.appliance.perform(
                self.appliance.client.promote(release.id, canary=_SHARE), lambda canary: f"{canary.id} is the canary"
            ),
        )

    def action_roll_back(self) -> None:
        box = self.appliance.box
        if self.appliance.refused(why_not_roll_back(box.releases if box else (), box.status if box else None)):
            return
        self.appliance.confirm(
            "Roll back?",
            _what_comes_back(box.status) if box else "",
            "Roll back",
            lambda: self.appliance.perform(
                self.appliance.client.rollback(), lambda release: f"{release.id} answers again"
            ),
        )


def _what_comes_back(status: api.Status) -> str:
    if unmerged := status.unmerged:
        return f"The adapter of {unmerged.run} answers no longer, and its release does not go live by itself."
    if canary := status.canary:
        return f"The canary {canary.release} ends; {canary.live} answers all."
    return f"The release that was live before {status.live} answers again."
