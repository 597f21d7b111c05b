"""What passes say of each row, against plain sums and TRL's own losses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import add_run, events, result, stage, work

from appliance.home import Home
from appliance.statistics import mean_interval
from appliance.train.answers import RowFigures, answer_loss, figures_of, is_displaced, row_loss, sequence_nats
from appliance.train.packing import pack
from appliance.train.rows import IGNORED
from appliance.train.trainer import MicroBatchTrainer

DATASETS = {"sft": "FACTS", "dpo": "PREFERENCES", "kto": "JUDGEMENTS"}


def figures(losses: list[float], weights: list[int], nats: list[float], tokens: list[int]) -> RowFigures:
    return RowFigures(*(torch.tensor(values) for values in (losses, weights, nats, tokens)))


def test_rows_count_by_their_weights_over_all_parts() -> None:
    parts = [figures([1.0, 6.0], [1, 4], [], []), figures([8.0], [5], [4.0], [2])]
    assert row_loss(parts) == (pytest.approx(1.5), mean_interval([1.0, 6.0, 8.0], [1, 4, 5]))
    assert answer_loss(parts) == (2.0, None), "of a single answer there is no interval"
    assert answer_loss(parts[:1]) is None


def test_a_packed_pass_is_taken_apart() -> None:
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0], [8, 9, 0, 0]])
    kept = ids > 0
    labels = torch.where(torch.isin(ids, torch.tensor([3, 4, 5, 7, 9])), ids, IGNORED)
    padded = {"input_ids": ids, "labels": labels, "attention_mask": kept.long()}

    def output(inputs: dict[str, torch.Tensor]) -> Any:
        """The head's, where each token costs its own number."""
        targets = inputs["labels"][:, 1:]
        mask = targets != IGNORED
        return SimpleNamespace(log_probs=-torch.where(mask, targets, 0).float(), label_mask=mask)

    for inputs in (padded, pack(padded)):
        nats, tokens = sequence_nats(inputs, output(inputs))
        assert nats.tolist() == [7, 7, 9]
        assert tokens.tolist() == [2, 1, 1], "nothing predicts the first token of a row"


def test_rewards_are_told_over_all_micro_batches() -> None:
    one = RowFigures(
        *(torch.tensor(values) for values in ([1.0, 1.0], [1, 1], [4.0, 6.0], [2, 2])),
        (torch.tensor([0.5, -0.5]), torch.tensor([-1.0])),
        torch.tensor([True, False]),
    )
    other = replace(one, rewards=(torch.tensor([-1.5, -0.5]), torch.tensor([-2.0])), right=torch.tensor([False, False]))
    found = figures_of([one, other])
    assert found["chosen_logp"] == -5.0
    assert (found["reward_chosen"], found["reward_rejected"]) == (-0.5, -1.5)
    assert (found["reward_margin"], found["reward_accuracy"]) == (1.0, 0.25)
    assert found["reward_chosen_interval"] == mean_interval([0.5, -0.5, -1.5, -0.5], [1, 1, 1, 1])
    nothing_good = replace(
        one, nats=torch.tensor([]), tokens=torch.tensor([]), rewards=(torch.tensor([]), torch.ones(2))
    )
    assert figures_of([nothing_good]) == {"reward_rejected": 1.0, "reward_accuracy": 0.5}
    assert figures_of([figures([1.0], [1], [4.0], [2])]) == {"answer_loss": 2.0, "answer_interval": None}


@pytest.mark.parametrize(
    ("interval", "displaced"), [(None, False), ((-2.0, -0.1), True), ((-2.0, 0.1), False), ((-1e-5, -1e-6), False)]
)
def test_answers_are_displaced_where_the_whole_interval_says_so(interval: Any, displaced: bool) -> None:
    assert is_displaced(interval) is displaced


METHODS = {
    **{name: (name, {}) for name in ("sft", "dpo")},
    "kto": ("kto", {"desirable_weight": 1.5, "undesirable_weight": 0.5, "beta": 0.4}),
    **{name: ("dpo", {"loss_type": name, "beta": 0.4}) for name in ("ipo", "apo_zero")},
    "smoothed": ("dpo", {"label_smoothing": 0.2, "beta": 0.4}),
    "with sft": ("dpo", {"sft_weight": 0.7}),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_of_the_rows_is_that_of_the_method(home: Home, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """TRL's, in training and held out, whatever a step is cut into; by the recipe's weights and beta."""
    monkeypatch.setattr("appliance.train.micro_batches.MICRO_BATCH_TOKENS", 60)
    method, weights = METHODS[name]
    settings = {"epochs": 9, "max_steps": 6, "evaluate_every": 2, "learning_rate": 0.01, **weights}
    run = add_run(home, "r", stage(method, DATASETS[method], **settings))
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace("eval_share = 0.2", "eval_share = 0.5"))
    found: list[tuple[float, float]] = []
    log = MicroBatchTrainer.log

    def logged(trainer: MicroBatchTrainer, logs: dict[str, Any], *arguments: Any) -> None:
        loss = logs.get("loss", logs.get("eval_loss"))
        mean = row_loss(trainer._figures)
        if loss is not None and mean:
            found.append((loss, mean[0]))
        log(trainer, logs, *arguments)

    monkeypatch.setattr(MicroBatchTrainer, "log", logged)
    assert work(run, method) == 0
    assert len(found) == 6 + 4
    for loss, mean in found:
        assert mean == pytest.approx(loss, abs=1e-5)
    for event in events(run, "eval")[1:]:
        low, high = event["interval"]
        assert low < event["loss"] < high
        assert low + high == pytest.approx(2 * event["loss"], abs=1e-4)
    losses = result(run, method)
    assert losses["held_out_interval"] in [event["interval"] for event in events(run, "eval")[1:]]
