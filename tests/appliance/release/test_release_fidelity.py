"""Gate 2 as a decision: how far is too far follows from what noise does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from appliance.release.fidelity import LEAST_DIFFERENCE, Apart, Measured, judge_fidelity
from appliance.release.gates import Gate
from appliance.release.scores import Scores

ROWS, TOKENS = 8, 10
HELD_OUT = 4
SIGNS = [1, -1, 1, -1]


def scores(apart: float = 0.0, seed: int = 1) -> Scores:
    """Distributions over 32 tokens and the rest; with `apart` and `seed`, others that are that far from the first."""
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS * TOKENS, 33, generator=draw) * 2
    logits += apart * torch.randn(logits.shape, generator=torch.Generator().manual_seed(seed))
    logps = torch.log_softmax(logits, 1)[:, :32].contiguous()
    ids = torch.arange(32, dtype=torch.int32).expand(ROWS * TOKENS, 32).contiguous()
    return Scores(torch.full((ROWS,), TOKENS), logps[:, 0].contiguous(), ids, logps)


def reference(adapter: Scores, margin: float) -> torch.Tensor:
    """Log-probabilities before the last stage, over which the adapter has that margin a pair."""
    last = adapter.part(HELD_OUT, ROWS).logps.clone().view(len(SIGNS), TOKENS)
    return (last - torch.tensor(SIGNS)[:, None] * margin / 2 / TOKENS).flatten()


def judge(adapter: Scores, own: Scores, noisy: Scores, signs: list[int] | None = None, margin: float = 1.0) -> Gate:
    measured = Measured(adapter, adapter, reference(adapter, margin) if signs else torch.empty(0))
    return judge_fidelity(measured, own, noisy, signs or [0] * len(SIGNS), HELD_OUT)


def test_as_far_as_noise_is_the_same_model() -> None:
    gate = judge(scores(), scores(0.01, 2), scores(0.014, 3))
    assert gate.passed, gate
    assert gate.figures["conversations"] == ROWS
    assert gate.figures["tokens"] == ROWS * TOKENS
    assert gate.figures["mean_divergence"] < gate.figures["limits"]["mean_divergence"]


def test_further_than_noise_is_another_model() -> None:
    gate = judge(scores(), scores(0.1, 2), scores(0.014, 3))
    assert not gate.passed
    assert "above what rounding makes of it" in gate.reason


def test_one_token_that_is_far_off_is_enough() -> None:
    own = scores(0.01, 2)
    logps = own.logps.clone()
    logps[5] -= 1
    gate = judge(scores(), replace(own, logps=logps), scores(0.014, 3))
    assert not gate.passed


def test_what_is_no_number_is_another_model() -> None:
    own = scores()
    assert not judge(scores(), replace(own, likeliest=own.likeliest * torch.nan), scores(0.01, 3)).passed


@pytest.mark.parametrize(("share", "passed"), [(1.0, True), (0.98, True), (0.9, False), (0.3, False), (1.2, False)])
def test_the_margin_has_to_be_kept(share: float, passed: bool) -> None:
    """Moved by so little a token that no token shows it; `share` of the margin is left."""
    adapter = scores()
    moved = adapter.logps.clone().view(ROWS, TOKENS)
    moved[HELD_OUT:] += torch.tensor(SIGNS)[:, None] * (share - 1) * 0.5 / 2 / TOKENS
    own = replace(adapter, logps=moved.flatten())
    gate = judge(adapter, own, adapter, SIGNS, margin=0.5)
    assert gate.passed == passed, gate
    assert gate.figures["margin"]["adapter"] == pytest.approx(0.5, abs=1e-4)
    assert gate.figures["margin"]["kept"] == pytest.approx(share, abs=1e-3)
    assert ("of the margin kept" if passed else "margin over the reference") in gate.reason


def test_another_base_than_that_of_training_must_not_be_worse() -> None:
    trained, merged_into = scores(), scores(1.0, 5)
    better = replace(trained, logps=merged_into.logps - 0.5)
    worse = replace(trained, logps=merged_into.logps + 0.5)
    for on_training_base, passed in ((better, True), (worse, False)):
        measured = Measured(on_training_base, merged_into, torch.empty(0))
        gate = judge_fidelity(measured, merged_into, merged_into, [], ROWS)
        assert gate.figures["divergence_from_training_base"] > 0.1
        # Positive log-probabilities of `better` are no matter: only differences count.
        assert gate.figures["over_training_base"]["difference"] == pytest.approx(-0.5 if passed else 0.5, abs=1e-4)
        assert gate.figures["over_training_base"]["p_worse"] == (1.0 if passed else 2.0**-ROWS)
        assert gate.passed == passed
        assert passed or "the loss is 0.5 nats a token higher" in gate.reason


def test_limits_are_four_times_the_noise_and_a_floor() -> None:
    limit = Apart(1e-3, 0.1).limit()
    assert limit.mean_divergence == pytest.approx(4e-3 + 1e-6, rel=1e-9)
    assert limit.largest_difference == pytest.approx(0.4 + LEAST_DIFFERENCE)
    assert Apart(4.0e-3, 0.4).within(limit)
    assert not Apart(4.1e-3, 0.4).within(limit)
    assert not Apart(4.0e-3, 0.41).within(limit)
    assert Apart(0.0, 0.0).limit().mean_divergence == 1e-6


@pytest.mark.parametrize(("lost", "passed"), [(0.19, True), (0.25, False)])
def test_a_margin_may_be_off_by_twice_the_noise_of_an_answer(lost: float, passed: bool) -> None:
    """The noise of each answer is 0.1 nats, so that 0.2 of a margin of 0.1 may be lost, 3 % of it, and the floor."""
    adapter = scores()

    def moved(by: float) -> Scores:
        logps = adapter.logps.clone().view(ROWS, TOKENS)
        logps[HELD_OUT:] += torch.tensor(SIGNS)[:, None] * by / TOKENS
        return replace(adapter, logps=logps.flatten())

    own, noisy = moved(-lost / 2), moved(0.1)
    gate = judge(adapter, own, noisy, SIGNS, margin=0.1)
    assert gate.figures["margin"]["allowed"] == pytest.approx(0.2 + 0.003 + LEAST_DIFFERENCE, abs=1e-4)
    assert gate.passed == passed, gate


def test_limits_have_a_floor() -> None:
    assert Apart(0.0, 0.0).limit().largest_difference == LEAST_DIFFERENCE
    assert not Apart(0.0, float("nan")).within(Apart(1.0, 1.0))


@pytest.mark.parametrize("same", [True, False])
def test_what_was_measured_comes_back_from_its_file(tmp_path: Path, same: bool) -> None:
    trained = scores()
    measured = Measured(trained, trained if same else replace(scores(0.1, 2), ids=trained.ids), torch.ones(3))
    measured.save(tmp_path / "scores.safetensors")
    found = Measured.load(tmp_path / "scores.safetensors")
    assert (found.merged_into is found.trained) == same
    assert torch.equal(found.merged_into.likeliest, measured.merged_into.likeliest)
    assert torch.equal(found.trained.logps, trained.logps)
    assert torch.equal(found.reference, torch.ones(3))
