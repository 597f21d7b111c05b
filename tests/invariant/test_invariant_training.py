"""What must hold of any training, by the worker itself on a tiny model, and against plain formulas."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import FACTS, add_run, events, losses, read_recipe, stage, work
from torch.nn import functional

from appliance.data.dataset import Dataset
from appliance.data.tokenizer import load_tokenizer
from appliance.home import Home
from appliance.train.examples import Examples
from appliance.train.kto import mismatched
from appliance.train.model import load_adapter, load_model
from appliance.train.order import epoch_order
from appliance.train.rows import IGNORED
from appliance.train.stage import METHODS

DATASETS = {"sft": "FACTS", "dpo": "PREFERENCES", "kto": "JUDGEMENTS"}


def adapter(run: Path, name: str) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_file(run / name / "adapter" / "adapter_model.safetensors")
    return weights


@pytest.mark.parametrize("method", DATASETS)
def test_eight_rows_at_once_train_like_eight_times_one(home: Home, method: str) -> None:
    settings = {"batch_size": 8, "epochs": 6, "learning_rate": 0.005}
    whole, single = (
        add_run(home, f"by{micro}", stage(method, DATASETS[method], micro_batch_size=micro, **settings))
        for micro in (8, 1)
    )
    work(whole, method)
    work(single, method)
    assert losses(single, method) == pytest.approx(losses(whole, method), abs=1e-4)
    for name, weight in adapter(whole, method).items():
        torch.testing.assert_close(adapter(single, method)[name], weight, rtol=0, atol=1e-3)


def nats(model: Any, row: dict[str, list[int]]) -> tuple[float, int]:
    """Loss over the trained tokens of one row without padding, and their number."""
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    total = functional.cross_entropy(logits, labels[1:], ignore_index=IGNORED, reduction="sum")
    return float(total), int((labels[1:] != IGNORED).sum())


def test_the_loss_of_a_bucketed_step_is_the_mean_over_its_trained_tokens(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.train.micro_batches.MICRO_BATCH_TOKENS", 60)
    run = add_run(home, "r", stage("sft", "FACTS", batch_size=6, max_steps=2))
    work(run, "sft")
    recipe, model = read_recipe(run), load_model(home.models / "tiny")
    tokenizer, dataset = load_tokenizer(home.models / "tiny"), Dataset.open(home, read_recipe(run).stages[0].dataset)
    train, held_out = (
        sorted(
            (example for index in rows for example in METHODS["sft"].examples(tokenizer, dataset.rows[index])),
            key=METHODS["sft"].length,
        )
        for rows in dataset.split(recipe.eval_share)
    )
    first = epoch_order([METHODS["sft"].length(row) for row in train], 6, recipe.seed, 0)[:6]
    for said, rows in (
        (events(run, "step")[0]["loss"], [train[index] for index in first]),
        (events(run, "eval")[0]["loss"], held_out),
    ):
        totals, counts = zip(*(nats(model, row) for row in rows), strict=True)
        assert said == pytest.approx(sum(totals) / sum(counts), abs=1e-4)
        mean_of_rows = sum(total / count for total, count in zip(totals, counts, strict=True)) / len(rows)
        assert abs(said - mean_of_rows) > 1e-3, "the wrong mean would show"


def test_qlora_is_the_same_for_the_same_seed(home: Home) -> None:
    text = "dropout = 0.1\n" + stage("sft", "FACTS")
    one, same, other = (add_run(home, id, text, "qlora") for id in ("one", "same", "other"))
    (other / "recipe.toml").write_text((other / "recipe.toml").read_text().replace("seed = 17", "seed = 18"))
    for run in (one, same, other):
        work(run, "sft")
    assert losses(same, "sft") == losses(one, "sft")
    assert losses(other, "sft") != losses(one, "sft")
    assert all(torch.equal(weight, adapter(same, "sft")[name]) for name, weight in adapter(one, "sft").items())


@pytest.mark.parametrize("kind", ["lora", "qlora", "rslora", "dora"])
@pytest.mark.parametrize("before", ["", "sft"])
def test_the_first_loss_of_dpo_is_the_logarithm_of_two(home: Home, kind: str, before: str) -> None:
    stages = (stage("sft", "FACTS") if before else "") + stage("dpo", "PREFERENCES", learning_rate=0.002, max_steps=1)
    run = add_run(home, "r", stages, kind)
    work(run, *([before] if before else []), "dpo")
    assert losses(run, "dpo")[1] == pytest.approx(math.log(2), abs=1e-5)


def log_probability(model: Any, prompt: list[int], answer: list[int]) -> float:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return -float(functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_the_reference_is_the_frozen_sft_adapter(home: Home, kind: str) -> None:
    """DPO's last held-out loss, by equation 7 of arXiv 2305.18290, with the sft adapter as it was left."""
    dpo = stage("dpo", "PREFERENCES", learning_rate=0.01, keep="last", evaluate_every=3, beta=0.3, sft_weight=0.5)
    run = add_run(home, "r", stage("sft", "FACTS") + dpo, kind)
    work(run, "sft")
    left = adapter(run, "sft")
    work(run, "dpo")
    assert all(torch.equal(weight, adapter(run, "sft")[name]) for name, weight in left.items())
    tokenizer, dataset = load_tokenizer(home.models / "tiny"), Dataset.open(home, read_recipe(run).stages[1].dataset)
    rows = [
        example
        for index in dataset.split(0.2)[1]
        for example in METHODS["dpo"].examples(tokenizer, dataset.rows[index])
    ]
    scores, chosen = [], []
    for name in ("dpo", "sft"):
        base = load_model(home.models / "tiny", quantised=kind == "qlora")
        model = load_adapter(base, run / name / "adapter", trainable=False)
        chosen.append([log_probability(model, row["prompt_ids"], row["chosen_ids"]) for row in rows])
        rejected = [log_probability(model, row["prompt_ids"], row["rejected_ids"]) for row in rows]
        scores.append([one - other for one, other in zip(chosen[-1], rejected, strict=True)])
    margins = [policy - reference for policy, reference in zip(*scores, strict=True)]
    assert min(abs(margin) for margin in margins) > 0.1, "the policy has moved"
    preferred = sum(-float(functional.logsigmoid(torch.tensor(0.3 * margin))) for margin in margins)
    taught = -sum(logp / len(row["chosen_ids"]) for logp, row in zip(chosen[0], rows, strict=True))
    told = events(run, "eval", "dpo")[-1]
    assert told["loss"] == pytest.approx((preferred + 0.5 * taught) / len(rows), abs=1e-4)
    assert told["answer_loss"] == pytest.approx(-sum(chosen[0]) / sum(len(row["chosen_ids"]) for row in rows), abs=1e-4)
    assert told["chosen_logp"] == pytest.approx(sum(chosen[0]) / len(rows), abs=1e-3)
    assert told["reward_chosen"] == pytest.approx(0.3 * (sum(chosen[0]) - sum(chosen[1])) / len(rows), abs=1e-3)
    assert told["reward_margin"] == pytest.approx(0.3 * sum(margins) / len(rows), abs=1e-3)
    assert told["reward_accuracy"] == sum(margin > 0 for margin in margins) / len(rows)
    assert {"reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "chosen_logp"} <= events(
        run, "step", "dpo"
    )[-1].keys()


