"""A step in parts is the step of the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import FACTS, JUDGEMENTS, PREFERENCES, add_run, events, failure, read_recipe, stage, work
from trl.trainer.utils import hash_module

from appliance.data.tokenizer import load_tokenizer
from appliance.home import Home
from appliance.train.examples import Examples
from appliance.train.head import TrainedLogProbs
from appliance.train.interruption import Interruption
from appliance.train.micro_batches import MicroBatchLimit
from appliance.train.model import add_adapter, load_model
from appliance.train.rows import IGNORED
from appliance.train.simulation import _Ledger
from appliance.train.stage import METHODS, _arguments
from appliance.train.trainer import Batch, MicroBatchTrainer, TrainerInputs

ROWS = {"sft": FACTS, "dpo": PREFERENCES, "kto": JUDGEMENTS}


@pytest.fixture(params=["sft", "dpo", "kto"])
def trainer(request: pytest.FixtureRequest, home: Home, tmp_path: Path) -> MicroBatchTrainer:
    """A trainer of each method whose adapter is no longer zero."""
    method = METHODS[request.param]
    recipe = read_recipe(add_run(home, "r", stage(request.param, "FACTS", batch_size=6)))
    tokenizer = load_tokenizer(home.models / "tiny")
    model: PeftModel = add_adapter(load_model(home.models / "tiny"), recipe.adapter, 3)
    found = [example for row in ROWS[request.param] for example in method.examples(tokenizer, row)]
    examples = Examples.of(found, method)
    arguments = _arguments(tmp_path, recipe, recipe.stages[0], len(examples))
    given = TrainerInputs(model, tokenizer, examples, examples, MicroBatchLimit(), Interruption())
    built: MicroBatchTrainer = method.trainer(recipe.stages[0], arguments, given)
    torch.manual_seed(4)
    with torch.no_grad():
        for weight in built.model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    return built


def step(trainer: MicroBatchTrainer) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of the first batch."""
    trainer.create_optimizer_and_scheduler(1)
    (batch,), items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, batch, items)
    return loss, [weight.grad.clone() for weight in trainer.model.parameters() if weight.grad is not None]


def test_the_model_is_not_hashed(trainer: MicroBatchTrainer) -> None:
    assert getattr(trainer, "_precompute_model_hash", "") != hash_module(trainer.model)


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_no_run_finds_what_the_reference_of_another_has_said_of_the_same_rows(home: Home, method: str) -> None:
    """What is not hashed must not be found again, also not by the next run of the same process."""
    rows = {"dpo": "PREFERENCES", "kto": "JUDGEMENTS"}[method]
    first = []
    for epochs in (2, 12):
        run = add_run(home, f"r-{epochs}", stage("sft", "FACTS", epochs=epochs) + stage(method, rows, max_steps=1))
        assert work(run, "sft", method) == 0
        first.append(events(run, "step", method)[0]["loss"])
    assert first[0] == pytest.approx(first[1], abs=1e-4), "each begins as its own reference"


def batch_of(trainer: MicroBatchTrainer) -> Batch:
    batch: Batch = next(iter(trainer.get_train_dataloader()))
    return batch


