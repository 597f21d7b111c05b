"""What TRL's trainers are given: steps in parts that fit the memory, and a resume that changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset as Table
from transformers import Trainer

from appliance.train.answers import RowFigures, answer_loss, outputs_of, row_loss, sequence_nats
from appliance.train.checkpoints import saving
from appliance.train.head import NOT_COMPUTED, install
from appliance.train.interruption import Interrupted, Interruption
from appliance.train.model import ON_GPU
from appliance.train.order import LengthSampler
from appliance.train.room import Room
from appliance.train.rows import Example
from appliance.train.seeds import seed_for

Batch = dict[str, torch.Tensor]
"""What TRL's collators make of rows: a value a row; a sequence a row; or all rows' first, then all rows' second."""


@dataclass(frozen=True)
class Given:
    """What every trainer is made of, whatever its method."""

    model: Any
    """The base with its adapter."""
    tokenizer: Any
    train: list[Example]
    held_out: list[Example]
    room: Room
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
    trainer: Callable[[Any, dict[str, Any], Given], Any]
    """(stage, Transformers' training arguments, what is trained) -> Transformers trainer."""
    sequences: int = 1
    """Sequences of an example that go through the model together."""
    compared: int = 0
    """Sequences of an example that only go forward, in training too."""


class PartwiseTrainer(Trainer):
    """Mixed into a TRL trainer, before it in the order of resolution.

    To Transformers a batch is all rows of an optimiser step. It goes through the model in parts of rows of like length,
    whose losses add up to the whole batch's: a mean over trained tokens by their number in the batch, one over rows by
    each part's share of them.
    """

    row_lengths: list[int]
    sequences_per_row = 1
    origin: dict[str, str]
    """What the weights follow from, as checkpoints say it."""
    _figures: Sequence[RowFigures] = ()
    """Of the parts of the step or the evaluation that was last."""
    _saving_to = ""

    def __init__(self, *, room: Room, interruption: Interruption, **named: Any) -> None:
        # Before TRL's own, which runs the reference.
        self.room = room
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
        step = super().training_step

        def attempt() -> torch.Tensor:
            model.zero_grad()
            # So that dropout follows from the recipe's seed and the step alone, whatever came before.
            torch.manual_seed(seed_for(self.args.seed, "dropout", self.state.global_step))
            losses: list[torch.Tensor] = []
            self._figures = ()
            for part, share in self.parts(inputs):
                if losses:
                    self._obey()
                # What Transformers divides a mean over rows by; one over tokens it leaves alone.
                self.current_gradient_accumulation_steps = 1 / share
                losses.append(step(model, part, num_items_in_batch))
            return torch.stack(losses).sum()

        return self.room.fit(attempt)

    def prediction_step(
        self, model: Any, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor, None, None]:
        (inputs,), items = self.get_batch_samples(iter([inputs]), 1, self.args.device)

        def attempt() -> torch.Tensor:
            losses = []
            self._figures = ()
            for part, share in self.parts(inputs):
                self._obey()
                self.current_gradient_accumulation_steps = 1 / share
                loss = self.compute_loss(model, self._prepare_inputs(part), num_items_in_batch=items)
                losses.append(loss * share if items is None else loss)
            return torch.stack(losses).sum()

        with torch.no_grad():
            return self.room.fit(attempt), None, None

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        for figures in self._metrics.values():
            for name in NOT_COMPUTED:
                figures.pop(name, None)
        if "loss" in logs and (found := answer_loss(self._figures)):
            logs["answer_loss"], _ = found
        if "eval_loss" in logs:
            if found := answer_loss(self._figures):
                logs["eval_answer_loss"], logs["eval_answer_interval"] = found
            if found := row_loss(self._figures):
                _, logs["eval_interval"] = found
        super().log(logs, start_time)

    def compute_ref_log_probs(self, model: Any, inputs: Batch) -> tuple[torch.Tensor, ...]:
        """TRL's log-probabilities of the reference, for the methods that have one."""
        score = super().compute_ref_log_probs
        parts = self.room.fit(lambda: [score(model, part) for part, _ in self.parts(inputs)])
        return tuple(torch.cat(rows) for rows in zip(*parts, strict=True))

    def parts(self, inputs: Batch) -> list[tuple[Batch, float]]:
        """`inputs` as forward passes take it, without needless padding, and the share of rows in each part."""
        count = len(inputs["attention_mask"]) // self.sequences_per_row
        lengths = inputs["attention_mask"].sum(1).view(-1, count).amax(0).tolist()
        cuts = self.room.divide(lengths, self.sequences_per_row)
        return [(_part(inputs, count, cut), (cut.stop - cut.start) / count) for cut in cuts]

    def _obey(self) -> None:
        if self.interruption.requested:
            raise Interrupted

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthSampler:
        return LengthSampler(self.row_lengths, self.args.train_batch_size, self.args.seed)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if not optimizer.state:
            _take_memory(optimizer)
        return optimizer

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

    def save_last_step(self, since: int) -> None:
        """From within a step or an evaluation: a checkpoint of the state before, where that is later than `since`."""
        if self.state.global_step > since:
            self._save_checkpoint(self.model, None)
            self.callback_handler.on_save(self.args, self.state, self.control)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with saving(Path(self.args.output_dir), self.state.global_step, self.origin) as folder:
            self._saving_to = str(folder)
            # Past TRL's own, which writes a model card beside the checkpoint.
            Trainer._save_checkpoint(self, model, trial)
        self._saving_to = ""

    def _get_output_dir(self, trial: Any) -> str:
        return self._saving_to or str(self.args.output_dir)


def build_trainer(
    kind: type[PartwiseTrainer],
    config: Any,
    given: Given,
    length: Callable[[Example], int],
) -> Any:
    """The trainer of class `kind` over tokenised examples, with the adapter as it was before.

    TRL rounds a QLoRA adapter to bf16, which loses small updates.
    """
    model = given.model
    if not ON_GPU:
        install()
    train, held_out = sorted(given.train, key=length), sorted(given.held_out, key=length)
    before = {name: weight.data for name, weight in model.named_parameters() if weight.requires_grad}
    trainer = kind(
        model=model,
        args=config,
        train_dataset=_table(train),
        eval_dataset=_table(held_out),
        processing_class=given.tokenizer,
        room=given.room,
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
    trainer.row_lengths = [length(row) for row in train]
    return trainer


def _take_memory(optimizer: torch.optim.Optimizer) -> None:
    """Have AdamW, without weight decay, hold its moments now, by a step that moves nothing and does not count.

    Otherwise they come in the first step, where a lack of memory could not be mended: only passes can be repeated.
    """
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    for state in optimizer.state.values():
        state["step"].zero_()


def _table(examples: list[Example]) -> Any:
    """Examples as the in-memory table that trainers read; None where there are none."""
    return Table.from_list(examples) if examples else None


def _part(inputs: Batch, count: int, rows: slice) -> Batch:
    """The tensors of `rows` out of `count`, their sequences no longer than the longest of them; numbers as they are."""
    part = {}
    for key, tensor in inputs.items():
        if tensor.dim() > 0:
            tensor = tensor.reshape(-1, count, *tensor.shape[1:])[:, rows].flatten(0, 1)
        part[key] = tensor
    for prefix in ("", "KL_"):
        if f"{prefix}attention_mask" in part:
            width = int(part[f"{prefix}attention_mask"].sum(1).max())
            for name in ("input_ids", "attention_mask", "completion_mask", "labels"):
                if f"{prefix}{name}" in part:
                    part[f"{prefix}{name}"] = part[f"{prefix}{name}"][:, :width]
    return part
