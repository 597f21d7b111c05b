"""Killed with -9 at random steps, and during a save: in the end the same losses as a run that never was."""

from __future__ import annotations

import random
import signal
from pathlib import Path

import pytest
from forked import start
from killed_worker import work as work_until_killed
from safetensors.torch import load_file
from tiny import add_run, events, losses, stage, work

from appliance.home import Home
from appliance.train.products import are_fast

STAGES = {
    "sft": ("lora", "dropout = 0.2\n" + stage("sft", "FACTS", epochs=6, checkpoint_every=3, evaluate_every=4)),
    "dpo": ("qlora", stage("dpo", "PREFERENCES", epochs=9, checkpoint_every=3, learning_rate=0.002)),
    "kto": ("dora", stage("kto", "JUDGEMENTS", epochs=6, checkpoint_every=3, learning_rate=0.002)),
}
CALLS_OF_A_SAVE = 16
"""About so many calls change the disk while a checkpoint is saved."""


@pytest.fixture(autouse=True)
def as_processes_train(monkeypatch: pytest.MonkeyPatch, exact_products: None) -> None:
    """Here as in the processes that are killed: in bf16 where that is fast."""
    monkeypatch.setattr("appliance.train.products.are_fast", are_fast)


def killed_worker(run: Path, method: str, plan: list[tuple[int, int]]) -> None:
    """Work on `run` until the process kills itself, for each step and call in `plan`."""
    for step, call in plan:
        worker = start(run / "log.txt", work_until_killed, run, method, step, call)
        worker.join()
        assert worker.exitcode == -signal.SIGKILL, (run / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [pytest.param("sft", marks=pytest.mark.thorough), "dpo", pytest.param("kto", marks=pytest.mark.thorough)]
)
def test_killed_at_random_steps_and_saves_it_trains_as_if_it_had_not_been(home: Home, method: str) -> None:
    kind, text = STAGES[method]
    whole, killed = (add_run(home, id, text, kind) for id in ("whole", "killed"))
    work(whole, method)
    seed = random.randrange(1000)
    dice = random.Random(seed)
    last_save = max(event["step"] for event in events(whole, "checkpoint"))
    first, second, third = sorted(dice.sample(range(2, last_save), 3))
    plan = [(first, -1), (second, dice.randrange(CALLS_OF_A_SAVE)), (third, -1)]
    killed_worker(killed, method, plan)
    assert work(killed, method) == 0, f"{seed=} {plan=}"

    assert losses(killed, method) == pytest.approx(losses(whole, method), abs=1e-4), f"{seed=} {plan=}"
    for one, other in ((events(run, "eval")[-1] for run in (whole, killed)),):
        assert one["step"] == other["step"]
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
    adapters = [load_file(run / method / "adapter" / "adapter_model.safetensors") for run in (whole, killed)]
    for name, weight in adapters[0].items():
        assert float((weight - adapters[1][name]).abs().max()) < 1e-4, f"{seed=} {plan=} {name}"
