"""What both of TRL's trainers are given so that a resumed stage trains exactly as one that was never interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as Table
from transformers import Trainer

from appliance.data.dataset import Kind
from appliance.train.checkpoints import seal
from appliance.train.order import LengthSampler
from appliance.train.rows import Example


@dataclass(frozen=True)
class Method:
    """A way to train: the kind of dataset it reads, a row as its example, and the trainer over examples."""

    kind: Kind
    example: Callable[[Any, dict[str, Any]], Example]
    """(tokenizer, canonical row) -> example. Raises InvalidInput for a row that cannot be trained on."""
    length: Callable[[Example], int]
    """Tokens of the longest sequence in an example."""
    trainer: Callable[[Any, Any, Any, dict[str, Any], list[Example], list[Example]], Any]
    """(adapted model, tokenizer, stage, arguments, train, held out) -> Transformers trainer."""


class ResumableTrainer(Trainer):
    """Mixed into a TRL trainer, before it in the order of resolution."""

    row_lengths: list[int]

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthSampler:
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthSampler(self.row_lengths, batch, self.args.seed)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # Past TRL's own, which writes a model card beside the checkpoint.
        Trainer._save_checkpoint(self, model, trial)
        seal(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")


def build_trainer(
    kind: type[ResumableTrainer],
    config: Any,
    model: Any,
    tokenizer: Any,
    train: list[Example],
    held_out: list[Example],
    length: Callable[[Example], int],
) -> Any:
    """The trainer of class `kind` over tokenised examples, with the adapter as it was before.

    TRL rounds a QLoRA adapter to bf16, which loses small updates.
    """
    before = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
    trainer = kind(
        model=model,
        args=config,
        train_dataset=_table(train),
        eval_dataset=_table(held_out),
        processing_class=tokenizer,
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in before:
                weight.data = before[name]
    if "ref" in getattr(model, "peft_config", {}):
        # The reference has served: its log-probabilities are in the rows. Left in, a checkpoint would hold two
        # adapters, of which a resume loads this one only.
        model.delete_adapter("ref")
    trainer.row_lengths = [length(row) for row in train]
    return trainer


def _table(examples: list[Example]) -> Any:
    """Examples as the in-memory table that trainers read; None where there are none."""
    return Table.from_list(examples) if examples else None
