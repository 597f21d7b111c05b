"""What happens around an optimiser step: what the run says, when it evaluates and when it saves."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from appliance.train.events import EventLog
from appliance.train.interruption import ENDING, Interruption
from appliance.train.memory import peak_memory
from appliance.train.recipe import AnyStage

REWARDS = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "chosen_logp")
"""Figures of a method with a reference."""


class Reporter(TrainerCallback):
    """Writes the stage's events and a line of log per step."""

    def __init__(self, events: EventLog, stage: AnyStage) -> None:
        self.events = events
        self.stage = stage
        self._begun = 0.0
        self._tokens_before = 0
        self._busy_seconds = 0.0
        self._steps = 0

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._begun = time.monotonic()
        self._tokens_before = state.num_input_tokens_seen

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any) -> None:
        if "loss" not in logs:
            return
        seconds = time.monotonic() - self._begun
        self._busy_seconds += seconds
        self._steps += 1
        per_second = (state.num_input_tokens_seen - self._tokens_before) / seconds
        self.events.append(
            "step",
            self.stage.name,
            step=state.global_step,
            steps=state.max_steps,
            loss=logs["loss"],
            lr=logs["learning_rate"],
            grad_norm=logs["grad_norm"],
            tokens=state.num_input_tokens_seen,
            tokens_per_second=round(per_second, 1),
            eta_seconds=round((state.max_steps - state.global_step) * self._busy_seconds / self._steps, 1),
            memory=peak_memory(),
            **_known(logs, "answer_loss", *REWARDS),
        )
        print(
            f"{self.stage.name} step {state.global_step}/{state.max_steps}: "
            f"loss {logs['loss']:.4f}, {per_second:.0f} tokens/s",
            flush=True,
        )

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, metrics: dict[str, Any], **_: Any
    ) -> None:
        names = ("interval", "answer_loss", *REWARDS, "reward_chosen_interval")
        known = _known(metrics, *(f"eval_{name}" for name in names))
        self.events.append("eval", self.stage.name, step=state.global_step, loss=metrics["eval_loss"], **known)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        path = f"{self.stage.name}/checkpoint-{state.global_step}"
        self.events.append("checkpoint", self.stage.name, step=state.global_step, path=path)


SHARE = 1 / 40
"""Of the time of training, what evaluations with their samples take, and checkpoints, where a recipe leaves it open."""
UNSAVED = 60.0, 300.0
"""Seconds of training between two checkpoints then, at least and at most."""


@dataclass
class Expense:
    """What is done beside training, again and again: the seconds that it took last, and those trained since."""

    last: float | None = None
    """None: it has not been done yet by this process."""
    since: float = 0.0

    def is_due(self, least: float = 0.0, most: float = math.inf) -> bool:
        """Whether it may be done again for its SHARE, which it waits for between so many seconds."""
        wait = UNSAVED[0] if self.last is None else self.last / SHARE
        return self.since >= min(max(wait, least), most)


class Cadence(TrainerCallback):
    """Decides after each step whether to evaluate, to save, and to stop because that was asked for."""

    def __init__(self, folder: Path, stage: AnyStage, interruption: Interruption, *, evaluates: bool) -> None:
        self.folder = folder
        self.stage = stage
        self.interruption = interruption
        self.evaluates = evaluates
        self._evaluation, self._checkpoint = Expense(), Expense()
        self._told = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._seconds()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step, last = state.global_step, state.global_step >= state.max_steps
        seconds = self._seconds()
        self._evaluation.since += seconds
        self._checkpoint.since += seconds
        ending = (self.folder / ENDING).exists()
        due = is_evaluated(step, self.stage, state.max_steps)
        due |= not self.stage.evaluate_every and self._evaluation.is_due()
        control.should_evaluate = self.evaluates and (ending or due)
        every = self.stage.checkpoint_every
        control.should_save = not last and (step % every == 0 if every else self._checkpoint.is_due(*UNSAVED))
        control.should_training_stop |= ending
        self._obey(state, control)

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._evaluation = Expense(self._seconds())
        self._obey(state, control)

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._checkpoint = Expense(self._seconds())

    def _seconds(self) -> float:
        """Since this was asked last."""
        before, self._told = self._told, time.monotonic()
        return self._told - before

    def _obey(self, state: TrainerState, control: TrainerControl) -> None:
        if self.interruption.requested and 0 < state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


def _known(logs: dict[str, Any], *names: str) -> dict[str, Any]:
    """The figures of those names that are known, as events call them."""
    return {name.removeprefix("eval_"): logs[name] for name in names if logs.get(name) is not None}


def is_evaluated(step: int, stage: AnyStage, last: int) -> bool:
    """Whether the held-out loss is evaluated after `step` of `last` steps, whatever the time."""
    every = stage.evaluate_every or (max(last // 10, 1) if stage.patience else 0)
    return step == last or (every > 0 and step % every == 0)
