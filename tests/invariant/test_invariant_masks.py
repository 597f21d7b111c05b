"""Masks never leak: what stands outside the mask changes nothing in the gradient that the trainer's own loss gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny import add_run, read_recipe, stage

from appliance.data.dataset import Dataset
from appliance.data.tokenizer import load_tokenizer
from appliance.home import Home
from appliance.train.examples import Examples
from appliance.train.interruption import Interruption
from appliance.train.micro_batches import MicroBatchLimit
from appliance.train.model import add_adapter, load_model
from appliance.train.rows import IGNORED
from appliance.train.stage import METHODS, _arguments
from appliance.train.trainer import Batch, MicroBatchTrainer, TrainerInputs

DATASETS = {"sft": "FACTS", "dpo": "PREFERENCES", "kto": "JUDGEMENTS"}
OTHER = 99
"""A token that is in no row."""


class Step(NamedTuple):
    """A trainer with a batch of its own."""

    trainer: MicroBatchTrainer
    batch: Batch
    items: Any

    @property
    def trained(self) -> torch.Tensor:
        """The mask (sequences, tokens)."""
        if "completion_mask" in self.batch:
            return self.batch["completion_mask"].bool()
        return self.batch["labels"] != IGNORED

    @property
    def real(self) -> torch.Tensor:
        """What is no padding (sequences, tokens)."""
        return self.batch["attention_mask"].bool()

    def gradients(self, **other: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of each trained weight, for the batch with some of its tensors replaced."""
        batch = {key: value.clone() for key, value in (self.batch | other).items()}
        self.trainer.training_step(self.trainer.model, batch, self.items)
        weights = self.trainer.model.named_parameters()
        found = {name: weight.grad.clone() for name, weight in weights if weight.grad is not None}
        assert max(float(gradient.abs().max()) for gradient in found.values()) > 1e-4
        return found


@pytest.fixture(params=DATASETS)
def step(request: pytest.FixtureRequest, home: Home, tmp_path: Path) -> Step:
    method = METHODS[request.param]
    recipe = read_recipe(add_run(home, "r", stage(request.param, DATASETS[request.param], batch_size=4)))
    tokenizer, dataset = load_tokenizer(home.models / "tiny"), Dataset.open(home, recipe.stages[0].dataset)
    model = add_adapter(load_model(home.models / "tiny"), recipe.adapter, 3)
    rows = [example for row in dataset.rows for example in method.examples(tokenizer, row)]
    inputs = Examples.of(rows, method), Examples.of([], method)
    given = TrainerInputs(model, tokenizer, *inputs, MicroBatchLimit(), Interruption())
    trainer = method.trainer(recipe.stages[0], _arguments(tmp_path, recipe, recipe.stages[0], 4), given)
    trainer.create_optimizer_and_scheduler(1)
    (batch,), items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    made = Step(trainer, batch, items)
    assert len(trainer.micro_batches(batch)) == 1
    assert 0 < int(made.trained.sum()) < int(made.real.sum()) < made.real.numel()
    assert not (batch["input_ids"] == OTHER).any()
    return made


@contextmanager
def reading(model: Any, ids: torch.Tensor) -> Iterator[None]:
    """Within, the model reads `ids`, whatever it is given, so that what it is given are targets alone."""
    hook = model.get_input_embeddings().register_forward_pre_hook(lambda *_: (ids,))
    try:
        yield
    finally:
        hook.remove()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(gradient, other[name]) for name, gradient in one.items())


def test_where_the_next_token_is_not_trained_the_hidden_state_has_no_gradient(step: Step) -> None:
    state: list[torch.Tensor] = []

    def watch(module: Any, inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.retain_grad()
            state.append(output)

    step.trainer.model.get_base_model().model.norm.register_forward_hook(watch)
    step.gradients()
    (hidden,) = state
    assert hidden.grad is not None
    moved = hidden.grad.abs().sum(-1) > 0
    assert torch.equal(moved[:, :-1], step.trained[:, 1:])
    assert not moved[:, -1].any()


def test_a_target_outside_the_mask_changes_nothing_and_one_within_it_does(step: Step) -> None:
    ids = step.batch["input_ids"]
    with reading(step.trainer.model, ids):
        before = step.gradients()
        assert same(before, step.gradients(input_ids=ids.masked_fill(~step.trained, OTHER)))
        targets = "labels" if "labels" in step.batch else "input_ids"
        for sequence, token in step.trained.nonzero()[:3].tolist():
            other = step.batch[targets].clone()
            other[sequence, token] = OTHER
            assert not same(before, step.gradients(**{targets: other}))


def test_a_sequence_ends_with_its_last_trained_token_and_what_pads_it_changes_nothing(step: Step) -> None:
    ids, places = step.batch["input_ids"], torch.arange(step.trained.shape[1])
    last = (step.trained * places).amax(1, keepdim=True)
    after = places > last
    assert not (after & step.real).any()
    before = step.gradients()
    assert same(before, step.gradients(input_ids=ids.masked_fill(after, OTHER)))
    assert not same(before, step.gradients(input_ids=ids.scatter(1, last - 1, OTHER)))
