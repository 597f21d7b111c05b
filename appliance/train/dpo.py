"""Direct preference optimisation against the adapter that the stage starts from."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import logsigmoid
from trl import DPOConfig, DPOTrainer

from appliance.data.render import render_prompt
from appliance.train.answers import RowFigures
from appliance.train.recipe import DpoStage
from appliance.train.rows import Example, answer_ids
from appliance.train.trainer import Batch, Given, Method, PartwiseTrainer, build_trainer


class _Trainer(PartwiseTrainer, DPOTrainer):
    sequences_per_row = 2

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        # TRL would tokenise again, without the mask.
        return dataset

    def row_figures(self, inputs: Batch, nats: torch.Tensor, tokens: torch.Tensor) -> RowFigures:
        """The loss by equation 7 of arXiv 2305.18290."""
        chosen, rejected = nats.chunk(2)
        margins = (rejected + inputs["ref_rejected_logps"]) - (chosen + inputs["ref_chosen_logps"])
        losses = -logsigmoid(self.beta * margins)
        return RowFigures(losses, torch.ones_like(losses), chosen, tokens.chunk(2)[0])


def examples(tokenizer: Any, row: dict[str, Any]) -> list[Example]:
    """The prompt with the header of the answer, and both answers up to their end-of-turn token."""
    prompt = render_prompt(tokenizer, row["prompt"], row.get("tools"))
    chosen, rejected = (answer_ids(tokenizer, row, key, prompt) for key in ("chosen", "rejected"))
    return [{"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}]


def length(example: Example) -> int:
    return len(example["prompt_ids"]) + max(len(example["chosen_ids"]), len(example["rejected_ids"]))


def trained(example: Example) -> int:
    return len(example["chosen_ids"]) + len(example["rejected_ids"])


def trainer(stage: DpoStage, arguments: dict[str, Any], given: Given) -> Any:
    """TRL's trainer, the reference's log-probabilities computed once per row."""
    config = DPOConfig(beta=stage.beta, max_length=None, precompute_ref_log_probs=True, **arguments)
    return build_trainer(_Trainer, config, given, length)


DPO = Method(examples, length, trained, trainer, sequences=_Trainer.sequences_per_row)
