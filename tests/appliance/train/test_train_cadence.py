"""Evaluations and checkpoints come by time, or by the recipe's steps: a training of simulated seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

import appliance.train.callbacks as callbacks
from appliance.train.callbacks import Cadence
from appliance.train.interruption import Interruption
from appliance.train.recipe import SftStage


@dataclass
class Training:
    """What a stage of `steps` steps did, each of which took `step` seconds, and when."""

    step: float
    evaluation: float
    checkpoint: float
    steps: int = 1000
    held_out: bool = True
    clock: float = 1e6
    evaluated: list[int] = field(default_factory=list)
    saved: list[int] = field(default_factory=list)

    def run(self, folder: Path, patch: pytest.MonkeyPatch, **settings: Any) -> Training:
        patch.setattr(callbacks.time, "monotonic", lambda: self.clock)
        stage = SftStage(method="sft", dataset="d", **settings)
        cadence = Cadence(folder, stage, Interruption(), evaluates=self.held_out)
        state, control = TrainerState(max_steps=self.steps), TrainerControl()
        cadence.on_train_begin(None, state, control)
        if self.held_out:
            self.clock += self.evaluation
            cadence.on_evaluate(None, state, control)
        for number in range(1, self.steps + 1):
            state.global_step = number
            self.clock += self.step
            control.should_evaluate = control.should_save = False
            cadence.on_step_end(None, state, control)
            if control.should_evaluate:
                self.evaluated.append(number)
                self.clock += self.evaluation
                cadence.on_evaluate(None, state, control)
            if control.should_save:
                self.saved.append(number)
                self.clock += self.checkpoint
                cadence.on_save(None, state, control)
        return self

    @property
    def share(self) -> float:
        """Of the seconds of training, those of what came between the first and the last evaluation."""
        between = (len(self.evaluated) - self.held_out) * self.evaluation + len(self.saved) * self.checkpoint
        return between / (self.steps * self.step)


def longest(steps: list[int], last: int) -> int:
    """The most steps that a loss of power at the worst moment would cost."""
    return max(after - before for before, after in zip([0, *steps], [*steps, last], strict=True))


@pytest.mark.parametrize("evaluation", [0.1, 3, 20])
@pytest.mark.parametrize("checkpoint", [0.05, 2, 5])
@pytest.mark.parametrize("step", [0.3, 4, 40])
def test_by_time_they_take_a_twentieth_and_a_checkpoint_is_never_older_than_five_minutes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: float, evaluation: float, checkpoint: float
) -> None:
    training = Training(step, evaluation, checkpoint, steps=round(10_000 / step)).run(tmp_path, monkeypatch)
    assert training.share <= 0.05
    assert training.evaluated[-1] == training.steps
    assert longest(training.saved, training.steps) * step <= 300 + step
    expected = 10_000 / max(40 * evaluation, step)
    assert 0.8 * expected <= len(training.evaluated) <= expected + 1, "no fewer than there is time for"


def test_slow_checkpoints_come_every_five_minutes_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(10, 1, checkpoint=60).run(tmp_path, monkeypatch)
    assert longest(training.saved, 1000) == 30


def test_quick_checkpoints_spare_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(1, 1, checkpoint=0.01).run(tmp_path, monkeypatch)
    assert training.saved == list(range(60, 1000, 60))


def test_by_steps_they_come_whatever_they_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(1, 100, 100, steps=12).run(tmp_path, monkeypatch, evaluate_every=5, checkpoint_every=4)
    assert (training.evaluated, training.saved) == ([5, 10, 12], [4, 8])


def test_without_held_out_rows_there_is_nothing_to_evaluate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(10, 1, 1, held_out=False).run(tmp_path, monkeypatch, evaluate_every=5)
    assert training.evaluated == []
    assert training.saved


def test_after_a_resume_they_wait_a_minute_until_one_says_what_they_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(10, 5, 1)
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: training.clock)
    cadence = Cadence(tmp_path, SftStage(method="sft", dataset="d"), Interruption(), evaluates=True)
    state, control = TrainerState(max_steps=100, global_step=41), TrainerControl()
    cadence.on_train_begin(None, state, control)
    due = []
    for _ in range(7):
        training.clock += 10
        cadence.on_step_end(None, state, control)
        due.append(control.should_evaluate)
    assert due == [False] * 5 + [True] * 2
