"""Supervised fine-tuning on the assistant's turns."""

from __future__ import annotations

from typing import Any

from trl import SFTConfig, SFTTrainer

from appliance.data.render import render_conversation
from appliance.train.recipe import SftStage
from appliance.train.rows import Example, require_trained
from appliance.train.trainer import Given, Method, PartwiseTrainer, build_trainer

IGNORED = -100
"""The label of a token that the loss leaves out."""


class _Trainer(PartwiseTrainer, SFTTrainer):
    pass


def example(tokenizer: Any, row: dict[str, Any]) -> Example:
    """The row's token ids, and as labels those that are trained."""
    rendered = render_conversation(tokenizer, row["messages"], row.get("tools"))
    require_trained(rendered.trained)
    labels = [
        token if trained else IGNORED for token, trained in zip(rendered.input_ids, rendered.trained, strict=True)
    ]
    return {"input_ids": rendered.input_ids, "labels": labels}


def length(example: Example) -> int:
    return len(example["input_ids"])


def trainer(stage: SftStage, arguments: dict[str, Any], given: Given) -> Any:
    """TRL's trainer over examples that need no preparation."""
    config = SFTConfig(max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **arguments)
    return build_trainer(_Trainer, config, given, length)


SFT = Method("messages", example, length, trainer)
