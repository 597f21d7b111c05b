"""The adapter of the lowest held-out loss so far, that before the first step included, and the end of a training that
has none lower to come."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from appliance.home import building, write_json
from appliance.train.checkpoints import step_of
from appliance.train.events import EventLog
from appliance.train.recipe import AnyStage

HELD_OUT = "held_out.json"


class Best(TrainerCallback):
    """Keeps `best-STEP/` in the stage's directory, and stops after `patience` evaluations without a better one.

    What it knows it reads from there and from the run's events, so that a resumed stage goes on where it was.
    """

    def __init__(self, folder: Path, events: EventLog, stage: AnyStage) -> None:
        self.folder = folder
        self.events = events
        self.stage = stage

    @property
    def path(self) -> Path | None:
        """Directory of the best adapter, if any."""
        return max(self.folder.glob("best-*"), key=step_of, default=None)

    def forget(self) -> None:
        """The stage starts anew."""
        for found in self.folder.glob("best-*"):
            shutil.rmtree(found)

    def on_evaluate(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        model: Any,
        **_: Any,
    ) -> None:
        step, loss, best = state.global_step, metrics["eval_loss"], self.path
        if best is None or loss < float(json.loads((best / HELD_OUT).read_bytes())["loss"]):
            with building(self.folder / f"best-{step}") as folder:
                model.save_pretrained(folder, save_embedding_layers=False)
                write_json(folder / HELD_OUT, {"step": step, "loss": loss})
            if best is not None:
                shutil.rmtree(best)
        elif self.stage.patience and self._evaluations(step_of(best), step) >= self.stage.patience:
            message = (
                f"no lower held-out loss in {self.stage.patience} evaluations since step {step_of(best)}: stopping"
            )
            self.events.append("warning", self.stage.name, message=message)
            control.should_training_stop = True

    def _evaluations(self, after: int, until: int) -> int:
        """How many evaluations there were after step `after` up to `until`, that of now included."""
        steps = {event["step"] for event in self.events.read() if event["event"] == "eval"}
        return len({step for step in steps | {until} if after < step <= until})
