"""Stopped, killed, or left with half a checkpoint: a stage goes on, and ends as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from forked import start
from safetensors.torch import load_file
from tiny import add_run, events, losses, stage, work

from appliance.home import Home
from appliance.train.interruption import INTERRUPTED, Interruption
from appliance.train.products import are_fast
from appliance.train.sft import _Trainer as SftTrainer
from appliance.worker import main

STAGE = stage("sft", "FACTS", epochs=20, checkpoint_every=5, evaluate_every=1000)
PREFERENCE_STAGE = stage("dpo", "PREFERENCES", epochs=10, checkpoint_every=5, learning_rate=0.002)
DROPOUT = "dropout = 0.2\n"


@pytest.fixture(autouse=True)
def as_processes_train(monkeypatch: pytest.MonkeyPatch, exact_products: None) -> None:
    """Here as in the processes that are killed: in bf16 where that is fast."""
    monkeypatch.setattr("appliance.train.products.are_fast", are_fast)


def until_first_checkpoint(run: Path, stage: str) -> BaseProcess:
    """A worker that has just said that it has written a checkpoint."""
    worker = start(run / "log.txt", main, run, stage)
    while not events(run, "checkpoint"):
        assert worker.is_alive(), (run / "log.txt").read_text()
        time.sleep(0.01)
    return worker


def same_adapter(one: Path, other: Path, stage: str) -> bool:
    first, second = (load_file(run / stage / "adapter" / "adapter_model.safetensors") for run in (one, other))
    return all(bool((first[name] - second[name]).abs().max() < 1e-5) for name in first)


def test_killed_at_any_moment_it_trains_as_if_it_had_not_been(home: Home) -> None:
    whole, killed = (add_run(home, id, DROPOUT + STAGE) for id in ("whole", "killed"))
    work(whole, "sft")
    worker = until_first_checkpoint(killed, "sft")
    worker.kill()
    worker.join()
    reached = max(losses(killed, "sft"))
    assert reached < 60, "killed before it was done"

    assert work(killed, "sft") == 0
    steps = [event["step"] for event in events(killed, "step")]
    assert steps.count(1) == 1, "it went on from the checkpoint"
    assert losses(killed, "sft") == pytest.approx(losses(whole, "sft"), abs=1e-5)
    assert same_adapter(whole, killed, "sft")
    assert [event["step"] for event in events(killed, "eval")] == [0, 60]


def test_asked_to_stop_it_saves_the_step_and_goes_on_later(home: Home) -> None:
    """On an NF4 base."""
    whole, stopped = (add_run(home, id, STAGE, "qlora") for id in ("whole", "stopped"))
    work(whole, "sft")
    worker = until_first_checkpoint(stopped, "sft")
    worker.terminate()
    worker.join()
    assert worker.exitcode == INTERRUPTED

    reached = max(losses(stopped, "sft"))
    assert events(stopped, "checkpoint")[-1]["step"] == reached < 60
    assert not (stopped / "sft" / "failure.json").exists()
    assert work(stopped, "sft") == 0
    steps = [event["step"] for event in events(stopped, "step")]
    assert steps == list(range(1, 61)), "no step was lost or taken twice"
    assert losses(stopped, "sft") == pytest.approx(losses(whole, "sft"), abs=1e-5)


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Send this process SIGTERM once the stage has reported so many steps."""
    taken = 0

    def count(reporter: object, args: object, state: object, control: object, **logged: dict[str, float]) -> None:
        nonlocal taken
        taken += "loss" in logged["logs"]
        if taken == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("appliance.train.guard.Guard.on_log", count)


@pytest.mark.parametrize("stages", [STAGE, PREFERENCE_STAGE])
def test_in_the_middle_of_an_epoch_too(home: Home, monkeypatch: pytest.MonkeyPatch, stages: str) -> None:
    """And DPO's reference stays what it was, though the checkpoint holds the trained adapter only."""
    method = "sft" if stages is STAGE else "dpo"
    whole, stopped = (add_run(home, id, stages) for id in ("whole", "stopped"))
    work(whole, method)
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        with pytest.raises(SystemExit) as ended:
            work(stopped, method)
    assert ended.value.code == INTERRUPTED
    assert max(losses(stopped, method)) == 8
    work(stopped, method)
    assert losses(stopped, method) == pytest.approx(losses(whole, method), abs=1e-4)
    assert same_adapter(whole, stopped, method)


