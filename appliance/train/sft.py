"""Supervised fine-tuning on the assistant's turns."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer

from appliance.data.render import Rendered, render_conversation
from appliance.train.answers import RowFigures
from appliance.train.packing import can_pack, pack, rows_apart
from appliance.train.recipe import SftStage
from appliance.train.rows import IGNORED, Example, nothing_to_train
from appliance.train.trainer import Batch, Method, MicroBatchTrainer, TrainerInputs, build_trainer


class _Trainer(MicroBatchTrainer, SFTTrainer):
    packs = False
    """Each micro-batch goes through the model as one sequence."""

    def micro_batches(self, inputs: Batch) -> list[tuple[Batch, float]]:
        found = super().micro_batches(inputs)
        return [(pack(batch), share) for batch, share in found] if self.packs else found

    def row_figures(self, inputs: Batch, nats: torch.Tensor, tokens: torch.Tensor) -> RowFigures:
        return RowFigures(nats, tokens, nats, tokens)

    def training_step(self, model: Any, *arguments: Any, **named: Any) -> torch.Tensor:
        with rows_apart(model) if self.packs else nullcontext():
            return super().training_step(model, *arguments, **named)

    def prediction_step(self, model: Any, *arguments: Any, **named: Any) -> tuple[torch.Tensor, None, None]:
        with rows_apart(model) if self.packs else nullcontext():
            return super().prediction_step(model, *arguments, **named)


def examples(tokenizer: Any, row: dict[str, Any]) -> list[Example]:
    """The row's token ids, and as labels those that are trained."""
    rendered = render_conversation(tokenizer, row["messages"], row.get("tools"))
    if not rendered:
        raise nothing_to_train()
    return [{"input_ids": one.input_ids, "labels": _labels(one)} for one in rendered]


def _labels(rendered: Rendered) -> list[int]:
    return [token if trained else IGNORED for token, trained in zip(rendered.input_ids, rendered.trained, strict=True)]


def length(example: Example) -> int:
    return len(example["input_ids"])


def trained(example: Example) -> int:
    return sum(label != IGNORED for label in example["labels"])


def trainer(stage: SftStage, arguments: dict[str, Any], given: TrainerInputs) -> Any:
    """TRL's trainer over examples that need no preparation."""
    config = SFTConfig(
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        neftune_noise_alpha=stage.neftune_alpha or None,
        **arguments,
    )
    # The noise is by the width of a pass, and of packed rows there would be next to none.
    packs = not stage.neftune_alpha and can_pack(given.model, given.limit.warn)
    built = build_trainer(_Trainer, stage, config, given)
    built.packs = packs
    return built


SFT = Method(examples, length, trained, ("input_ids", "labels"), trainer)
