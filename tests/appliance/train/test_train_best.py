"""Which adapter a stage leaves, and when it stops because no better one is to come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import add_run, events, losses, result, stage, work

from appliance.home import Home
from appliance.train.interruption import ENDING
from appliance.train.samples import Samples
from appliance.train.sft import _Trainer


def held_out(patch: pytest.MonkeyPatch, *found: float) -> None:
    """Let the evaluations come to these losses, one after the other; the adapter at each is kept in `seen`."""
    left = iter(found)

    def evaluate(trainer: Any, *_: Any, **__: Any) -> dict[str, float]:
        metrics = {"eval_loss": next(left)}
        trainer.log(metrics)
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    patch.setattr(_Trainer, "evaluate", evaluate)


@pytest.mark.parametrize(("keep", "loss", "same"), [("best", 0.3, False), ("last", 0.9, True)])
def test_the_kept_adapter_is_that_of_the_lowest_held_out_loss(
    home: Home, monkeypatch: pytest.MonkeyPatch, keep: str, loss: float, same: bool
) -> None:
    plain = add_run(home, "plain", stage("sft", "FACTS", keep="last"))
    work(plain, "sft")
    run = add_run(home, "r", stage("sft", "FACTS", keep=keep, evaluate_every=3))
    held_out(monkeypatch, 0.1, 0.5, 0.3, 0.6, 0.9)
    assert work(run, "sft") == 0
    assert max(losses(run, "sft")) == 12
    assert result(run, "sft")["held_out_loss"] == loss
    assert result(run, "sft")["held_out_loss_before"] == 0.1
    last, kept = (load_file(one / "sft" / "adapter" / "adapter_model.safetensors") for one in (plain, run))
    assert all(torch.equal(last[name], kept[name]) for name in last) == same
    assert not list((run / "sft").glob("best-*"))
    line = f"the held-out loss is no lower after sft: {loss:.4f}, and 0.1000 before"
    assert result(run, "sft")["warnings"] == [line]
    (run / "sft" / "result.json").unlink()
    assert work(run, "sft") == 0
    assert result(run, "sft")["warnings"] == [line]
    (warning,) = events(run, "warning")
    assert warning["message"] == line, "said once"
    assert warning["next"].startswith("lower learning_rate (now 0.02)")


def test_it_stops_when_patience_runs_out(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    run = add_run(home, "r", stage("sft", "FACTS", evaluate_every=2, patience=2))
    held_out(monkeypatch, 0.9, 0.5, 0.6, 0.4, 0.4, 0.7, 0.1)
    assert work(run, "sft") == 0
    assert max(losses(run, "sft")) == 10, "the lowest at step 6, and none lower at 8 and 10"
    assert result(run, "sft")["held_out_loss"] == 0.4
    assert result(run, "sft")["warnings"] == []
    assert events(run, "warning")[0]["message"] == ("no lower held-out loss in 2 evaluations since step 6: stopping")


@pytest.mark.parametrize("keep", ["best", "last"])
def test_asked_to_end_it_keeps_what_it_has_learnt(home: Home, monkeypatch: pytest.MonkeyPatch, keep: str) -> None:
    run = add_run(home, "r", stage("sft", "FACTS", keep=keep) + stage("dpo", "PREFERENCES", max_steps=1))
    save = Samples.on_evaluate

    def ending(samples: Samples, args: Any, state: Any, *arguments: Any, **named: Any) -> None:
        if state.global_step == 0:
            (run / "sft" / ENDING).touch()
        save(samples, args, state, *arguments, **named)

    monkeypatch.setattr(Samples, "on_evaluate", ending)
    assert work(run, "sft", "dpo") == 0
    assert list(losses(run, "sft")) == [1]
    assert [event["step"] for event in events(run, "eval", "sft")] == [0, 1]
    assert (run / "sft" / "adapter" / "adapter_model.safetensors").exists()
