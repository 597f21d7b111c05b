"""When a canary goes live, goes back, or is seen more of."""

from __future__ import annotations

import random
from collections import Counter
from typing import Literal

import pytest

from appliance.canary import (
    FIRST_TOKEN,
    LATER_TOKEN,
    NEWEST_TIMED,
    TIMINGS,
    WHOLE_ANSWER,
    Comparison,
    Limits,
    Tally,
    judge,
)

LIMITS = Limits()


def tally(answers: int, errors: int = 0, cut: int = 0, good: int = 0, bad: int = 0, **seconds: float) -> Tally:
    """So many answers that all take `seconds`, of which `cut` were cut, so many errors, and ratings."""
    counted = Tally()
    for number in range(answers):
        counted.add_answer(
            ["length" if number < cut else "stop"], {TIMED[name]: value for name, value in seconds.items()}
        )
    for _ in range(errors):
        counted.add_error()
    counted.ratings = Counter(good=good, bad=bad)
    return counted


TIMED = {"first": FIRST_TOKEN, "later": LATER_TOKEN, "whole": WHOLE_ANSWER}

CASES: dict[str, tuple[Tally, Tally, Literal["wait", "promote", "rollback"], str]] = {
    "nobody has asked": (tally(0), tally(0), "wait", "more requests: 100 to it, 20 to the live release"),
    "not enough yet": (tally(500), tally(99), "wait", "waits for more requests: 1 to it"),
    "enough, and nothing against it": (tally(500), tally(100), "promote", "of 100 requests none failed"),
    "only the canary is asked": (tally(3), tally(400), "wait", "waits for more requests: 17 to the live release"),
    "only the live release is asked": (tally(900), tally(0), "wait", "waits for more requests: 100 to it"),
    "one failure happens to anybody": (tally(5000), tally(0, errors=1), "wait", "99 to it"),
    "two in a row do not": (tally(500), tally(0, errors=2), "rollback", "2 of 2 requests to it failed, and 0 of 500"),
    "two may be chance beside little": (tally(20), tally(0, errors=2), "wait", "98 to it"),
    "not even where the live release was never asked": (tally(0), tally(0, errors=3), "rollback", "3 of 3"),
    "but where the live release fails as often they are": (tally(4, errors=16), tally(0, errors=3), "wait", ""),
    "one failure in the end may be chance": (tally(900), tally(99, errors=1), "promote", "1 failed"),
    "two in the end are not": (tally(900), tally(98, errors=2), "rollback", "2 of 100"),
    "before its end they may be": (tally(900), tally(96, errors=2), "wait", "2 to it"),
    "fewer failures than the live release's": (tally(800, errors=100), tally(98, errors=2), "promote", ""),
    "answers that are cut": (tally(500, cut=50), tally(60, cut=30), "rollback", "50% of its answers are cut"),
    "cut as often as before": (tally(500, cut=250), tally(100, cut=52), "promote", ""),
    "cut a little more often": (tally(5000, cut=500), tally(1000, cut=190), "promote", ""),
    "cut less often": (tally(500, cut=250), tally(100, cut=2), "promote", ""),
    "a slow first token": (tally(50, first=0.2), tally(20, first=0.5), "rollback", "first token takes 0.5 s"),
    "slower, but within the limit": (tally(50, first=0.2), tally(100, first=0.39), "promote", ""),
    "slower by less than counts": (tally(50, first=0.01), tally(100, first=0.05), "promote", ""),
    "slow later tokens": (tally(50, later=0.02), tally(20, later=0.05), "rollback", "each later token"),
    "slow whole answers": (tally(50, whole=0.02), tally(20, whole=0.05), "rollback", "each token of a whole answer"),
    "a few slow answers may be chance": (tally(50, first=0.2), tally(9, first=0.5), "wait", ""),
    "with too little to compare": (tally(19, first=0.2), tally(99, first=0.5), "wait", ""),
    "rated bad": (tally(50, good=18, bad=2), tally(20, good=2, bad=8), "rollback", "8 of 10 ratings of its answers"),
    "rated bad, the live release as well": (tally(50, good=2, bad=8), tally(99, good=2, bad=8), "wait", ""),
    "rated good, the live release bad": (tally(50, bad=20), tally(100, good=20), "promote", "nor rated bad more often"),
    "one bad rating happens to anybody": (tally(900, good=900), tally(100, bad=1), "promote", ""),
    "two in the end do not": (tally(900, good=900), tally(100, bad=2), "rollback", "2 of 2 ratings"),
    "a few bad ratings may be chance": (tally(50, good=4, bad=1), tally(99, good=1, bad=4), "wait", ""),
    "ratings of the candidate alone": (tally(50), tally(100, bad=9), "promote", ""),
    "faster": (tally(50, first=0.2, later=0.05), tally(100, first=0.1, later=0.01), "promote", ""),
}


