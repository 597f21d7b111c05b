"""Training stages end to end on a tiny model, run in this process as a worker runs them."""

from __future__ import annotations

import fcntl
import functools
import json
import math
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import (
    CHATML,
    FACTS,
    JUDGEMENTS,
    add_dataset,
    add_run,
    events,
    failure,
    losses,
    make_model,
    read_recipe,
    result,
    stage,
    work,
)

from appliance.data.dataset import Dataset
from appliance.data.render import render_conversation
from appliance.data.tokenizer import load_tokenizer
from appliance.errors import Exit
from appliance.home import Home

SFT = stage("sft", "FACTS")
ADAPTER = "adapter/adapter_model.safetensors"


def test_a_stage_goes_on_with_the_one_that_it_names(home: Home) -> None:
    stages = stage("sft", "FACTS", max_steps=2) + stage("sft", "FACTS", max_steps=2, name="other")
    dpo = stage("dpo", "PREFERENCES", max_steps=1, learning_rate=1e-9, **{"from": "sft"})
    run = add_run(home, "r", stages + dpo)
    assert work(run, "sft", "other", "dpo") == 0
    left, other, made = (load_file(run / name / ADAPTER) for name in ("sft", "other", "dpo"))
    assert all(torch.allclose(made[name], weight, atol=1e-6) for name, weight in left.items())
    assert not all(torch.allclose(made[name], weight, atol=1e-6) for name, weight in other.items())


def test_a_stage_from_the_base_makes_a_new_adapter(home: Home) -> None:
    other = stage("sft", "FACTS", name="other", max_steps=1, learning_rate=1e-9, **{"from": "base"})
    run = add_run(home, "r", stage("sft", "FACTS", max_steps=4) + other)
    assert work(run, "sft", "other") == 0
    made = load_file(run / "other" / ADAPTER)
    assert all(float(weight.abs().max()) < 1e-6 for name, weight in made.items() if "lora_B" in name)


def test_a_run_goes_on_with_the_adapter_that_it_starts_from(home: Home) -> None:
    """Which is then dpo's reference, and what the merge measures the margin from."""
    before = add_run(home, "before", SFT)
    assert work(before, "sft") == 0
    run = add_run(home, "r", stage("dpo", "PREFERENCES", learning_rate=0.002))
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(f'start = {{release = "before", sha256 = "x"}}\n{text}')
    shutil.copytree(before / "sft" / "adapter", run / "start")
    assert work(run, "dpo", "merge", "verify") == 0
    assert losses(run, "dpo")[1] == pytest.approx(math.log(2), abs=1e-5)
    gates = result(run, "verify")["gates"]
    assert all(gate["passed"] for gate in gates.values()), gates