def test_the_loss_of_kto_is_that_of_its_paper(home: Home) -> None:
    """Equation 7 of arXiv 2402.01306 over the held-out rows, its KL term over answers to other prompts."""
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.01, "beta": 0.3}
    kto = stage("kto", "JUDGEMENTS", learning_rate=0.002, keep="last", **weights)
    run = add_run(home, "r", stage("sft", "FACTS") + kto)
    (run / "recipe.toml").write_text((run / "recipe.toml").read_text().replace("eval_share = 0.2", "eval_share = 0.5"))
    work(run, "sft", "kto")
    tokenizer, dataset = load_tokenizer(home.models / "tiny"), Dataset.open(home, read_recipe(run).stages[1].dataset)
    held_out = [
        example
        for index in dataset.split(0.5)[1]
        for example in METHODS["kto"].examples(tokenizer, dataset.rows[index])
    ]
    rows = [*mismatched(Examples.of(held_out, METHODS["kto"])).table]
    policy, reference = (
        load_adapter(load_model(home.models / "tiny"), run / name / "adapter", trainable=False)
        for name in ("kto", "sft")
    )

    def reward(row: dict[str, Any], answer: str) -> float:
        prompt, ids = row["prompt_ids"], row[answer]
        return log_probability(policy, prompt, ids) - log_probability(reference, prompt, ids)

    kl = max(sum(reward(row, "KL_completion_ids") for row in rows) / len(rows), 0)
    assert kl > 0.1, kl
    expected = 0.0
    for row in rows:
        margin = reward(row, "completion_ids") - kl
        weight, sign = (1.5, 1) if row["label"] else (0.01, -1)
        expected += weight * (1 - float(torch.sigmoid(torch.tensor(sign * 0.3 * margin)))) / len(rows)
    assert events(run, "eval", "kto")[-1]["loss"] == pytest.approx(expected, abs=1e-4)
    good = [row for row in rows if row["label"]]
    cost = -sum(log_probability(policy, row["prompt_ids"], row["completion_ids"]) for row in good)
    tokens = sum(len(row["completion_ids"]) for row in good)
    assert events(run, "eval", "kto")[-1]["answer_loss"] == pytest.approx(cost / tokens, abs=1e-4)
    by_label = {
        label: [reward(row, "completion_ids") for row in rows if row["label"] == label] for label in (True, False)
    }
    for name, label in (("reward_chosen", True), ("reward_rejected", False)):
        expected = 0.3 * sum(by_label[label]) / len(by_label[label])
        assert events(run, "eval", "kto")[-1][name] == pytest.approx(expected, abs=1e-3)
    right = sum(one > kl for one in by_label[True]) + sum(one < kl for one in by_label[False])
    assert events(run, "eval", "kto")[-1]["reward_accuracy"] == right / len(rows)


def test_every_fact_is_trained_to_its_end_of_turn(home: Home) -> None:
    tokenizer = load_tokenizer(home.models / "tiny")
    for row in FACTS:
        labels = METHODS["sft"].examples(tokenizer, row)[0]["labels"]
        counted = tokenizer.decode([token for token in labels if token != IGNORED])
        assert counted == f"{row['messages'][-1]['content']}<|im_end|>"
