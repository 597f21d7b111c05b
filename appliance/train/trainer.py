"""What TRL's trainers are given: steps in micro-batches that fit the memory, and a resume that changes nothing."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch.utils.data import DataLoader
from transformers import Trainer
from trl.trainer import dpo_trainer, kto_trainer

from appliance.train.answers import RowFigures, figures_of, outputs_of, row_loss, sequence_nats
from appliance.train.checkpoints import saving
from appliance.train.examples import Examples
from appliance.train.head import install
from appliance.train.interruption import Interrupted, Interruption
from appliance.train.micro_batches import MicroBatchLimit
from appliance.train.model import ON_GPU
from appliance.train.optimizer import hold_moments, set_loraplus_rates
from appliance.train.order import LengthSampler
from appliance.train.recipe import Stage
from appliance.train.rows import Example
from appliance.train.seeds import seed_for

Batch = dict[str, torch.Tensor]
"""What TRL's collators make of rows: a value a row; a sequence a row; or all rows' first, then all rows' second."""


@dataclass(frozen=True)
class TrainerInputs:
    """What every trainer is made of, whatever its method."""

    model: Any
    """The base with its adapter."""
    tokenizer: Any
    train: Examples
    held_out: Examples
    limit: MicroBatchLimit
    interruption: Interruption


@dataclass(frozen=True)
class Method:
    """A way to train: a row as its examples, and the trainer over examples."""

    examples: Callable[[Any, dict[str, Any]], list[Example]]
    """(tokenizer, canonical row) -> examples. Raises InvalidInput for a row that cannot be trained on."""
    length: Callable[[Example], int]
    """Tokens of the longest sequence in an example."""
    trained: Callable[[Example], int]
    """Tokens of an example that are trained."""
    columns: tuple[str, ...]
    """What an example has: lists of token ids, and `label`, which is true or false."""
    trainer: Callable[[Any, dict[str, Any], TrainerInputs], Any]
    """(stage, Transformers' training arguments, what is trained) -> Transformers trainer."""
    sequences: int = 1
    """Sequences of an example that go through the model together."""
    compared: int = 0
    """Sequences of an example that only go forward, in training too."""