def test_sft_learns_and_says_so(home: Home) -> None:
    run = add_run(home, "r", stage("sft", "FACTS", evaluate_every=4))
    assert work(run, "sft") == 0

    steps = events(run, "step")
    assert [event["step"] for event in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert steps[-1]["steps"] == 12
    assert steps[-1]["eta_seconds"] == 0
    assert all(step["tokens_per_second"] > 0 and step["memory"] > 1 << 20 and step["lr"] >= 0 for step in steps)
    assert [event["step"] for event in events(run, "eval")] == [0, 4, 8, 12]
    samples = events(run, "sample")
    assert [event["step"] for event in samples] == [0, 0, 4, 4, 8, 8, 12, 12], "the same prompts at each evaluation"
    assert len({event["prompt"] for event in samples}) == 2
    assert samples[0]["text"] != samples[-2]["text"]
    assert len(events(run, "stage_started")) == len(events(run, "stage_finished")) == 1
    figures = result(run, "sft")
    assert figures["held_out_loss"] < figures["held_out_loss_before"]
    assert (figures["rows"], figures["held_out_rows"]) == (10, 2)
    assert not list((run / "sft").glob("checkpoint-*"))


def test_tokens_are_counted_without_padding(home: Home) -> None:
    run = add_run(home, "r", stage("sft", "FACTS", epochs=2))
    work(run, "sft")
    tokenizer = load_tokenizer(home.models / "tiny")
    dataset = Dataset.open(home, add_dataset(home, "facts", FACTS))
    rows = [dataset.rows[index]["messages"] for index in dataset.split(0.2)[0]]
    assert events(run, "step")[-1]["tokens"] == 2 * sum(
        len(example.input_ids) for messages in rows for example in render_conversation(tokenizer, messages)
    )


def test_a_finished_stage_is_left_alone(home: Home) -> None:
    run = add_run(home, "r", SFT)
    (run / "sft").mkdir()
    (run / "sft" / "result.json").write_text("{}")
    assert work(run, "sft") == 0
    assert not (run / "events.jsonl").exists()


def test_a_second_worker_leaves_the_run_alone(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    run = add_run(home, "r", SFT)
    with open(run / "worker.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert work(run, "sft") == Exit.CONFLICT
    assert "another worker" in capsys.readouterr().err
    assert not (run / "sft").exists()


@pytest.mark.parametrize("kind", ["lora", "qlora", "rslora", "dora"])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_preferences_go_on_from_the_sft_adapter(home: Home, method: str, kind: str) -> None:
    """Without a merge between; at first the adapter is its own reference."""
    preferences = stage(method, "PREFERENCES" if method == "dpo" else "JUDGEMENTS", learning_rate=0.002)
    run = add_run(home, "r", SFT + preferences, kind)
    assert work(run, "sft", method) == 0

    first, *_, last = losses(run, method).values()
    at_reference = math.log(2) if method == "dpo" else 0.5
    assert first == pytest.approx(at_reference, abs=1e-4)
    assert events(run, "eval", method)[0]["loss"] == pytest.approx(at_reference, abs=1e-4)
    assert last < first
    before = load_file(run / "sft" / "adapter" / "adapter_model.safetensors")
    after = load_file(run / method / "adapter" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert any("magnitude" in name for name in after) == (kind == "dora")
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    change = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < change < 0.1, "near the adapter that it started from, and moved"
    assert {path.name for path in (run / method / "adapter").iterdir()} >= {"adapter_config.json"}
    assert not (run / method / "adapter" / "ref").exists()


def test_dpo_may_come_first(home: Home) -> None:
    run = add_run(home, "r", stage("dpo", "PREFERENCES", learning_rate=0.005))
    assert work(run, "dpo") == 0
    first, *_, last = losses(run, "dpo").values()
    assert first == pytest.approx(math.log(2), abs=1e-5)
    assert last < first


def test_micro_batches_train_like_whole_ones(home: Home) -> None:
    whole = add_run(home, "whole", stage("sft", "FACTS", batch_size=4))
    parts = add_run(home, "parts", stage("sft", "FACTS", batch_size=4, micro_batch_size=1))
    work(whole, "sft")
    work(parts, "sft")
    assert losses(parts, "sft") == pytest.approx(losses(whole, "sft"), abs=1e-4)


def test_max_steps_caps_the_epochs(home: Home) -> None:
    run = add_run(home, "r", stage("sft", "FACTS", max_steps=2))
    work(run, "sft")
    assert list(losses(run, "sft")) == [1, 2]


def test_without_held_out_rows_nothing_is_evaluated(home: Home) -> None:
    run = add_run(home, "r", SFT)
    recipe = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(recipe.replace("eval_share = 0.2", "eval_share = 0.0"))
    assert work(run, "sft") == 0
    assert events(run, "eval") == []
    assert result(run, "sft")["rows"] == 12
    assert len(events(run, "sample")) == 2


def test_rows_too_long_are_an_error_naming_the_longest(home: Home) -> None:
    run = add_run(home, "r", stage("sft", "FACTS", max_length=40))
    assert work(run, "sft") == Exit.FAILED
    assert failure(run, "sft")["code"] == "row_too_long"
    assert "longer than max_length = 40" in failure(run, "sft")["reason"]
    assert "of facts.jsonl" in failure(run, "sft")["reason"]
    assert "drop_long" in failure(run, "sft")["next"]
    assert events(run, "failed")[0]["reason"] == failure(run, "sft")["reason"]
    assert events(run, "step") == []


def test_rows_too_long_are_left_out_and_counted_where_asked_for(home: Home) -> None:
    run = add_run(home, "r", stage("sft", "FACTS", max_length=40, drop_long=True))
    assert work(run, "sft") == 0
    (warning,) = events(run, "warning")
    count = int(warning["message"].split()[0])
    assert count == 12 - result(run, "sft")["rows"] - result(run, "sft")["held_out_rows"] > 0


def test_a_failed_stage_can_be_tried_again(home: Home) -> None:
    run = add_run(home, "r", stage("sft", "FACTS", max_length=40, max_steps=1))
    work(run, "sft")
    recipe = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(recipe.replace("max_length = 40", "max_length = 400"))
    assert work(run, "sft") == 0
    assert not (run / "sft" / "failure.json").exists()


@pytest.mark.parametrize(("method", "dataset"), [("sft", "PREFERENCES"), ("dpo", "FACTS"), ("kto", "FACTS")])
def test_a_dataset_of_the_wrong_kind_is_refused(home: Home, method: str, dataset: str) -> None:
    run = add_run(home, "r", stage(method, dataset))
    assert work(run, method) == Exit.FAILED
    assert failure(run, method)["code"] == "wrong_dataset_kind"


def test_a_dataset_whose_report_has_errors_is_refused(home: Home) -> None:
    run = add_run(home, "r", SFT)
    report = home.datasets / read_recipe(run).stages[0].dataset / "report.json"
    findings = [{"level": "note", "message": "x"}, {"level": "error", "message": "nothing would be trained"}]
    report.write_text(json.dumps(json.loads(report.read_text()) | {"findings": findings}))
    assert work(run, "sft") == Exit.FAILED
    assert failure(run, "sft")["code"] == "dataset_has_errors"
    assert "cannot be trained on: nothing would be trained" in failure(run, "sft")["reason"]


def test_a_template_that_does_not_end_turns_is_refused(home: Home) -> None:
    (home.models / "tiny").unlink()
    make_model(home.models / "tiny", template=CHATML.replace("<|im_end|>", "").replace("<|im_start|>", ""))
    run = add_run(home, "r", SFT)
    assert work(run, "sft") == Exit.FAILED
    assert failure(run, "sft")["code"] == "no_end_of_turn"
    assert "line 1 of facts.jsonl" in failure(run, "sft")["reason"]


def test_kto_wants_some_good_answers(home: Home) -> None:
    id = add_dataset(home, "bad", [row for row in JUDGEMENTS if not row["label"]])
    run = add_run(home, "r", stage("kto", f'"{id}"'))
    assert work(run, "kto") == Exit.FAILED
    assert failure(run, "kto")["code"] == "no_good_answers"


@pytest.mark.parametrize(
    ("targets", "code"),
    [(["no_proj"], "no_such_module"), (["q_proj", "lm_head"], "bad_target"), (["norm"], "bad_target")],
)
def test_targets_that_do_not_fit_are_refused(home: Home, targets: list[str], code: str) -> None:
    run = add_run(home, "r", f"targets = {targets}\n" + SFT)
    assert work(run, "sft") == Exit.FAILED
    assert failure(run, "sft")["code"] == code


def test_an_adapter_that_covers_less_than_its_recipe_says_is_refused(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = functools.partial(LoraConfig, exclude_modules=["up_proj"])
    with monkeypatch.context() as patch:
        patch.setattr("appliance.train.model.LoraConfig", some)
        run = add_run(home, "r", SFT)
        assert work(run, "sft") == Exit.FAILED
        assert failure(run, "sft")["code"] == "adapter_incomplete"
        assert "covers 12 of the 14 layers" in failure(run, "sft")["reason"]
    run = add_run(home, "chained", 'targets = ["q_proj"]\n' + SFT + stage("dpo", "PREFERENCES"))
    work(run, "sft")
    (run / "recipe.toml").write_text((run / "recipe.toml").read_text().replace('"q_proj"', '"q_proj", "k_proj"'))
    assert work(run, "dpo") == Exit.FAILED
    assert (
        "covers 2 of the 4 layers that its recipe names; model.layers.0.self_attn.k_proj"
        in (failure(run, "dpo")["reason"])
    )


def test_a_base_that_could_not_be_merged_is_refused_before_training(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.release.adapter.layout", lambda _: {"model.layers.0.mlp.up_proj.weight": ()})
    run = add_run(home, "r", SFT)
    assert work(run, "sft") == Exit.FAILED
    assert failure(run, "sft")["code"] == "not_mergeable"
    assert events(run, "step") == []


@pytest.mark.parametrize(
    ("message", "code", "advice"),
    [
        (
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
            "out_of_memory",
            "max_length",
        ),
        ("CUDA out of memory. Tried to allocate 2 GiB", "out_of_memory", "max_length"),
        ("I/O error: No space left on device (os error 28)", "no_space", "free some space"),
    ],
)
def test_a_lack_of_memory_or_disk_says_what_to_do(
    home: Home, monkeypatch: pytest.MonkeyPatch, message: str, code: str, advice: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr("appliance.train.stage.load_model", fail)
    run = add_run(home, "r", SFT)
    assert work(run, "sft") == Exit.FAILED
    assert failure(run, "sft")["code"] == code
    assert advice in failure(run, "sft")["next"]


def test_a_fault_of_our_own_points_to_the_log(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("appliance.train.stage.load_model", lambda *_, **__: 1 / 0)
    run = add_run(home, "r", SFT)
    assert work(run, "sft") == Exit.FAILED
    assert failure(run, "sft") == {
        "code": "internal",
        "reason": "ZeroDivisionError: division by zero",
        "next": "see the log",
    }
    assert "Traceback" in capsys.readouterr().err
