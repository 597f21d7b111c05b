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
from appliance.train.checkpoints import saving
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
    origin: dict[str, str]
    """What the weights follow from, as checkpoints say it."""
    _saving_to = ""

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthSampler:
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthSampler(self.row_lengths, batch, self.args.seed)

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        norm: torch.Tensor = super()._clip_grad_norm(model)
        if not torch.isfinite(norm):
            # The step then updates nothing: one such update would be the end of every weight.
            model.zero_grad()
        return norm

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, *arguments: Any, **named: Any) -> None:
        super()._maybe_log_save_evaluate(tr_loss, *arguments, **named)
        # Transformers subtracts it from itself, which leaves what is no number as it is for all later steps.
        tr_loss.zero_()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with saving(Path(self.args.output_dir), self.state.global_step, self.origin) as folder:
            self._saving_to = str(folder)
            # Past TRL's own, which writes a model card beside the checkpoint.
            Trainer._save_checkpoint(self, model, trial)
        self._saving_to = ""

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving_to or str(self.args.output_dir)


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
