"""Kahneman-Tversky optimisation on answers judged good or bad, against the adapter that the stage starts from."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from trl import KTOConfig, KTOTrainer

from appliance.data.render import render_prompt
from appliance.errors import InvalidInput
from appliance.train.answers import RowFigures
from appliance.train.examples import Examples
from appliance.train.recipe import KtoStage
from appliance.train.rows import Example, answer_ids
from appliance.train.trainer import Batch, Method, MicroBatchTrainer, TrainerInputs, build_trainer

NEIGHBOURS_TRIED = 64
"""How far the pairing looks for an answer to another prompt."""


class _Trainer(MicroBatchTrainer, KTOTrainer):
    """TRL estimates the KL term over a micro-batch; here it is that of the whole step, however that is divided."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        # TRL would tokenise again, and pair answers by their place in the file.
        return dataset

    def get_batch_samples(self, *arguments: Any) -> Any:
        batches, items = super().get_batch_samples(*arguments)
        for batch in batches:
            batch["kl"] = self.limit.fit(partial(self._kl, batch)).mean()
        return batches, items

    def _compute_kl_logps(self, model: Any, batch: Batch) -> Any:
        kl = batch.pop("kl", None)
        return super()._compute_kl_logps(model, batch) if kl is None else batch["ref_KL_logps"] + kl

    def row_figures(self, inputs: Batch, nats: torch.Tensor, tokens: torch.Tensor) -> RowFigures:
        """The loss by equation 7 of arXiv 2402.01306."""
        good = inputs["label"].bool()
        gain = -nats - inputs["ref_logps"]
        beyond = self.beta * (gain - inputs["kl"].clamp(min=0))
        value = torch.sigmoid(torch.where(good, beyond, -beyond))
        weight = torch.where(good, self.desirable_weight, self.undesirable_weight)
        rewards = self.beta * gain[good], self.beta * gain[~good]
        right = torch.where(good, beyond > 0, beyond < 0)
        return RowFigures(weight * (1 - value), torch.ones_like(nats), nats[good], tokens[good], rewards, right)

    def _kl(self, batch: Batch) -> torch.Tensor:
        """How much likelier than to the reference the mismatched answers of `batch` are, in nats (rows)."""
        score = super()._compute_kl_logps
        return torch.cat([score(self.model, some) - some["ref_KL_logps"] for some, _ in self.micro_batches(batch)])


def examples(tokenizer: Any, row: dict[str, Any]) -> list[Example]:
    """The prompt with the header of the answer, the answer up to its end-of-turn token, and what was thought of it."""
    prompt = render_prompt(tokenizer, row["prompt"], row.get("tools"))
    answer = answer_ids(tokenizer, row, "completion", prompt)
    return [{"prompt_ids": prompt, "completion_ids": answer, "label": row["label"]}]


def length(example: Example) -> int:
    return len(example["prompt_ids"]) + len(example["completion_ids"])


def trained(example: Example) -> int:
    return len(example["completion_ids"])


def mismatched(examples: Examples) -> Examples:
    """Examples with an answer of about the same length to another prompt, by which the KL term is estimated.

    An example keeps its own where no other prompt is near. Source: section 4.1 of arXiv 2402.01306.
    """
    if not len(examples):
        return examples
    prompts, answers = ([*examples.table[name]] for name in ("prompt_ids", "completion_ids"))
    order = sorted(range(len(examples)), key=lambda index: len(answers[index]))
    others = list(range(len(examples)))
    for place, index in enumerate(order):
        near = (order[(place + step) % len(order)] for step in range(1, NEIGHBOURS_TRIED))
        others[index] = next((other for other in near if prompts[other] != prompts[index]), index)
    longest = [max(len(answers[index]), len(answers[other])) for index, other in enumerate(others)]
    return Examples(
        examples.table.add_column("KL_completion_ids", [answers[other] for other in others]),
        [len(prompt) + answer for prompt, answer in zip(prompts, longest, strict=True)],
        examples.trained,
    )


def trainer(stage: KtoStage, arguments: dict[str, Any], given: TrainerInputs) -> Any:
    """TRL's trainer, over rows whose reference is computed once. Raises InvalidInput without good answers."""
    if not any(given.train.table["label"]):
        raise InvalidInput(
            "no_good_answers",
            "no answer to train on is judged good, and the model would only learn what not to say",
            "add rows whose label is true",
        )
    config = KTOConfig(
        beta=stage.beta,
        desirable_weight=stage.desirable_weight,
        undesirable_weight=stage.undesirable_weight,
        max_length=None,
        precompute_ref_log_probs=True,
        **arguments,
    )
    paired = replace(given, train=mismatched(given.train), held_out=mismatched(given.held_out))
    return build_trainer(_Trainer, stage, config, paired)


COLUMNS = ("prompt_ids", "completion_ids", "label")
KTO = Method(examples, length, trained, COLUMNS, trainer, compared=1)
