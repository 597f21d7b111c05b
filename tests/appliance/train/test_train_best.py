"""Which adapter a stage leaves, and when it stops because no better one is to come."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from tiny import add_run, events, losses, result, stage, work

from appliance.home import Home
from appliance.train.best import Best
from appliance.train.interruption import ENDING
from appliance.train.samples import Samples
from appliance.train.sft import _Trainer


def weights_seen(patch: pytest.MonkeyPatch) -> dict[int, dict[str, torch.Tensor]]:
    """The adapter's weights at each evaluation, by step, as it goes on."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    evaluated = Best.on_evaluate

    def on_evaluate(best: Best, args: Any, state: Any, *arguments: Any, model: Any, **named: Any) -> None:
        weights = get_peft_model_state_dict(model, save_embedding_layers=False)
        seen[state.global_step] = {name: weight.clone() for name, weight in weights.items()}
        evaluated(best, args, state, *arguments, model=model, **named)

    patch.setattr(Best, "on_evaluate", on_evaluate)
    return seen


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "sft" / "adapter" / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def held_out(patch: pytest.MonkeyPatch, *found: float) -> None:
    """Let the evaluations come to these losses, one after the other; the adapter at each is kept in `seen`."""
    left = iter(found)

    def evaluate(trainer: Any, *_: Any, **__: Any) -> dict[str, float]:
        metrics = {"eval_loss": next(left)}
        trainer.log(metrics)
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    patch.setattr(_Trainer, "evaluate", evaluate)


def test_the_kept_adapter_is_that_of_the_lowest_held_out_loss(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = add_run(home, "plain", stage("sft", "FACTS", keep="last", evaluate_every=3))
    seen = weights_seen(monkeypatch)
    held_out(monkeypatch, 0.7, 0.5, 0.3, 0.6, 0.9)
    assert work(plain, "sft") == 0
    run = add_run(home, "r", stage("sft", "FACTS", keep="best", evaluate_every=3))
    held_out(monkeypatch, 0.7, 0.5, 0.3, 0.6, 0.9)
    assert work(run, "sft") == 0
    assert max(losses(run, "sft")) == 12
    figures = [result(one, "sft") for one in (run, plain)]
    assert [(one["held_out_loss_before"], one["held_out_loss"]) for one in figures] == [(0.7, 0.3), (0.7, 0.9)]
    assert same(adapter(run), seen[6])
    assert same(adapter(plain), seen[12])
    assert not list((run / "sft").glob("best-*"))
    assert figures[0]["warnings"] == []
    said_once(plain, "the held-out loss is no lower after sft: 0.9000, and 0.7000 before")


def test_where_no_step_is_better_the_best_is_what_the_stage_began_with(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = add_run(home, "r", stage("sft", "FACTS", keep="best", evaluate_every=3, patience=3))
    seen = weights_seen(monkeypatch)
    held_out(monkeypatch, 0.1, 0.5, 0.3, 0.6, 0.9)
    assert work(run, "sft") == 0
    assert max(losses(run, "sft")) == 9
    assert events(run, "warning")[0]["message"] == "no lower held-out loss in 3 evaluations since step 0: stopping"
    assert result(run, "sft")["held_out_loss"] == result(run, "sft")["held_out_loss_before"] == 0.1
    assert same(adapter(run), seen[0])
    assert not any(weight.any() for name, weight in adapter(run).items() if "lora_B" in name)
    figures = "(0.3000 at best, and 0.1000 before)"
    line = f'the held-out loss is no lower after sft {figures}: keep = "best" leaves the adapter as it was'
    said_once(run, line, after=1)


def said_once(run: Path, line: str, after: int = 0) -> None:
    """The result carries the line, and the run warns of it once, also when the stage is begun again."""
    assert result(run, "sft")["warnings"] == [line]
    (run / "sft" / "result.json").unlink()
    assert work(run, "sft") == 0
    assert result(run, "sft")["warnings"] == [line]
    (warning,) = events(run, "warning")[after:]
    assert warning["message"] == line
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
