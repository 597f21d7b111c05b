"""Direct preference optimisation against the adapter that the stage starts from."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from appliance.data.render import render_prompt
from appliance.train.answers import RowFigures, outputs_of
from appliance.train.recipe import DpoStage
from appliance.train.rows import Example, answer_ids
from appliance.train.trainer import Batch, Method, MicroBatchTrainer, TrainerInputs, build_trainer


class _Trainer(MicroBatchTrainer, DPOTrainer):
    sequences_per_row = 2

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        # TRL would tokenise again, without the mask.
        return dataset

    def compute_loss(self, model: Any, inputs: Batch, *arguments: Any, **named: Any) -> Any:
        """TRL's, and by the recipe's weight what each chosen answer costs a token (equation 2 of arXiv 2404.19733)."""
        with outputs_of(model) as outputs:
            loss = super().compute_loss(model, inputs, *arguments, **named)
        if not self.stage.sft_weight:
            return loss
        chosen, _ = outputs[0].log_probs.chunk(2)
        counted, _ = outputs[0].label_mask.chunk(2)
        return loss - self.stage.sft_weight * (chosen.sum(1) / counted.sum(1)).mean()

    def row_figures(self, inputs: Batch, nats: torch.Tensor, tokens: torch.Tensor) -> RowFigures:
        chosen, rejected = nats.chunk(2)
        tokens_chosen, tokens_rejected = tokens.chunk(2)
        gains = -chosen - inputs["ref_chosen_logps"], -rejected - inputs["ref_rejected_logps"]
        losses = _losses(self.stage, *gains, tokens_chosen, tokens_rejected)
        losses = losses + self.stage.sft_weight * chosen / tokens_chosen
        rewards = self.beta * gains[0], self.beta * gains[1]
        return RowFigures(losses, torch.ones_like(losses), chosen, tokens_chosen, rewards, rewards[0] > rewards[1])


def _losses(
    stage: DpoStage,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    tokens_chosen: torch.Tensor,
    tokens_rejected: torch.Tensor,
) -> torch.Tensor:
    """The loss of each pair (pairs), whose answers the model makes so many nats likelier than the reference does.

    Sources: equation 7 of arXiv 2305.18290, with label smoothing 12 of 2403.00409; equation 17 of
    2310.12036, a token (ipo); equation 7 of 2408.06266 (apo_zero).
    """
    beta, flipped = stage.beta, stage.label_smoothing
    margin = beta * (chosen - rejected)
    match stage.loss_type:
        case "ipo":
            return (chosen / tokens_chosen - rejected / tokens_rejected - 1 / (2 * beta)) ** 2
        case "apo_zero":
            return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
    return (-(1 - flipped) * logsigmoid(margin) + flipped * logsigmoid(-margin)) / (1 - 2 * flipped)


def examples(tokenizer: Any, row: dict[str, Any]) -> list[Example]:
    """The prompt with the header of the answer, and both answers up to their end-of-turn token."""
    prompt = render_prompt(tokenizer, row["prompt"], row.get("tools"))
    chosen, rejected = (answer_ids(tokenizer, row, key, prompt) for key in ("chosen", "rejected"))
    return [{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}]


def length(example: Example) -> int:
    return len(example["prompt_ids"]) + max(len(example["chosen_ids"]), len(example["rejected_ids"]))


def trained(example: Example) -> int:
    return len(example["chosen_ids"]) + len(example["rejected_ids"])


def trainer(stage: DpoStage, arguments: dict[str, Any], given: TrainerInputs) -> Any:
    """TRL's trainer, the reference's log-probabilities computed once per row."""
    config = DPOConfig(
        beta=stage.beta,
        loss_type=["robust" if stage.label_smoothing else stage.loss_type],
        label_smoothing=stage.label_smoothing,
        max_length=None,
        precompute_ref_log_probs=True,
        **arguments,
    )
    return build_trainer(_Trainer, stage, config, given)


COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
DPO = Method(examples, length, trained, COLUMNS, trainer, sequences=_Trainer.sequences_per_row)