@pytest.mark.parametrize("limit", [{"tokens": 40}, {"rows": 1}, {"rows": 4}])
def test_loss_and_gradient_are_those_of_the_whole_batch(trainer: MicroBatchTrainer, limit: dict[str, int]) -> None:
    whole, gradients = step(trainer)
    for name, value in limit.items():
        setattr(trainer.limit, name, value)
    assert len(trainer.micro_batches(batch_of(trainer))) > 1
    loss, parted = step(trainer)
    assert loss == pytest.approx(float(whole), rel=1e-4)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-3
    for one, other in zip(gradients, parted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_gradients_are_the_same_with_layers_computed_twice(trainer: MicroBatchTrainer) -> None:
    loss, gradients = step(trainer)
    calls = []
    layer = trainer.model.get_base_model().model.layers[0].mlp
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer.model.gradient_checkpointing_enable()
    again, twice = step(trainer)
    assert len(calls) >= 2 * len(trainer.micro_batches(batch_of(trainer))), "forward, and once more backward"
    assert again == loss
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-3
    assert all(torch.equal(one, other) for one, other in zip(gradients, twice, strict=True))


def test_held_out_loss_is_the_same_however_it_is_divided(trainer: MicroBatchTrainer) -> None:
    whole = trainer.evaluate()["eval_loss"]
    trainer.limit.rows = 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(whole, rel=1e-4)


def test_parts_hold_no_needless_padding(trainer: MicroBatchTrainer) -> None:
    trainer.limit.rows = 1
    for part, share in trainer.micro_batches(batch_of(trainer)):
        assert share == pytest.approx(1 / 6)
        assert bool(part["attention_mask"].any(0).all())
        assert part["input_ids"].shape == part["attention_mask"].shape


def test_the_head_sees_the_trained_tokens_only(trainer: MicroBatchTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """And logs none of the figures that it does not compute."""
    seen = []
    forward = TrainedLogProbs.forward

    def spy(ctx: Any, hidden: torch.Tensor, *rest: Any) -> Any:
        seen.append(len(hidden))
        return forward(ctx, hidden, *rest)

    monkeypatch.setattr(TrainedLogProbs, "forward", staticmethod(spy))
    trainer.limit.tokens = 10_000
    batch = batch_of(trainer)
    step(trainer)
    trained = batch["labels"] != IGNORED if "labels" in batch else batch["completion_mask"] == 1
    assert seen[-1] == int(trained[:, 1:].sum())
    trainer.log({"loss": 1.0})
    assert not {"entropy", "mean_token_accuracy", "logits/chosen"} & trainer.state.log_history[-1].keys()


def test_gradients_are_those_of_the_loss(trainer: MicroBatchTrainer) -> None:
    """Adam would hide a factor, which clipping and what is told of the norm would not."""
    _, gradients = step(trainer)
    (batch,), items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    trainer.model.zero_grad()
    for loss in trainer._losses(trainer.model, batch, items):
        loss.backward()
    plain = [weight.grad for weight in trainer.model.parameters() if weight.grad is not None]
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(gradients, plain, strict=True))


def test_no_two_seeds_have_a_step_of_dropout_in_common(trainer: MicroBatchTrainer) -> None:
    trainer.create_optimizer_and_scheduler(1)
    (batch,), items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    for layer in (layer for layer in trainer.model.modules() if hasattr(layer, "lora_dropout")):
        layer.lora_dropout["default"] = torch.nn.Dropout(0.5)

    def loss(seed: int, step: int) -> float:
        trainer.args.seed, trainer.state.global_step = seed, step
        return float(trainer.training_step(trainer.model, batch, items))

    found = [loss(seed, step) for seed in (17, 18, 19) for step in (0, 1, 2)]
    assert len(set(found)) == len(found)
    assert loss(18, 1) == found[4]


def test_the_optimiser_holds_its_memory_before_the_first_step_and_takes_none_in_it(trainer: MicroBatchTrainer) -> None:
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.create_optimizer_and_scheduler(1)
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    states = [trainer.optimizer.state[weight] for weight in trained]
    assert {float(value.abs().sum()) for state in states for value in state.values()} == {0.0}
    assert {state["exp_avg"].shape == weight.shape for state, weight in zip(states, trained, strict=True)} == {True}
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())
    step(trainer)
    with _Ledger(trainer.model) as ledger:
        trainer.optimizer.step()
    assert ledger.peak == 0
    assert {float(state["step"]) for state in states} == {1.0}
    assert any(not torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters())


def test_no_memory_for_the_optimiser_shows_before_any_pass(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: torch.optim.AdamW, closure: Any = None) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    run = add_run(home, "r", stage("sft", "FACTS"))
    assert work(run, "sft") == 1
    assert failure(run, "sft")["code"] == "out_of_memory"
    assert not events(run, "eval")
    assert not events(run, "step")