@pytest.mark.parametrize("case", CASES)
def test_judge(case: str) -> None:
    live, candidate, outcome, words = CASES[case]
    verdict = judge(live, candidate, LIMITS)
    assert verdict.outcome == outcome, verdict
    assert words in verdict.reason


def test_half_of_the_times_above_the_limit_are_no_slower_median() -> None:
    live, candidate = tally(50, first=0.2), tally(0)
    for number in range(100):
        candidate.add_answer(["stop"], {FIRST_TOKEN: 5.0 if number % 2 else 0.2})
    assert judge(live, candidate, LIMITS).outcome == "promote"


@pytest.mark.parametrize(
    ("errors", "cut", "slower", "bad", "at_least"),
    [
        (0.01, 0.2, 1.0, None, 0.95),
        (0.2, 0.2, 1.0, None, 0.0),
        (0.01, 0.5, 1.0, None, 0.0),
        (0.01, 0.2, 5.0, None, 0.0),
        (0.01, 0.2, 1.0, 0.2, 0.9),
        (0.01, 0.2, 1.0, 0.8, 0.0),
    ],
    ids=["alike", "fails", "cut", "slow", "rated alike", "rated worse"],
)
def test_how_often_a_canary_of_some_kind_goes_live(
    errors: float, cut: float, slower: float, bad: float | None, at_least: float
) -> None:
    """Looked at after every answer, in 60 canaries beside a live release with 1% errors and 20% cut answers.

    Where answers are rated, it is a fifth of them, and of the live release's a fifth is bad.
    """
    dice = random.Random(7)
    promoted = 0
    for _ in range(60):
        comparison = Comparison("a", "b")
        while (verdict := judge(comparison.live_tally, comparison.candidate_tally, LIMITS)).outcome == "wait":
            for _ in range(4):
                _answer(dice, comparison.live_tally, 0.01, 0.2, 1.0, None if bad is None else 0.2)
            _answer(dice, comparison.candidate_tally, errors, cut, slower, bad)
        promoted += verdict.outcome == "promote"
    assert (promoted >= 60 * at_least) if at_least else promoted == 0


def _answer(dice: random.Random, counted: Tally, errors: float, cut: float, slower: float, bad: float | None) -> None:
    if dice.random() < errors:
        counted.add_error()
    else:
        stop = "length" if dice.random() < cut else "stop"
        counted.add_answer([stop], {FIRST_TOKEN: dice.lognormvariate(-1, 0.7) * slower})
        if bad is not None and dice.random() < 0.2:
            counted.ratings["bad" if dice.random() < bad else "good"] += 1


def test_a_tallys_figures() -> None:
    counted = Tally()
    for number in range(1, 21):
        counted.add_answer(["stop", "length"], {FIRST_TOKEN: number / 10})
    counted.add_error()
    counted.ratings["bad"] += 1
    figures = counted.figures("a")
    assert (figures.release, figures.requests, figures.errors) == ("a", 21, 1)
    assert figures.stops == {"stop": 20, "length": 20}
    assert figures.ratings == {"bad": 1}
    assert set(figures.seconds) == {FIRST_TOKEN}
    assert figures.seconds[FIRST_TOKEN].median == pytest.approx(1.05)
    assert figures.seconds[FIRST_TOKEN].p95 == pytest.approx(1.9)


def test_a_tally_takes_bounded_memory() -> None:
    counted = tally(NEWEST_TIMED + 10, first=1.0, later=1.0, whole=1.0)
    assert counted.requests == NEWEST_TIMED + 10
    assert {name: len(times) for name, times in counted.seconds.items()} == dict.fromkeys(TIMINGS, NEWEST_TIMED)


def test_a_comparison_knows_its_two_sides() -> None:
    comparison = Comparison("a", "b")
    assert comparison.tally("a") is comparison.live_tally
    assert comparison.tally("b") is comparison.candidate_tally
    assert comparison.tally("c") is None
    assert [side.release for side in comparison.figures()] == ["a", "b"]


def test_the_limits_are_told_with_their_figures() -> None:
    told = " ".join(Limits(requests=7, compared=3, more_cut=0.25, times_slower=1.5, chance=0.002).sentences())
    for figure in ("7 requests", "3 to the live", "25%", "1.5 times", "0.2%", "5%"):
        assert figure in told
