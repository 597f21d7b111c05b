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
"""Nats a token from which a release is refused where all rows are worse, and too few for chance to be ruled out."""
RUINED = 1.0
"""Nats a token from which a release is refused on conversations that it was not made for."""


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


def judge_quality(
    against: str, held_out: Comparison, *, plain: bool = False, lived: Comparison | None = None, limit: float = 0.0
) -> Gate:
    """Judge a release against the model that is called `against`, on the held-out set.

    `plain`: on conversations that have nothing to do with its data. `lived`: on the held-out set of the live release
    itself, where a loss may rise by `limit` nats a token; 0: by anything, which is said.
    """
    found = held_out.test()
    figures: dict[str, Any] = {"against": against, **held_out.figures()}
    comparison = f"held-out loss {held_out.own.loss:.4f}, {figures['other_loss']:.4f} of {against}"
    faults = [f"{comparison}: worse{_by_chance(found)}"] if worse(found, len(held_out.own.tokens), plain=plain) else []
    said = f"{comparison}, over {len(held_out.own.tokens)} conversations"
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


def worse(found: Paired, rows: int, *, plain: bool = False) -> bool:
    """Whether a difference is one that counts."""
    if plain:
        return found.difference > RUINED
    if 2.0**-rows > CHANCE:
        return found.difference > PLAINLY_WORSE and found.p_worse == 2.0**-rows
    return found.difference > LEAST_WORSE and found.p_worse < CHANCE


def _by_chance(found: Paired) -> str:
    return f" by {found.difference:.2g} nats a token (by chance: p = {found.p_worse:.2g})"
