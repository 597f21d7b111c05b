"""Ends a training that cannot come to anything."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from appliance.errors import ApplianceError
from appliance.train.answers import is_displaced
from appliance.train.events import EventLog
from appliance.train.recipe import AnyStage

STEPS_TO_MOVE = 5
"""Steps after which an adapter that is still as it was counts as not trained."""
NORMS_COMPARED = 64
LEAST_NORMS = 8
EXPLODES_AT = 100
"""Times the median gradient norm."""
HARMLESS_NORM = 10.0
"""A norm below never counts as exploding: near the end the median may be almost 0."""
TIMES_THE_START = 2
"""Answers that cost so many times what they cost at first, and half the way from there to a guess, are unlearnt."""


UNDISPLACED = {
    "dpo": "set sft_weight = 1, which holds them up, or raise beta",
    "kto": "raise desirable_weight, or beta",
}
"""What to do about chosen answers that become less likely, by method."""


class Diverged(ApplianceError):
    """The loss or the gradients have gone bad for good."""


class Guard(TrainerCallback):
    """Warns of each bad step, keeps it out of checkpoints, and raises Diverged after too many in a row.

    It also raises Diverged where the held-out answers are unlearnt. What it knows of earlier steps it reads from the
    run's events, so that a resumed stage is judged as one that never stopped.
    """

    def __init__(self, events: EventLog, stage: AnyStage) -> None:
        self.events = events
        self.stage = stage
        self._before: dict[str, float] = {}
        self._norms: deque[float] = deque(maxlen=NORMS_COMPARED)
        self._bad = 0
        self._vocabulary = 0
        self._displaced = False
        self._at_first: dict[str, float] = {}
        """What an answer cost at first, in nats a token: of those trained on (step), and of those held out (eval)."""

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, model: Any, **_: Any) -> None:
        self._before = _magnitudes(model)
        self._vocabulary = model.config.get_text_config().vocab_size
        self._displaced = any(
            event.get("code") == "displaced" for event in self.events.read() if event["stage"] == self.stage.name
        )
        said = {
            (event["step"], event["event"]): event
            for event in self.events.read()
            if event["stage"] == self.stage.name and event["event"] in ("step", "eval")
        }
        for (step, kind), event in sorted(said.items()):
            if step > state.global_step or not state.global_step:
                continue
            if kind == "step":
                self._judge(event["loss"], event["grad_norm"], event.get("answer_loss"))
            else:
                self._limit("eval", event.get("answer_loss"))

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any], **_: Any) -> None:
        at = f"step {state.global_step} of {self.stage.name}"
        if "loss" in logs:
            fault = self._judge(logs["loss"], logs["grad_norm"], logs.get("answer_loss"))
            if self._bad:
                control.should_save = False
            if not fault:
                return
            self.events.append("warning", self.stage.name, message=f"step {state.global_step}: {fault}")
            if self._bad >= self.stage.bad_steps:
                raise self._diverged(f"{fault} at {at}, {self._bad} in a row")
        elif "eval_loss" in logs:
            if not math.isfinite(logs["eval_loss"]):
                raise self._diverged(f"the held-out loss is NaN or infinite at {at}")
            limit = self._limit("eval", logs.get("eval_answer_loss"))
            if is_displaced(logs.get("eval_reward_chosen_interval")):
                self._warn_of_displacement(state.global_step, logs["eval_reward_chosen"])
            # The whole interval, because of few rows one that was learnt the other way round would be enough.
            interval = logs.get("eval_answer_interval")
            if interval and interval[0] > limit:
                unlearnt = _unlearnt(logs["eval_answer_loss"], self._at_first["eval"])
                raise self._diverged(f"{unlearnt} at {at}, on held-out rows")

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any, **_: Any
    ) -> None:
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            # The step then updates nothing: one such update would be the end of every weight.
            model.zero_grad()

    def _warn_of_displacement(self, step: int, reward: float) -> None:
        """Once a stage: the preference is met by unlearning both answers, the rejected one sooner."""
        if not self._displaced:
            self._displaced = True
            message = f"step {step}: the held-out chosen answers are less likely than before (reward {reward:.3g})"
            self.events.append(
                "warning", self.stage.name, code="displaced", message=message, next=UNDISPLACED[self.stage.method]
            )

    def _judge(self, loss: float, norm: float, answers: float | None) -> str:
        """What is wrong with the next step; empty: nothing."""
        limit = self._limit("step", answers)
        fault = fault_of(loss, norm, list(self._norms))
        if not fault and answers is not None and answers > limit:
            fault = _unlearnt(answers, self._at_first["step"])
        if fault:
            self._bad += 1
            return fault
        self._norms.append(norm)
        if answers is not None:
            # A step without an answer that is to be given does not show that the model has come back.
            self._bad = 0
        return ""

    def _limit(self, kind: str, answers: float | None) -> float:
        """What the answers of that kind of event may cost, of which the first has been seen now or before."""
        if answers is not None and math.isfinite(answers):
            self._at_first.setdefault(kind, answers)
        return unlearnt_at(self._at_first[kind], self._vocabulary) if kind in self._at_first else math.inf

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, model: Any, **_: Any) -> None:
        if self._bad or state.global_step != min(STEPS_TO_MOVE, state.max_steps):
            return
        after = _magnitudes(model)
        still = [name for name, magnitude in after.items() if magnitude == self._before[name]]
        if len(still) == len(after):
            raise ApplianceError(
                "adapter_unchanged",
                f"the adapter is unchanged after {state.global_step} steps of {self.stage.name}",
                f"raise learning_rate (now {self.stage.learning_rate}), or target other modules",
            )
        if still:
            message = f"{len(still)} of {len(after)} adapted modules are unchanged after {state.global_step} steps"
            self.events.append("warning", self.stage.name, message=f"{message}, among them {still[0]}")

    def _diverged(self, message: str) -> Diverged:
        return Diverged("diverged", message, f"lower learning_rate (now {self.stage.learning_rate}), or mend the rows")


def fault_of(loss: float, norm: float, norms: list[float]) -> str:
    """What is wrong with a step of this loss and gradient norm after steps of those `norms`; empty: nothing."""
    if not math.isfinite(loss):
        return "the loss is NaN or infinite"
    if not math.isfinite(norm):
        return "the gradient is NaN or infinite"
    if loss == 0:
        return "the loss is exactly 0"
    usual = statistics.median(norms) if len(norms) >= LEAST_NORMS else math.inf
    if norm > max(EXPLODES_AT * usual, HARMLESS_NORM):
        return f"the gradient norm is {norm:.3g}, {norm / max(usual, 1e-12):.0f} times the usual"
    return ""


def unlearnt_at(at_first: float, vocabulary: int) -> float:
    """The nats a token above which answers count as unlearnt, of which each cost `at_first` before training.

    It is the same for all methods: a preference's own loss may fall while the chosen answer is unlearnt with the other.
    Half of what the model knew is lost where they cost half the way from there to a guess among all tokens, ln of the
    vocabulary. Neither batches that differ nor a stage that learns by heart cost as much. Twice is for a model that
    knew little, to which a guess is near.
    """
    return max(TIMES_THE_START * at_first, (at_first + math.log(vocabulary)) / 2)


def _unlearnt(answers: float, at_first: float) -> str:
    return f"the answers cost {answers:.3g} nats a token ({at_first:.3g} at first)"


def _magnitudes(model: Any) -> dict[str, float]:
    """Sum of the absolute trained weights of each adapted module."""
    found: dict[str, float] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            module = name.partition(".lora_")[0]
            found[module] = found.get(module, 0.0) + float(weight.detach().double().abs().sum())
    return found
