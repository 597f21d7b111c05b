"""Memory that runs out at a later moment: the same step in smaller parts, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import add_run, events, failure, losses, result, stage, work

from appliance.errors import Exit
from appliance.home import Home
from appliance.train import dpo, kto, sft
from appliance.train.micro_batches import MicroBatchLimit
from appliance.train.order import MICRO_BATCH_TOKENS
from appliance.train.trainer import MicroBatchTrainer

TRAINERS: dict[str, type[MicroBatchTrainer]] = {"sft": sft._Trainer, "dpo": dpo._Trainer, "kto": kto._Trainer}
DATASETS = {"sft": "FACTS", "dpo": "PREFERENCES", "kto": "JUDGEMENTS"}


def run_out(
    patch: pytest.MonkeyPatch, kind: type[MicroBatchTrainer], when: Callable[[MicroBatchTrainer], bool], rows: int
) -> None:
    """Let the memory hold the loss of at most so many sequences `when` the trainer is there."""
    compute = kind.compute_loss

    def bounded(trainer: Any, model: Any, inputs: Any, **named: Any) -> torch.Tensor:
        loss: torch.Tensor = compute(trainer, model, inputs, **named)
        if when(trainer) and len(inputs["input_ids"]) > rows:
            if loss.requires_grad:
                # What an allocation that fails half-way through the backward pass leaves behind.
                loss.backward(retain_graph=True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss

    patch.setattr(kind, "compute_loss", bounded)


@pytest.mark.parametrize("method", ["sft", "dpo", "kto"])
def test_in_the_middle_of_training(home: Home, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """And with layers that are computed twice, which changes nothing either."""
    settings = {"batch_size": 4, "learning_rate": 0.002}
    whole, short = (
        add_run(home, id, stage(method, DATASETS[method], gradient_checkpointing=word, **settings))
        for id, word in (("whole", "off"), ("short", "on"))
    )
    work(whole, method)
    checkpointing = set()

    def later(trainer: MicroBatchTrainer) -> bool:
        checkpointing.add(trainer.model.is_gradient_checkpointing)
        return trainer.model.training and trainer.state.global_step >= 2

    run_out(monkeypatch, TRAINERS[method], later, 2)
    assert work(short, method) == 0
    assert checkpointing == {True}
    assert [events(run, "forecast")[0]["gradient_checkpointing"] for run in (whole, short)] == [False, True]
    assert [event["step"] for event in events(short, "step")] == [event["step"] for event in events(whole, "step")]
    assert losses(short, method) == pytest.approx(losses(whole, method), abs=1e-4)
    warnings = events(short, "warning")
    assert {warning["code"] for warning in warnings} == {"out_of_memory"}
    assert "out of memory: going on with at most" in warnings[0]["message"]
    assert [warning["micro_batch_tokens"] for warning in warnings] == sorted(
        {w["micro_batch_tokens"] for w in warnings}, reverse=True
    )


def test_in_an_evaluation(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, short = (add_run(home, id, stage("sft", "FACTS")) for id in ("whole", "short"))
    work(whole, "sft")
    run_out(monkeypatch, sft._Trainer, lambda trainer: not trainer.model.training, 1)
    assert work(short, "sft") == 0
    assert result(short, "sft")["held_out_loss"] == pytest.approx(result(whole, "sft")["held_out_loss"], abs=1e-4)
    assert events(short, "warning")[0]["code"] == "out_of_memory"


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_while_the_reference_is_run(home: Home, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    settings = stage(method, DATASETS[method], learning_rate=0.002)
    whole, short = (add_run(home, id, settings) for id in ("whole", "short"))
    work(whole, method)
    trl = TRAINERS[method].__mro__[2]
    score = trl.compute_ref_log_probs  # type: ignore[attr-defined]  # TRL's own

    def bounded(trainer: Any, model: Any, inputs: Any) -> Any:
        if len(inputs["input_ids"]) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return score(trainer, model, inputs)

    monkeypatch.setattr(trl, "compute_ref_log_probs", bounded)
    assert work(short, method) == 0
    assert losses(short, method) == pytest.approx(losses(whole, method), abs=1e-4)


def test_a_single_row_that_is_too_much_goes_on_with_layers_computed_twice(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, short = (add_run(home, id, stage("sft", "FACTS")) for id in ("whole", "short"))
    work(whole, "sft")

    def too_little(trainer: MicroBatchTrainer) -> bool:
        return trainer.model.training and not trainer.model.is_gradient_checkpointing

    run_out(monkeypatch, sft._Trainer, too_little, 0)
    assert work(short, "sft") == 0
    assert losses(short, "sft") == pytest.approx(losses(whole, "sft"), abs=1e-4)
    *_, last = events(short, "warning")
    assert last["message"].startswith("out of memory: going on with gradient checkpointing; ")
    assert last["micro_batch_tokens"] == MicroBatchLimit.after(events(short, "warning"), 8, print).tokens


def test_a_single_row_that_is_too_much_fails_with_advice(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    run = add_run(home, "r", stage("sft", "FACTS"))
    run_out(monkeypatch, sft._Trainer, lambda trainer: trainer.model.training, 0)
    assert work(run, "sft") == Exit.FAILED
    assert failure(run, "sft")["code"] == "out_of_memory"
    assert "smaller max_length" in failure(run, "sft")["next"]


def test_other_errors_are_not_tried_again() -> None:
    tries = []

    def attempt() -> None:
        limit.divide([5, 5], 1)
        tries.append(1)
        raise RuntimeError("shapes do not fit")

    limit = MicroBatchLimit()
    with pytest.raises(RuntimeError, match="shapes"):
        limit.fit(attempt)
    assert tries == [1]


def test_a_resumed_stage_remembers_how_often_its_memory_was_not_enough() -> None:
    killed, said = {"code": "out_of_memory"}, {"code": "out_of_memory", "micro_batch_tokens": 90}
    warn = print
    assert MicroBatchLimit.after([{"event": "step"}, {"code": "worker_died"}], 8, warn) == MicroBatchLimit(
        8, MICRO_BATCH_TOKENS, warn
    )
    assert MicroBatchLimit.after([killed, killed], 8, warn).tokens == MICRO_BATCH_TOKENS // 4
    assert MicroBatchLimit.after([killed, said, killed], 8, warn).tokens == 45