class MicroBatchTrainer(Trainer):
    """Mixed into a TRL trainer, before it in the order of resolution.

    To Transformers a batch is all rows of an optimiser step. It goes through the model in micro-batches of rows of like
    length, whose losses add up to the whole batch's: a mean over trained tokens by their number in the batch, one over
    rows by each micro-batch's share of them.
    """

    row_lengths: list[int]
    sequences_per_row = 1
    origin: dict[str, str]
    """What the weights follow from, as checkpoints say it."""
    stage: Any
    """What the recipe says of it."""
    _figures: Sequence[RowFigures] = ()
    """Of the micro-batches of the step or the evaluation that was last."""
    _loss = 0.0

    def __init__(self, *, limit: MicroBatchLimit, interruption: Interruption, **named: Any) -> None:
        # Before TRL's own, which runs the reference.
        self.limit = limit
        self.interruption = interruption
        super().__init__(**named)

    def row_figures(self, inputs: Batch, nats: torch.Tensor, tokens: torch.Tensor) -> RowFigures:
        """Of the rows of a pass, whose sequences cost so many nats over so many trained tokens; by each method."""
        raise NotImplementedError

    def compute_loss(self, model: Any, inputs: Batch, *arguments: Any, **named: Any) -> Any:
        with outputs_of(model) as outputs:
            loss = super().compute_loss(model, inputs, *arguments, **named)
        self._figures = [*self._figures, self.row_figures(inputs, *sequence_nats(inputs, outputs[0]))]
        return loss

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        def attempt() -> torch.Tensor:
            model.train()
            model.zero_grad()
            # So that dropout follows from the recipe's seed and the step alone, whatever came before.
            torch.manual_seed(seed_for(self.args.seed, "dropout", self.state.global_step))
            losses = []
            # Under autocast its products are bf16 all the same, and the adapter's input would be kept in fp32 too.
            with disable_input_dtype_casting(model, active=ON_GPU):
                for loss in self._losses(model, inputs, num_items_in_batch):
                    self.accelerator.backward(loss)
                    losses.append(loss.detach())
            return torch.stack(losses).sum()

        loss = self.limit.fit(attempt)
        self._loss = loss.item()
        # Transformers adds it to what it takes away again when it is told: a NaN would stay for all later steps.
        return loss.nan_to_num()

    def prediction_step(
        self, model: Any, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        (inputs,), items = self.get_batch_samples(iter([inputs]), 1, self.args.device)
        with torch.no_grad():
            loss = self.limit.fit(lambda: torch.stack(list(self._losses(model, inputs, items))).sum())
        return loss, None, None

    def _losses(self, model: Any, inputs: Batch, items: Any) -> Iterator[torch.Tensor]:
        """The loss of each micro-batch, which add up to the batch's, a mean over its `items` where that is a number.

        The caller's work on a loss ends before the next micro-batch begins.
        """
        self._figures = ()
        micro_batches = self.micro_batches(inputs)
        # Transformers' name for their number, over which TRL takes the mean of the loss of routers.
        self.current_gradient_accumulation_steps = len(micro_batches)
        for number, (micro_batch, share) in enumerate(micro_batches):
            if number:
                self._obey()
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, self._prepare_inputs(micro_batch), num_items_in_batch=items)
            yield loss if items is not None else loss * share

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        for figures in self._metrics.values():
            figures.clear()  # TRL's means of the micro-batches' means
        if "loss" in logs:
            logs |= {"loss": self._loss} | figures_of(self._figures)
        if "eval_loss" in logs:
            logs |= {f"eval_{name}": figure for name, figure in figures_of(self._figures).items()}
            if found := row_loss(self._figures):
                _, logs["eval_interval"] = found
        super().log(logs, start_time)

    def compute_ref_log_probs(self, model: Any, inputs: Batch) -> tuple[torch.Tensor, ...]:
        """TRL's log-probabilities of the reference, for the methods that have one."""
        score = super().compute_ref_log_probs
        scores = self.limit.fit(lambda: [score(model, batch) for batch, _ in self.micro_batches(inputs)])
        return tuple(torch.cat(rows) for rows in zip(*scores, strict=True))

    def micro_batches(self, inputs: Batch) -> list[tuple[Batch, float]]:
        """`inputs` as forward passes take it, without needless padding, and each one's share of the rows."""
        count = len(inputs["attention_mask"]) // self.sequences_per_row
        lengths = inputs["attention_mask"].sum(1).view(-1, count).amax(0).tolist()
        cuts = self.limit.divide(lengths, self.sequences_per_row)
        return [(_micro_batch(inputs, count, cut), (cut.stop - cut.start) / count) for cut in cuts]

    def _obey(self) -> None:
        if self.interruption.requested:
            raise Interrupted

    def get_train_dataloader(self) -> Any:
        """Rows of like length in a batch, in an order that follows from the seed and the epoch alone."""
        sampler = LengthSampler(self.row_lengths, self.args.train_batch_size, self.args.seed)
        loader = DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            sampler=sampler,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if not optimizer.state:
            set_loraplus_rates(optimizer, self.model, self.stage.loraplus_ratio)
            hold_moments(optimizer)
        return optimizer

    def save_last_step(self, since: int) -> None:
        """From within a step or an evaluation: a checkpoint of the state before, where that is later than `since`."""
        if self.state.global_step > since:
            self._save_checkpoint(self.model, None)
            self.callback_handler.on_save(self.args, self.state, self.control)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self.args.output_dir
        with saving(Path(folder), self.state.global_step, self.origin) as temporary:
            self.args.output_dir = str(temporary)
            try:
                # Past TRL's own, which writes a model card beside the checkpoint.
                Trainer._save_checkpoint(self, model, trial)
            finally:
                self.args.output_dir = folder


def build_trainer(
    kind: type[MicroBatchTrainer],
    stage: Stage,
    config: Any,
    given: TrainerInputs,
) -> Any:
    """The trainer of class `kind` over tokenised examples, with the adapter as it was before.

    TRL rounds a QLoRA adapter to bf16, which loses small updates.
    """
    model = given.model
    for module in (dpo_trainer, kto_trainer):
        # It would hash the whole model, to find what a reference has said of the same rows before: nothing is found so.
        module.hash_module = lambda _: secrets.token_hex()
    if not ON_GPU:
        install()
    train, held_out = given.train.by_length(), given.held_out.by_length()
    before = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
    trainer = kind(
        model=model,
        args=config,
        train_dataset=train.table,
        eval_dataset=held_out.table if len(held_out) else None,
        processing_class=given.tokenizer,
        limit=given.limit,
        interruption=given.interruption,
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in before:
                weight.data = before[name]
    if "ref" in getattr(model, "peft_config", {}):
        # The reference has served: its log-probabilities are in the rows. Left in, a checkpoint would hold two
        # adapters, of which a resume loads this one only.
        model.delete_adapter("ref")
    trainer.stage = stage
    trainer.row_lengths = train.lengths
    return trainer


def _micro_batch(inputs: Batch, count: int, rows: slice) -> Batch:
    """The tensors of `rows` out of `count`, their sequences no longer than the longest of them; numbers as they are."""
    batch = {}
    for key, tensor in inputs.items():
        if tensor.dim() > 0:
            tensor = tensor.reshape(-1, count, *tensor.shape[1:])[:, rows].flatten(0, 1)
        batch[key] = tensor
    for prefix in ("", "KL_"):
        if f"{prefix}attention_mask" in batch:
            width = int(batch[f"{prefix}attention_mask"].sum(1).max())
            for name in ("input_ids", "attention_mask", "completion_mask", "labels"):
                if f"{prefix}{name}" in batch:
                    batch[f"{prefix}{name}"] = batch[f"{prefix}{name}"][:, :width]
    return batch
