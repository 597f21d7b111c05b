"""Gate 5 as a decision: what chance explains is no reason to refuse, and what it does not is."""

from __future__ import annotations

import random

import pytest
import torch

from appliance.release.quality import PLAINLY_WORSE, RUINED, Comparison, Preference, judge_quality
from appliance.release.scores import Scores

TOKENS = 20


def scores(nats: list[float]) -> Scores:
    """Conversations of TOKENS tokens each, that cost so many nats a token."""
    logps = torch.tensor([-each for each in nats for _ in range(TOKENS)])
    nothing = torch.empty(len(logps), 0)
    return Scores(torch.full((len(nats),), TOKENS), logps, nothing, nothing)


def comparison(rows: int, worse: float, noise: float, seed: int = 1) -> Comparison:
    """Rows of very different losses, on which the release is `worse` on average, and by `noise` of chance."""
    draw = random.Random(seed)
    other = [draw.uniform(0.5, 3) for _ in range(rows)]
    return Comparison(scores([each + worse + draw.gauss(0, noise) for each in other]), scores(other))


@pytest.mark.parametrize(
    ("rows", "worse", "noise", "passed"),
    [
        pytest.param(64, 0.0, 0.05, True, id="equal"),
        pytest.param(64, 0.0046, 0.05, True, id="as far apart as two seeds"),
        pytest.param(64, -0.5, 0.1, True, id="better"),
        pytest.param(64, 0.03, 0.02, False, id="a little worse on nearly every row"),
        pytest.param(64, 0.0005, 0.0, True, id="less than anybody notices"),
        pytest.param(6, 0.05, 0.01, True, id="few rows prove nothing small"),
        pytest.param(6, 2.0, 0.5, False, id="few rows prove what is plain"),
        pytest.param(1, 3.0, 0.0, False, id="one row, ruined"),
        pytest.param(200, 0.006, 0.002, False, id="just noticed"),
        pytest.param(200, 0.004, 0.002, True, id="not yet noticed"),
        pytest.param(4, 0.9, 0.01, True, id="four rows, not ruined"),
        pytest.param(4, 1.1, 0.01, False, id="four rows, ruined"),
        pytest.param(1, 0.05, 0.0, True, id="one row, a little worse"),
    ],
)
def test_what_counts_as_worse(rows: int, worse: float, noise: float, passed: bool) -> None:
    gate = judge_quality("the live release r", comparison(rows, worse, noise))
    assert gate.passed == passed, gate
    assert gate.figures["conversations"] == rows
    assert gate.figures["tokens"] == rows * TOKENS
    assert gate.figures["loss"] - gate.figures["other_loss"] == pytest.approx(gate.figures["difference"])
    assert "of the live release r" in gate.reason
    assert ("worse by" in gate.reason) == (not passed)


def test_equal_retrains_are_hardly_ever_refused() -> None:
    refused = [seed for seed in range(200) if not judge_quality("b", comparison(64, 0.0, 0.05, seed)).passed]
    assert len(refused) <= 2


def test_intervals_are_said_with_the_loss() -> None:
    figures = judge_quality("b", comparison(64, 0.0, 0.05)).figures
    low, high = figures["loss_interval"]
    assert low < figures["loss"] < high
    low, high = figures["difference_interval"]
    assert low < figures["difference"] < high


def test_of_few_rows_every_one_has_to_be_worse() -> None:
    own, other = [2.0, 2.0, 2.0, 2.0, 2.0, 0.9], [1.0] * 6
    assert judge_quality("b", Comparison(scores(own), scores(other))).passed
    assert not judge_quality("b", Comparison(scores([2.0] * 6), scores(other))).passed


@pytest.mark.parametrize(("worse", "passed"), [(0.4, True), (0.9, True), (1.1, False), (1.5, False)])
def test_on_conversations_it_was_not_made_for_only_ruin_counts(worse: float, passed: bool) -> None:
    assert judge_quality("the base b", comparison(24, worse, 0.1), least=RUINED).passed == passed


@pytest.mark.parametrize(("worse", "passed"), [(0.05, True), (0.2, False)])
def test_a_preference_may_set_back_a_little_of_what_was_taught_before(worse: float, passed: bool) -> None:
    assert judge_quality("the base b", comparison(64, worse, 0.01), least=PLAINLY_WORSE).passed == passed
    assert not judge_quality("the base b", comparison(64, worse, 0.01)).passed


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize(
    ("good", "bad", "passed"),
    [
        pytest.param(-0.3, 0.3, True, id="learnt"),
        pytest.param(0.2, 0.9, True, id="both rarer, the bad ones more so"),
        pytest.param(0.0, 0.0, True, id="nothing learnt"),
        pytest.param(0.3, -0.3, False, id="the other way round"),
        pytest.param(0.9, 0.2, False, id="both rarer, the good ones more so"),
    ],
)
def test_a_preference_may_not_be_less_than_it_was(good: float, bad: float, passed: bool, pairs: bool) -> None:
    unlike = 40 if pairs else 30
    preference = Preference(comparison(40, good, 0.05), comparison(unlike, bad, 0.05, seed=2), pairs)
    gate = judge_quality("the base b", comparison(40, good, 0.05), least=RUINED, preference=preference)
    assert gate.passed == passed, gate
    figures = gate.figures["preference"]
    assert (figures["good"], figures["bad"]) == (40, unlike)
    wanted = good - bad if pairs else (40 * good - 30 * bad) / 70
    assert figures["difference"] == pytest.approx(wanted, abs=0.05)
    assert "it prefers good answers by" in gate.reason
    assert good == bad or ("less than the base b" in gate.reason) == (good > bad)


def test_forgetting_is_said_and_refused_only_by_a_limit() -> None:
    better, lived = comparison(64, -0.2, 0.05), comparison(64, 0.3, 0.05)
    said = judge_quality("the live release r", better, lived=lived)
    assert said.passed
    assert "0.29 nats a token forgotten" in said.reason
    assert said.figures["of_live_release"]["difference"] == pytest.approx(0.3, abs=0.05)
    assert judge_quality("the live release r", better, lived=lived, limit=0.5).passed
    refused = judge_quality("the live release r", better, lived=lived, limit=0.2)
    assert not refused.passed
    assert "more than 0.2 nats a token forgotten" in refused.reason
    kept = judge_quality("the live release r", better, lived=comparison(64, 0.0, 0.05))
    assert "forgotten" not in kept.reason