@pytest.mark.parametrize("training", [True, False])
def test_asked_to_stop_within_a_step_or_an_evaluation_it_does_not_wait_for_the_end(
    home: Home, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    """Nor does it matter whether layers are computed twice, dropout and all."""
    settings = {"batch_size": 4, "micro_batch_size": 1, "evaluate_every": 4}
    whole, stopped = (
        add_run(home, id, DROPOUT + stage("sft", "FACTS", gradient_checkpointing=word, **settings))
        for id, word in (("whole", "off"), ("stopped", "on"))
    )
    work(whole, "sft")
    compute, passes = SftTrainer.compute_loss, 0

    def stopping(trainer: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal passes
        if trainer.state.global_step == 4 and trainer.model.training == training:
            passes += 1
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(trainer, *arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(SftTrainer, "compute_loss", stopping)
        with pytest.raises(SystemExit) as ended:
            work(stopped, "sft")
    assert ended.value.code == INTERRUPTED
    assert passes == 1, "of the several that the step or the evaluation has"
    assert max(losses(stopped, "sft")) == 4
    assert events(stopped, "checkpoint")[-1]["step"] == 4
    assert work(stopped, "sft") == 0
    for kind in ("step", "eval"):
        one, other = ([(event["step"], event["loss"]) for event in events(run, kind)] for run in (whole, stopped))
        assert [step for step, _ in one] == [step for step, _ in other]
        assert [loss for _, loss in one] == pytest.approx([loss for _, loss in other], abs=1e-5)
    assert events(stopped, "step")[-1]["tokens"] == events(whole, "step")[-1]["tokens"]
    assert same_adapter(whole, stopped, "sft")


def test_a_half_written_checkpoint_is_passed_over(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, broken = (add_run(home, id, STAGE) for id in ("whole", "broken"))
    work(whole, "sft")
    with monkeypatch.context() as patch:
        stop_after(patch, 11)
        with pytest.raises(SystemExit):
            work(broken, "sft")
    folder = broken / "sft"
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-12"}
    os.truncate(folder / "checkpoint-12" / "optimizer.pt", 100)
    shutil.copytree(folder / "checkpoint-10", folder / "checkpoint-13")
    (folder / "checkpoint-13" / "manifest.json").unlink()

    work(broken, "sft")
    steps = [event["step"] for event in events(broken, "step")]
    assert steps.count(10) == 1
    assert steps.count(11) == steps.count(12) == 2
    assert losses(broken, "sft") == pytest.approx(losses(whole, "sft"), abs=1e-5)


def test_a_checkpoint_of_another_recipe_is_not_used(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    run = add_run(home, "r", stage("sft", "FACTS", checkpoint_every=2, evaluate_every=2))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(SystemExit):
            work(run, "sft")
    recipe = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(recipe.replace("learning_rate = 0.02", "learning_rate = 0.01"))
    assert list((run / "sft").glob("best-*"))
    assert work(run, "sft") == 0
    assert [event["step"] for event in events(run, "step")][6:] == list(range(1, 13))
    warnings = [event["message"] for event in events(run, "warning")]
    assert warnings[0] == "checkpoint-6 was trained with another recipe: not used"


def test_a_stage_killed_after_its_adapter_only_says_its_results_again(home: Home) -> None:
    run = add_run(home, "r", stage("sft", "FACTS"))
    work(run, "sft")
    before = (run / "sft" / "adapter" / "adapter_model.safetensors").read_bytes()
    (run / "sft" / "result.json").unlink()
    assert work(run, "sft") == 0
    assert (run / "sft" / "result.json").exists()
    assert len(events(run, "step")) == 12
    assert (run / "sft" / "adapter" / "adapter_model.safetensors").read_bytes() == before


def test_outside_of_training_a_stop_is_obeyed_at_once() -> None:
    interruption = Interruption()
    with interruption.deferred():
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested
    with pytest.raises(SystemExit) as ended:
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == INTERRUPTED
