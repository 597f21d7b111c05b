"""Ends a training that cannot come to anything."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from appliance.errors import ApplianceError
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


class Diverged(ApplianceError):
    """The loss or the gradients have gone bad for good."""


class Guard(TrainerCallback):
    """Warns of each bad step, keeps it out of checkpoints, and raises Diverged after too many in a row."""

    def __init__(self, events: EventLog, stage: AnyStage) -> None:
        self.events = events
        self.stage = stage
        self._before: dict[str, float] = {}
        self._norms: deque[float] = deque(maxlen=NORMS_COMPARED)
        self._bad = 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, model: Any, **_: Any) -> None:
        self._before = _magnitudes(model)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            fault = fault_of(logs["loss"], logs["grad_norm"], list(self._norms))
            self._bad = self._bad + 1 if fault else 0
            if not fault:
                self._norms.append(logs["grad_norm"])
                return
            control.should_save = False
            self.events.append("warning", self.stage.name, message=f"step {state.global_step}: {fault}")
            if self._bad >= self.stage.bad_steps:
                raise self._diverged(f"{fault} at step {state.global_step} of {self.stage.name}, {self._bad} in a row")
        elif not math.isfinite(logs.get("eval_loss", 0.0)):
            raise self._diverged(f"the held-out loss is no number at step {state.global_step} of {self.stage.name}")

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
        return "the loss is no number"
    if not math.isfinite(norm):
        return "the gradient is no number"
    if loss == 0:
        return "the loss is exactly 0"
    usual = statistics.median(norms) if len(norms) >= LEAST_NORMS else math.inf
    if norm > max(EXPLODES_AT * usual, HARMLESS_NORM):
        return f"the gradient norm is {norm:.3g}, {norm / max(usual, 1e-12):.0f} times the usual"
    return ""


def _magnitudes(model: Any) -> dict[str, float]:
    """Sum of the absolute trained weights of each adapted module."""
    found: dict[str, float] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            module = name.partition(".lora_")[0]
            found[module] = found.get(module, 0.0) + float(weight.detach().double().abs().sum())
    return found
