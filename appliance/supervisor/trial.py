"""The canary under way: its record, the figures of both sides, and what the gateway is told of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

from appliance import api
from appliance.canary import Comparison, Limits
from appliance.errors import Conflict
from appliance.store.canaries import Canaries
from appliance.store.releases import Releases
from appliance.supervisor.snapshot import CanaryView

Ratings = Callable[[str, float], "Counter[api.Rating]"]
"""How often the answers that a release has given since a time were rated what."""


def no_ratings(release: str, since: float) -> Counter[api.Rating]:
    """Nobody says anything about answers."""
    return Counter()


class CanaryRoutes(Protocol):
    """The part of the public face that divides conversations."""

    def route_canary(self, release: str, address: str, share: float, comparison: Comparison) -> None:
        """Let the engine at `address` answer a share of the conversations, and count both sides in `comparison`."""
        ...

    def end_canary(self) -> None:
        """Let the live release answer them all, and count nothing."""
        ...


class Trial:
    """At most one canary. Its record and its ratings outlast the daemon; what the gateway counts begins again with the
    next one."""

    def __init__(
        self,
        canaries: Canaries,
        releases: Releases,
        ratings: Ratings,
        routes: CanaryRoutes,
        limits: Limits,
    ) -> None:
        self.routed: tuple[str, float] | None = None
        """The release that the gateway sends a share to, and the share."""
        self._canaries = canaries
        self._releases = releases
        self._ratings = ratings
        self._routes = routes
        self._limits = limits
        self._comparison = Comparison("", "")
        self._since = 0.0

    def start(self, release: str, share: float, lacking: str = "") -> api.Canary:
        """Make a release the canary, or change its share. Raises NotFound, and Conflict where it cannot be one.

        `lacking`: what there has to be, where no engine can run for it beside the live release's.
        """
        live = self._releases.live()
        if self._releases.require_fit(release).live:
            raise Conflict("already_live", f"{release} is live", "see `appliance releases` for another")
        if live is None:
            raise Conflict("nothing_live", "no release is live to compare with", f"`appliance promote {release}`")
        if lacking:
            raise Conflict(
                "no_room",
                "a canary needs an engine beside the live release's, and the lease or the memory leaves no room for it",
                f"{lacking}; or promote it for everybody: `appliance promote {release}`",
            )
        return self._canaries.start(release, live, share)

    def view(self) -> CanaryView | None:
        """The canary as decisions see it."""
        canary = self._canaries.current()
        if canary is None:
            return None
        return CanaryView(canary.release, canary.live, canary.share, self._compare(canary), self._limits)

    def route(self, release: str | None, share: float, address: str) -> None:
        """Tell the gateway whose engine answers the canary's share; None: the live release's."""
        canary = self._canaries.current()
        if release is None or canary is None:
            self.routed = None
            self._routes.end_canary()
        else:
            self.routed = (release, share)
            self._routes.route_canary(release, address, share, self._compare(canary))

    def end(self, outcome: api.CanaryOutcome, reason: str) -> None:
        """Record how it ended; one that is promoted is live before that. Safe to repeat after a kill in between."""
        canary = self._canaries.current()
        if canary is None:
            return
        if outcome == "promoted":
            self._releases.promote(canary.release)
        self._canaries.end(outcome, reason, self._compare(canary).figures())

    def status(self) -> api.Canary | None:
        """The canary under way with its figures so far and what it waits for."""
        canary, view = self._canaries.current(), self.view()
        if canary is None or view is None:
            return None
        reason = view.verdict.reason if self.routed else "its engine is starting, and the live release answers all"
        figures, limits = self._compare(canary).figures(), self._limits.sentences()
        return canary.model_copy(update={"reason": reason, "figures": figures, "limits": limits})

    def newest(self) -> dict[str, api.Canary]:
        """The newest canary of each release that was ever one."""
        present = self.status()
        return self._canaries.newest() | ({present.release: present} if present else {})

    def _compare(self, canary: api.Canary) -> Comparison:
        """The figures of this canary, with its ratings as they are now; of another one before, they are dropped."""
        if self._since != canary.since:
            self._since = canary.since
            self._comparison = Comparison(canary.live, canary.release)
        self._comparison.live_tally.ratings = self._ratings(canary.live, canary.since)
        self._comparison.candidate_tally.ratings = self._ratings(canary.release, canary.since)
        return self._comparison
