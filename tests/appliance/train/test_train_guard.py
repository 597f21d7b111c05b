"""A training that cannot come to anything ends, at the last checkpoint that is good."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file, save_file
from tiny import add_run, events, failure, losses, result, stage, work
from transformers import TrainerControl, TrainerState

from appliance.errors import Exit
from appliance.home import Home
from appliance.train.events import EventLog
from appliance.train.guard import Diverged, Guard, fault_of, unlearnt_at
from appliance.train.recipe import AnyStage
from appliance.train.sft import _Trainer

STEADY = [1.0] * 20


@pytest.mark.parametrize(
    ("loss", "norm", "norms", "fault"),
    [
        (1.0, 1.0, STEADY, ""),
        (1.0, 99.0, STEADY, ""),
        (1.0, 101.0, STEADY, "the gradient norm is 101, 101 times the usual"),
        (1.0, 101.0, STEADY[:7], ""),
        (1.0, 5.0, [1e-6] * 20, ""),
        (0.0, 1.0, STEADY, "the loss is exactly 0"),
        (math.nan, 1.0, STEADY, "the loss is NaN or infinite"),
        (math.inf, 1.0, [], "the loss is NaN or infinite"),
        (1.0, math.inf, [], "the gradient is NaN or infinite"),
        (1.0, math.nan, STEADY, "the gradient is NaN or infinite"),
    ],
)
def test_what_is_wrong_with_a_step(loss: float, norm: float, norms: list[float], fault: str) -> None:
    assert fault_of(loss, norm, norms) == fault


@pytest.mark.parametrize(
    ("at_first", "vocabulary", "limit"),
    [(2.03, 49152, 6.42), (0.08, 49152, 5.44), (2.03, 320, 4.06), (7.1, 320, 14.2), (0.0, 320, 2.88)],
)
def test_when_answers_count_as_unlearnt(at_first: float, vocabulary: int, limit: float) -> None:
    assert unlearnt_at(at_first, vocabulary) == pytest.approx(limit, abs=0.01)


def test_chosen_answers_that_become_less_likely_are_warned_of_once(tmp_path: Path) -> None:
    training = Training(tmp_path, method="dpo")
    for reward in (0.2, -0.1, -0.5, -0.7):
        interval = (reward - 0.3, reward + 0.3)
        logs = {"eval_loss": 0.5, "eval_reward_chosen": reward, "eval_reward_chosen_interval": interval}
        training.guard.on_log(None, training.state, TrainerControl(), logs)
        training.state.global_step += 10
    (warning,) = Training(tmp_path, method="dpo").events.read()
    assert warning["message"] == "step 20: the held-out chosen answers are less likely than before (reward -0.5)"
    assert "sft_weight = 1" in warning["next"]
    resumed = Training(tmp_path, method="dpo")
    resumed.guard.on_log(None, resumed.state, TrainerControl(), logs)
    assert len(resumed.events.read()) == 1


class Training:
    """A guard that is told of steps and evaluations, as a run of a model with 49152 tokens tells it, and says them."""

    def __init__(self, folder: Path, begun_at: int = 0, **settings: Any) -> None:
        self.events = EventLog(folder / "events.jsonl")
        self.guard = Guard(
            self.events,
            TypeAdapter(AnyStage).validate_python({"method": "sft", "dataset": "d", "name": "sft", **settings}),
        )
        self.state = TrainerState(global_step=begun_at, max_steps=99)
        model = SimpleNamespace(
            named_parameters=lambda: [],
            config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=49152)),
        )
        self.guard.on_train_begin(None, self.state, TrainerControl(), model)

    def step(self, answers: float | None, norm: float = 1.0) -> bool:
        """Whether a checkpoint may be made of it."""
        self.state.global_step += 1
        known = {} if answers is None else {"answer_loss": answers}
        control = TrainerControl(should_save=True)
        self.events.append("step", "sft", step=self.state.global_step, loss=1.0, grad_norm=norm, **known)
        self.guard.on_log(None, self.state, control, {"loss": 1.0, "grad_norm": norm, **known})
        return control.should_save

    def evaluation(self, answers: float, spread: float | None = 0.5) -> None:
        interval = spread and (answers - spread, answers + spread)
        logs = {"eval_loss": 1.0, "eval_answer_loss": answers, "eval_answer_interval": interval}
        self.guard.on_log(None, self.state, TrainerControl(), logs)
        self.events.append("eval", "sft", step=self.state.global_step, loss=1.0, answer_loss=answers)

    def warnings(self) -> list[str]:
        return [event["message"] for event in self.events.read() if event["event"] == "warning"]


def test_unlearnt_answers_end_a_stage_though_its_own_loss_tells_nothing(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.evaluation(2.0)
    assert training.step(2.5)
    assert training.step(6.6), "just below half the way to ln(49152)"
    assert not training.step(6.7)
    assert training.step(2.5)
    assert not training.step(30.0)
    assert not training.step(None), "no answer to give in its batch says nothing of the model"
    assert not training.step(30.0)
    with pytest.raises(Diverged, match=r"cost 31 nats a token \(2.5 at first\) at step 8 of sft, 3 in a row"):
        training.step(31.0)
    assert len(training.warnings()) == 4


def test_held_out_rows_end_it_at_once_where_they_are_enough(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.evaluation(2.03)
    training.evaluation(6.0, 0.1)
    training.evaluation(30.0, None)
    training.evaluation(30.0, 25.0)
    with pytest.raises(Diverged, match=r"cost 7 nats a token \(2.03 at first\) at step 0 of sft, on held-out"):
        training.evaluation(7.0, 0.1)


@pytest.mark.parametrize("resumed", [False, True])
def test_a_resumed_stage_is_judged_as_one_that_never_stopped(tmp_path: Path, resumed: bool) -> None:
    training = Training(tmp_path)
    training.evaluation(2.0)
    for _ in range(10):
        training.step(2.5)
    if resumed:
        for answers in (8.0, 8.0, None):
            training.step(answers, norm=9.0)
        training = Training(tmp_path, begun_at=10)
    assert not training.step(6.8)
    assert training.step(6.0)
    assert not training.step(2.0, norm=101.0), "a hundred times the usual"
    with pytest.raises(Diverged, match="2 at first"):
        training.evaluation(7.0)


def test_it_goes_on_counting_bad_steps_where_it_was_stopped_among_them(tmp_path: Path) -> None:
    training = Training(tmp_path)
    training.step(2.5)
    training.step(9.0)
    training.step(9.0)
    with pytest.raises(Diverged, match="at step 4 of sft, 3 in a row"):
        Training(tmp_path, begun_at=3).step(9.0)


@pytest.mark.parametrize(("method", "rows"), [("sft", "FACTS"), ("dpo", "PREFERENCES"), ("kto", "JUDGEMENTS")])
def test_a_learning_rate_that_destroys_the_model_ends_the_stage(home: Home, method: str, rows: str) -> None:
    """Whatever the method: dpo's own loss goes to 0 meanwhile, and kto's is never above 1."""
    learnt = stage("sft", "FACTS", epochs=8, samples=0)
    ruin = stage(method, rows, name="ruin", learning_rate=0.5, epochs=8, samples=0)
    run = add_run(home, "r", learnt + ruin)
    assert work(run, "sft", "ruin") == Exit.FAILED
    assert failure(run, "ruin")["code"] == "diverged"
    assert failure(run, "ruin")["reason"].startswith("the answers cost ")
    assert failure(run, "ruin")["next"].startswith("lower learning_rate (now 0.5)")
    assert max(losses(run, "ruin")) < 12
    assert not (run / "ruin" / "adapter").exists()


def spoil(patch: pytest.MonkeyPatch, steps: range, factor: float) -> None:
    """Multiply the loss of some steps."""
    compute = _Trainer.compute_loss

    def spoilt(trainer: Any, *arguments: Any, **named: Any) -> torch.Tensor:
        loss: torch.Tensor = compute(trainer, *arguments, **named)
        return loss * factor if trainer.model.training and trainer.state.global_step + 1 in steps else loss

    patch.setattr(_Trainer, "compute_loss", spoilt)


def test_a_step_that_is_no_number_is_left_out_with_a_warning(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    run = add_run(home, "r", stage("sft", "FACTS"))
    spoil(monkeypatch, range(4, 6), math.nan)
    assert work(run, "sft") == 0
    messages = [event["message"] for event in events(run, "warning")]
    assert messages == ["step 4: the loss is NaN or infinite", "step 5: the loss is NaN or infinite"]
    found = losses(run, "sft")
    assert found[12] < found[3]


@pytest.mark.parametrize(
    ("factor", "says"), [(math.nan, "NaN or infinite"), (0.0, "exactly 0"), (1e6, "times the usual")]
)
def test_too_many_bad_steps_fail_the_run(home: Home, monkeypatch: pytest.MonkeyPatch, factor: float, says: str) -> None:
    run = add_run(home, "r", stage("sft", "FACTS", epochs=8, checkpoint_every=1, evaluate_every=50))
    spoil(monkeypatch, range(12, 99), factor)
    assert work(run, "sft") == Exit.FAILED
    assert failure(run, "sft")["code"] == "diverged"
    assert says in failure(run, "sft")["reason"]
    assert "step 14 of sft, 3 in a row" in failure(run, "sft")["reason"]
    assert "lower learning_rate (now 0.02)" in failure(run, "sft")["next"]
    assert {path.name for path in (run / "sft").glob("checkpoint-*")} == {"checkpoint-10", "checkpoint-11"}


@pytest.mark.parametrize("keep", ["best", "last"])
def test_or_keep_the_last_good_checkpoint_as_the_recipe_says(
    home: Home, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    settings = {"epochs": 8, "checkpoint_every": 5, "evaluate_every": 4, "bad_steps": 2, "keep": keep}
    good, bad = (
        add_run(home, id, stage("sft", "FACTS", on_bad_steps="keep", **settings, max_steps=0)) for id in ("good", "bad")
    )
    adapters = {}
    save = _Trainer._save_checkpoint

    def saving(trainer: Any, model: Any, trial: Any) -> None:
        save(trainer, model, trial)
        path = Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}" / "adapter_model.safetensors"
        adapters[trainer.state.global_step] = load_file(path)

    with monkeypatch.context() as patch:
        patch.setattr(_Trainer, "_save_checkpoint", saving)
        work(good, "sft")
    spoil(monkeypatch, range(13, 99), math.nan)
    assert work(bad, "sft") == 0
    kept = load_file(bad / "sft" / "adapter" / "adapter_model.safetensors")
    assert max(losses(bad, "sft")) == 14
    held_out = [event["loss"] for event in events(bad, "eval")]
    assert events(bad, "warning")[-1]["message"].endswith("2 in a row: the stage ends with its last good adapter")
    if keep == "last":
        assert all(torch.equal(kept[name], adapters[10][name]) for name in kept)
    else:
        assert any(not torch.equal(kept[name], adapters[10][name]) for name in kept)
        assert result(bad, "sft")["held_out_loss"] == min(held_out[1:])


def test_an_adapter_that_does_not_move_is_an_error(home: Home) -> None:
    run = add_run(home, "r", stage("sft", "FACTS", learning_rate=1e-30))
    assert work(run, "sft") == Exit.FAILED
    assert failure(run, "sft")["code"] == "adapter_unchanged"
    assert len(losses(run, "sft")) == 4
    assert not (run / "sft" / "adapter").exists()


def test_a_module_that_does_not_move_is_a_warning(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    run = add_run(home, "r", stage("sft", "FACTS"))
    step = torch.optim.AdamW.step

    def frozen(optimiser: Any, *arguments: Any, **named: Any) -> Any:
        for weight in optimiser.param_groups[0]["params"][:2]:
            weight.grad = None
        return step(optimiser, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", frozen)
    assert work(run, "sft") == 0
    (warning,) = events(run, "warning")
    assert warning["message"].startswith("1 of 14 adapted modules are unchanged after 5 steps, among them ")
    assert warning["message"].endswith("layers.0.self_attn.q_proj")


def test_a_base_whose_loss_is_no_number_is_an_error(home: Home, tiny_model: Path) -> None:
    (home.models / "tiny").unlink()
    shutil.copytree(tiny_model, home.models / "tiny")
    weights = home.models / "tiny" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(tensors, weights, metadata={"format": "pt"})
    run = add_run(home, "r", stage("sft", "FACTS"))
    assert work(run, "sft") == Exit.FAILED
    assert failure(run, "sft")["code"] == "diverged"
