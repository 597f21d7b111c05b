"""Gate 5: the release is no worse than what answers now, and what it has forgotten of that one's own data is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from appliance.release.gates import Gate
from appliance.release.scores import Scores
from appliance.statistics import Paired, mean_interval, paired

CHANCE = 1e-3
"""How unlikely chance must be as the reason for a higher loss before a release is refused."""
LEAST_WORSE = 5e-3
"""Nats a token below which nobody notices: as far apart as two seeds of one recipe (bench/results/train.json)."""
PLAINLY_WORSE = 0.1
"""Nats a token from which a release is refused where all rows are worse, and too few for chance to be ruled out. Up to
there a preference stage may set back what a stage before has taught: it makes good answers less likely, too."""
FEW_ROWS = 5
"""With fewer, chance alone makes all of them worse more often than once in twenty times: only ruin is refused."""
RUINED = 1.0
"""Nats a token from which a release is refused on conversations that it was not made for, or only for telling good from
bad."""


@dataclass(frozen=True)
class Comparison:
    """What two models say of the same conversations, each through its own tokenizer."""

    own: Scores
    other: Scores

    def test(self) -> Paired:
        """How much worse the release is, in nats by its own number of tokens."""
        return paired(self.own.nats(), self.other.nats(), self.own.tokens.tolist())

    def figures(self) -> dict[str, Any]:
        """Losses, intervals (95 %) and what chance has to do with the difference."""
        found, tokens = self.test(), self.own.tokens.tolist()
        return {
            "conversations": len(tokens),
            "tokens": sum(tokens),
            "loss": self.own.loss,
            "loss_interval": mean_interval(self.own.nats(), tokens),
            "other_loss": sum(self.other.nats()) / sum(tokens),
            "difference": found.difference,
            "difference_interval": found.interval,
            "p_worse": found.p_worse,
        }


@dataclass(frozen=True)
class Preference:
    """What two models say of held-out answers that were to become likelier, and of others that were to become rarer."""

    good: Comparison
    bad: Comparison
    pairs: bool
    """Whether the two lists are answers to the same prompts, one after the other."""

    def test(self) -> Paired:
        """How much less the release prefers the good ones than the other model does, in nats a token."""
        own, other = self._nats(self.good.own, self.bad.own), self._nats(self.good.other, self.bad.other)
        tokens = self.good.own.tokens.tolist()
        return paired(own, other, tokens if self.pairs else [*tokens, *self.bad.own.tokens.tolist()])

    def figures(self) -> dict[str, Any]:
        """How much of the good answers both prefer, and what chance has to do with the difference."""
        found, rows = self.test(), len(self.good.own.tokens)
        return {
            "good": rows,
            "bad": len(self.bad.own.tokens),
            "difference": found.difference,
            "difference_interval": found.interval,
            "p_worse": found.p_worse,
        }

    def _nats(self, good: Scores, bad: Scores) -> list[float]:
        if self.pairs:
            return [one - other for one, other in zip(good.nats(), bad.nats(), strict=True)]
        return [*good.nats(), *(-nats for nats in bad.nats())]


def judge_quality(
    against: str,
    held_out: Comparison,
    *,
    least: float = LEAST_WORSE,
    preference: Preference | None = None,
    lived: Comparison | None = None,
    limit: float = 0.0,
) -> Gate:
    """Judge a release against the model that is called `against`, on the held-out set.

    A loss counts as worse from `least` nats a token on. `preference`: on held-out answers of its last stage. `lived`:
    on the held-out set of the live release itself, where a loss may rise by `limit` nats a token; 0: by anything, which
    is said.
    """
    found = held_out.test()
    figures: dict[str, Any] = {"against": against, **held_out.figures()}
    comparison = f"held-out loss {held_out.own.loss:.4f}, {figures['other_loss']:.4f} of {against}"
    faults = [f"{comparison}: worse{_by_chance(found)}"] if worse(found, len(held_out.own.tokens), least) else []
    said = f"{comparison}, over {len(held_out.own.tokens)} conversations"
    if preference is not None:
        figures["preference"] = preference.figures()
        prefers = preference.test()
        more = "less" if prefers.difference > 0 else "more"
        gained = f"it prefers good answers by {abs(prefers.difference):.2g} nats a token {more} than {against}"
        rows = min(len(preference.good.own.tokens), len(preference.bad.own.tokens))
        if worse(prefers, rows):
            faults.append(f"{gained} (by chance: p = {prefers.p_worse:.2g})")
        said = f"{said}; {gained}"
    if lived is not None:
        forgotten = lived.test()
        figures["of_live_release"] = lived.figures()
        theirs = lived.own.loss - forgotten.difference
        memory = f"on the live release's own held-out rows {lived.own.loss:.4f}, {theirs:.4f} there"
        if limit and forgotten.difference > limit:
            faults.append(f"{memory}: more than {limit} nats a token forgotten")
        elif worse(forgotten, len(lived.own.tokens)):
            memory += f", {forgotten.difference:.2g} nats a token forgotten"
        said = f"{said}; {memory}"
    return Gate(not faults, figures, "; ".join(faults) or said)


def worse(found: Paired, rows: int, least: float = LEAST_WORSE) -> bool:
    """Whether a difference of `least` nats a token or more over so many rows is one that counts."""
    if rows < FEW_ROWS:
        return found.difference > RUINED
    if 2.0**-rows > CHANCE:
        return found.difference > max(least, PLAINLY_WORSE) and found.p_worse == 2.0**-rows
    return found.difference > least and found.p_worse < CHANCE


def _by_chance(found: Paired) -> str:
    return f" by {found.difference:.2g} nats a token (by chance: p = {found.p_worse:.2g})"
