"""The canary's figures, and whether it goes live: counting, and a pure judgement of what was counted."""

from __future__ import annotations

import math
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from appliance import api
from appliance.statistics import fisher_excess, sign_test

NEWEST_TIMED = 500
"""Times that are kept of each kind, the newest."""

FIRST_TOKEN, LATER_TOKEN, WHOLE_ANSWER = "first token", "each later token", "each token of a whole answer"
TIMINGS = {FIRST_TOKEN: 0.05, LATER_TOKEN: 0.005, WHOLE_ANSWER: 0.005}
"""What is timed, the first two in streams, and by how many seconds a median must be larger to count as slower."""


@dataclass(frozen=True)
class Limits:
    """On what figures a canary goes live or back. The canary is looked at all the time and judged at its end, so that a
    difference has to be far from chance before and as usual at the end (Haybittle 1971, Peto et al. 1976)."""

    requests: int = 100
    """Requests to the canary after which it goes live where nothing speaks against it."""
    compared: int = 20
    """Requests to the live release without which there is no comparison, and no end by itself but for errors."""
    fewest_faults: int = 2
    """Failed requests, or answers rated bad, that it takes to speak against it: one happens to anybody."""
    more_cut: float = 0.10
    """How much larger its share of answers cut by the length limit may be."""
    times_slower: float = 2.0
    """How many times as long as the live release's median time its own may be."""
    chance: float = 0.001
    """How likely by chance a difference may be that ends it early."""
    chance_at_end: float = 0.05
    """The same when it has had its requests."""

    def sentences(self) -> tuple[str, ...]:
        """The limits for a person."""
        return (
            f"goes live after {self.requests} requests to it and {self.compared} to the live release",
            "goes back where it fails more often, where more of its rated answers are rated bad, "
            f"where {self.more_cut:.0%} more of its answers are cut by the length limit, "
            f"or where its median times are more than {self.times_slower:g} times as long",
            f"a difference counts where chance makes it in fewer than {self.chance:.1%} of cases, "
            f"at the end {self.chance_at_end:.0%}",
        )


@dataclass(frozen=True)
class Verdict:
    """What is to become of a canary, and why in one line."""

    outcome: Literal["wait", "promote", "rollback"]
    reason: str


@dataclass
class Tally:
    """What one release has answered. A client's own mistakes and clients that left are not counted."""

    requests: int = 0
    errors: int = 0
    """Requests that the engine did not answer, or not to the end."""
    stops: Counter[str] = field(default_factory=Counter)
    """How often answers ended for which reason."""
    ratings: Counter[api.Rating] = field(default_factory=Counter)
    """How often answers were rated what."""
    seconds: dict[str, deque[float]] = field(
        default_factory=lambda: {name: deque(maxlen=NEWEST_TIMED) for name in TIMINGS}
    )

    def add_error(self) -> None:
        self.requests += 1
        self.errors += 1

    def add_answer(self, stops: Iterable[str], seconds: Mapping[str, float]) -> None:
        """Count an answer whose choices ended for the reasons `stops` and took `seconds`, by the names of TIMINGS."""
        self.requests += 1
        self.stops.update(stops)
        for name, value in seconds.items():
            self.seconds[name].append(value)

    def figures(self, release: str) -> api.CanaryFigures:
        """The figures of `release` as people see them."""
        spreads = {
            name: api.Spread(median=statistics.median(times), p95=sorted(times)[math.ceil(0.95 * len(times)) - 1])
            for name, times in self.seconds.items()
            if times
        }
        return api.CanaryFigures(
            release=release,
            requests=self.requests,
            errors=self.errors,
            stops=dict(self.stops),
            seconds=spreads,
            ratings=dict(self.ratings),
        )


@dataclass(frozen=True)
class Comparison:
    """Two releases side by side, each with its tally."""

    live: str
    candidate: str
    live_tally: Tally = field(default_factory=Tally)
    candidate_tally: Tally = field(default_factory=Tally)

    def tally(self, release: str) -> Tally | None:
        """That of `release`, if it is one of the two."""
        return {self.live: self.live_tally, self.candidate: self.candidate_tally}.get(release)

    def figures(self) -> tuple[api.CanaryFigures, ...]:
        """The live release's, then the candidate's."""
        return self.live_tally.figures(self.live), self.candidate_tally.figures(self.candidate)


def judge(live: Tally, candidate: Tally, limits: Limits) -> Verdict:
    """Whether the candidate goes live, goes back, or is to be seen more of.

    Where only one of the two is asked, it waits for the other, but for errors: a live release that has hardly been
    asked is taken to answer without any.
    """
    enough = candidate.requests >= limits.requests and live.requests >= limits.compared
    found = next(_faults(live, candidate, limits, limits.chance_at_end if enough else limits.chance), None)
    if found:
        return Verdict("rollback", found)
    if enough:
        errors = f"{candidate.errors} failed" if candidate.errors else "none failed"
        reason = f"of {candidate.requests} requests {errors}; it is no slower, and neither cut nor rated bad more often"
        return Verdict("promote", reason)
    missing = {"it": limits.requests - candidate.requests, "the live release": limits.compared - live.requests}
    waited = ", ".join(f"{count} to {side}" for side, count in missing.items() if count > 0)
    return Verdict("wait", f"waits for more requests: {waited}")


def _faults(live: Tally, candidate: Tally, limits: Limits, chance: float) -> Iterator[str]:
    """What speaks against the candidate: worse than the limits allow, and not by chance."""
    asked = max(live.requests, limits.compared)
    by_chance = fisher_excess(candidate.errors, candidate.requests, live.errors, asked)
    if candidate.errors >= limits.fewest_faults and by_chance < chance:
        yield (
            f"{candidate.errors} of {candidate.requests} requests to it failed, "
            f"and {live.errors} of {live.requests} to the live release"
        )
    bad, rated, bad_live, rated_live = *_bad(candidate), *_bad(live)
    if bad >= limits.fewest_faults and fisher_excess(bad, rated, bad_live, rated_live) < chance:
        yield f"{bad} of {rated} ratings of its answers are bad, and {bad_live} of {rated_live} of the live release's"
    cut, ended = candidate.stops["length"], candidate.stops.total()
    cut_live, ended_live = live.stops["length"], live.stops.total()
    if ended and ended_live >= limits.compared:
        share, usual_share = cut / ended, cut_live / ended_live
        if share - usual_share > limits.more_cut and fisher_excess(cut, ended, cut_live, ended_live) < chance:
            yield f"{share:.0%} of its answers are cut by the length limit, {usual_share:.0%} of the live release's"
    for name, least in TIMINGS.items():
        times, usual = candidate.seconds[name], live.seconds[name]
        if times and len(usual) >= limits.compared:
            median = statistics.median(usual)
            slow = max(limits.times_slower * median, median + least)
            if sign_test(sum(time > slow for time in times), len(times)) < chance:
                yield f"{name} takes {statistics.median(times):.3g} s in the median, the live release's {median:.3g} s"


def _bad(tally: Tally) -> tuple[int, int]:
    """How many answers were rated bad, and how many were rated."""
    return tally.ratings["bad"], tally.ratings.total()
