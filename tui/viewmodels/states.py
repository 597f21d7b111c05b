"""How states look: a glyph, a word and a colour, so that none has to be told by its colour alone."""

from __future__ import annotations

from typing import NamedTuple

from textual.content import Content

from appliance import api
from tui.viewmodels.styles import MUTED


class Look(NamedTuple):
    glyph: str
    word: str
    style: str

    def label(self) -> Content:
        return Content.styled(f"{self.glyph} {self.word}", self.style)


RUNS: dict[str, Look] = {
    "queued": Look("○", "queued", MUTED),
    "running": Look("▶", "running", "$text-primary"),
    "stopping": Look("◐", "stopping", "$text-warning"),
    "finished": Look("✓", "finished", "$text-success"),
    "failed": Look("✗", "failed", "$text-error"),
    "stopped": Look("■", "stopped", "$text-warning"),
}

VERIFIED = Look("✓", "verified", "$text-success")
ELSEWHERE = Look("✓", "verified elsewhere", "$text-warning")
REFUSED = Look("✗", "refused", "$text-error")
DAMAGED = Look("✗", "damaged", "$text-error")
LIVE = Look("◆", "live", "bold $text-accent")
CANARY = Look("◇", "canary", "$text-accent")

PASSED = Look("✓", "passed", "$text-success")
NOT_PASSED = Look("✗", "failed", "$text-error")

STAGE_DONE = Look("✓", "done", "$text-success")
STAGE_NOW = Look("▶", "now", "bold $text-primary")
STAGE_BROKEN = Look("✗", "failed", "$text-error")
STAGE_AHEAD = Look("○", "ahead", MUTED)

ENGINES: dict[str, Look] = {
    "ready": Look("●", "ready", "$text-success"),
    "starting": Look("◐", "starting", "$text-warning"),
    "draining": Look("◐", "ending answers", "$text-warning"),
    "swapping": Look("◐", "changing weights", "$text-warning"),
    "sleeping": Look("○", "asleep", MUTED),
    "waking": Look("◐", "waking", "$text-warning"),
    "failed": Look("✗", "restarting", "$text-error"),
}
NO_ENGINE = Look("○", "no engine", "$text-warning")


def is_canary(release: api.Release) -> bool:
    return release.canary is not None and release.canary.ended is None


def release_look(release: api.Release) -> Look:
    if release.damage:
        return DAMAGED
    return {"verified": VERIFIED, "verified elsewhere": ELSEWHERE, "refused": REFUSED}[release.state]
