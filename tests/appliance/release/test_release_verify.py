"""The verify stage: what passes, and each planted fault caught by its gate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import FAULTS, merged, plant
from safetensors.torch import load_file, save_file
from tiny import add_dataset, add_run, events, read_recipe, result, stage, work

from appliance.data.tokenizer import load_tokenizer
from appliance.home import Home, sha256, write_json
from appliance.release.adapter import read_changes
from appliance.release.gates import Gate, load_served
from appliance.release.held_out import held_out_set, render
from appliance.release.manifest import Manifest
from appliance.release.oracle import Oracle
from appliance.release.peft_format import ADAPTER_SHA256
from appliance.release.rounding import Rounding
from appliance.release.scores import score
from appliance.release.verify import _round_again
from appliance.release.weights import pairs
from appliance.train.model import load_model

TARGET = "model.layers.0.self_attn.v_proj.weight"
Tensors = dict[str, torch.Tensor]
TOO_SMALL = {(id, "a norm changed by one per cent") for id in ("lora", "nudged")} | {("nudged", "one weight forgotten")}
"""For their sound alone, which rounding drowns; the bytes tell."""


def verify(home: Home, id: str) -> dict[str, Any]:
    """The gates of a run, as verify has judged them."""
    run = home.runs / id
    assert work(run, "verify") == 0
    gates: dict[str, Any] = result(run, "verify")["gates"]
    return gates


def spoil(home: Home, id: str, change: Callable[[Tensors], None]) -> None:
    """Change the merged weights of a run."""
    path = home.runs / id / "merge" / "model" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})


def believe_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let gate 1 pass whatever the files hold."""

    def judge(base: Path, model: Path, oracle: Oracle, see: Callable[[str, torch.Tensor], None]) -> Gate:
        for name, before, _ in pairs(base, model):
            if name in oracle.changed:
                see(name, oracle.merged(name, oracle.start(name, before)))
        return Gate(True)

    monkeypatch.setattr("appliance.release.verify.judge_weights", judge)


@pytest.mark.parametrize("id", ["lora", "qlora", "dpo", "base", "nudged", "nudged-dpo", "nudged-kto"])
def test_what_was_merged_right_passes(home: Home, id: str) -> None:
    gates = verify(home, id)
    assert gates.keys() == {"structure", "fidelity", "quality"}
    assert all(gate["passed"] for gate in gates.values()), gates
    assert gates["structure"]["figures"]["targeted"] == (0 if id == "base" else 14)
    said = events(home.runs / id, "gate")
    assert [(event["gate"], event["passed"]) for event in said] == [(name, True) for name in gates]
    if id == "base":
        return
    assert gates["structure"]["figures"]["update_kept"] == pytest.approx(1, abs=0.05)
    fidelity, quality = gates["fidelity"]["figures"], gates["quality"]["figures"]
    assert fidelity["tokens"] > fidelity["conversations"] > quality["conversations"] > 0
    assert 0 <= fidelity["mean_divergence"] < fidelity["limits"]["mean_divergence"] < 0.05
    assert quality["against"] == f"the base {'tiny16' if 'nudged' in id else 'tiny'}"


PLANTED = [(id, fault) for id in ("lora", "qlora", "nudged", "nudged-dpo") for fault in FAULTS]
PLANTED = [(id, fault) for id, fault in PLANTED if id == "nudged" or fault != "another stage's adapter"]


@pytest.mark.parametrize(("id", "fault"), PLANTED)
def test_a_planted_fault_is_caught(home: Home, id: str, fault: str) -> None:
    run = home.runs / id
    recipe = read_recipe(run)
    plant(merged(home, run, recipe, result(run, "merge")["kept"]), fault, run / "merge" / "model")
    gates = verify(home, id)
    assert not gates["structure"]["passed"]
    assert " is not the base's with the adapter merged in" in gates["structure"]["reason"] or fault in (
        "a norm changed by one per cent",
        "one weight forgotten",
    )


@pytest.mark.parametrize(
    ("id", "fault"), [(id, fault) for id, fault in PLANTED if id in ("lora", "nudged") and (id, fault) not in TOO_SMALL]
)
def test_a_planted_fault_is_heard_in_what_the_model_says(
    home: Home, monkeypatch: pytest.MonkeyPatch, id: str, fault: str
) -> None:
    """Fidelity alone, as if the files had been compared with nothing."""
    run = home.runs / id
    believe_the_files(monkeypatch)
    plant(merged(home, run, read_recipe(run), result(run, "merge")["kept"]), fault, run / "merge" / "model")
    gate = verify(home, id)["fidelity"]
    assert not gate["passed"]
    assert "above what rounding makes of it" in gate["reason"] or "the margin" in gate["reason"]


def test_rounding_to_nearest_loses_the_update_and_is_caught(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    run = home.runs / "nudged-dpo"
    with monkeypatch.context() as patch:
        patch.setattr("appliance.release.weights.Rounding.__call__", lambda self, values, _, out: out.copy_(values))
        (run / "merge" / "result.json").unlink()
        assert work(run, "merge") == 0
    assert not verify(home, "nudged-dpo")["structure"]["passed"]
    believe_the_files(monkeypatch)
    (run / "verify" / "result.json").unlink()
    gate = verify(home, "nudged-dpo")["fidelity"]
    assert not gate["passed"]
    assert gate["figures"]["margin"]["kept"] < 0.9
    assert "the margin over the reference" in gate["reason"]


@pytest.mark.parametrize(("id", "least"), [("nudged-dpo", 0.1), ("nudged-kto", 0.1), ("nudged", 0.05)])
def test_a_preference_keeps_its_margin_over_what_it_began_with(home: Home, id: str, least: float) -> None:
    margin = verify(home, id)["fidelity"]["figures"]["margin"]
    assert margin["adapter"] > least
    assert 0.97 <= margin["kept"] <= 1.03


def test_a_rounding_that_is_never_up_is_caught_by_the_share_of_the_update(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it would be if merge and gate rounded alike, and both wrongly."""

    def towards_zero(self: Rounding, values: torch.Tensor, rows: slice, out: torch.Tensor) -> torch.Tensor:
        bits = values.contiguous().view(torch.int32)
        return out.copy_(bits.bitwise_and_(-1 << 16).view(torch.float32))

    monkeypatch.setattr(Rounding, "__call__", towards_zero)
    run = home.runs / "nudged-dpo"
    (run / "merge" / "result.json").unlink()
    assert work(run, "merge") == 0
    gate = verify(home, "nudged-dpo")["structure"]
    assert not gate["passed"]
    assert "of the update is in the files" in gate["reason"]


def test_a_merge_into_another_base_is_caught(home: Home, tmp_path: Path) -> None:
    """Another base of the same shape, its weights a little apart, as a later version of a model has them."""
    other = load_file(home.models / "tiny" / "model.safetensors")
    changes = read_changes(home.runs / "lora" / "sft" / "adapter", home.models / "tiny")

    def merge(tensors: Tensors) -> None:
        for name, tensor in other.items():
            moved = tensor + 0.01 * torch.randn_like(tensor)
            rows = slice(0, len(moved))
            tensors[name] = changes[name](moved, rows) if name in changes else moved

    spoil(home, "lora", merge)
    gate = verify(home, "lora")["structure"]
    assert not gate["passed"]
    assert "nothing was trained that changes it" in gate["reason"]


def test_a_weight_with_the_other_sign_of_zero_is_another_weight(home: Home) -> None:
    """Untouched means byte for byte."""

    def change(tensors: Tensors) -> None:
        tensors["model.norm.weight"][3] = 0.0

    base = home.models / "tiny" / "model.safetensors"
    tensors = load_file(base)
    tensors["model.norm.weight"][3] = -0.0
    save_file(tensors, base, metadata={"format": "pt"})
    spoil(home, "lora", change)
    gate = verify(home, "lora")["structure"]
    assert gate["reason"] == "model.norm.weight is changed, and nothing was trained that changes it"


def apart(tensors: Tensors, values: int, by: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the first values of a targeted tensor."""
    some = tensors[TARGET].flatten()[:values]
    some.copy_(by(some))


def neighbour(values: torch.Tensor) -> torch.Tensor:
    """Each value's other neighbour, further from 0, in its type."""
    return (values.contiguous().view(torch.int16) + 1).view(values.dtype)


@pytest.mark.parametrize(
    ("id", "values", "by"),
    [
        pytest.param("lora", 1, lambda values: values * (1 + 2**-12), id="one in fp32, by 2^-12"),
        pytest.param("lora", 2, lambda values: values + 1000, id="two in fp32, by far"),
        pytest.param("nudged-dpo", 1, lambda values: values + 100, id="one in 16 bits, by far"),
        pytest.param("nudged-dpo", 1, lambda values: neighbour(neighbour(values)), id="one in 16 bits, by two steps"),
        pytest.param("nudged-dpo", 64, neighbour, id="many in 16 bits, by a step"),
    ],
)
def test_single_values_that_are_not_the_rounding_are_caught(
    home: Home, id: str, values: int, by: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    spoil(home, id, lambda tensors: apart(tensors, values, by))
    gate = verify(home, id)["structure"]
    assert not gate["passed"]
    assert f"{TARGET} is not the base's with the adapter merged in" in gate["reason"]


def test_the_engine_is_asked_for_what_the_merged_files_say(home: Home) -> None:
    verify(home, "nudged")
    served = load_served(home.runs / "nudged", "16-bit")
    assert served
    assert 4 <= len(served.conversations) <= 16
    assert 0.02 < served.limit < 0.2
    model = load_model(home.runs / "nudged" / "merge" / "model")
    apart = []
    for one in served.conversations:
        with torch.no_grad():
            logps = torch.log_softmax(model(torch.tensor([one.token_ids])).logits[0].float(), -1)
        apart += [
            abs(float(logps[place - 1, one.token_ids[place]]) - said)
            for place, said in zip(one.positions, one.logps, strict=True)
        ]
    assert sum(apart) / len(apart) < served.limit / 2


def test_where_no_conversation_is_short_enough_the_engine_is_not_asked(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.release.verify.SERVED_LONGEST", 3)
    assert all(gate["passed"] for gate in verify(home, "nudged").values())
    assert load_served(home.runs / "nudged", "16-bit") is None


def test_the_noise_is_that_of_other_draws(home: Home) -> None:
    folder, base = home.runs / "nudged-dpo" / "merge" / "model", home.models / "tiny16"
    oracle, model = Oracle(folder / "adapter", base, rounded=False), load_model(folder)
    for name, before, after in pairs(base, folder):
        if name in oracle.changed:
            exact = oracle.merged(name, oracle.start(name, before))
            _round_again(model, oracle, torch.bfloat16, name, exact)
            again = oracle.values(model, name).detach()
            step = torch.finfo(torch.bfloat16).eps * exact.abs()
            assert not torch.equal(again, after.float())
            assert bool(((again - exact).abs() <= step).all()), "and as near"


@pytest.mark.parametrize("fault", ["template", "tokenizer", "lost", "end of turn", "added", "settings"])
def test_files_that_are_not_the_bases_are_caught_by_structure(home: Home, tmp_path: Path, fault: str) -> None:
    model = home.runs / "lora" / "merge" / "model"
    match fault:
        case "template":
            path = model / "chat_template.jinja"
            path.write_text(path.read_text().replace("<|im_end|>", "<|im_end|> "))
        case "tokenizer":
            path = model / "tokenizer.json"
            tokenizer = json.loads(path.read_bytes())
            tokenizer["model"]["vocab"] |= {
                "a": tokenizer["model"]["vocab"]["b"],
                "b": tokenizer["model"]["vocab"]["a"],
            }
            path.write_text(json.dumps(tokenizer))
        case "lost":
            path = model / "tokenizer_config.json"
            path.unlink()
        case "end of turn":
            path = model / "generation_config.json"
            path.write_text(json.dumps({"eos_token_id": [0, 7]}))
        case "added":
            path = model / "added_tokens.json"
            path.write_text("{}")
        case "settings":
            path = model / "generation_config.json"
            path.write_text(json.dumps(json.loads(path.read_bytes()) | {"temperature": 9.0}))
    gates = verify(home, "lora")
    assert not gates["structure"]["passed"]
    assert path.name in gates["structure"]["reason"]
    if fault == "end of turn":
        assert "[2]" in gates["structure"]["reason"]
    assert not gates["fidelity"]["passed"]


def test_a_value_that_is_not_finite_is_caught_by_structure(home: Home) -> None:
    def plant(tensors: Tensors) -> None:
        tensors[TARGET][3, 4] = torch.nan

    spoil(home, "lora", plant)
    gates = verify(home, "lora")
    assert not gates["structure"]["passed"]
    assert gates["structure"]["reason"] == f"{TARGET} holds values that are not finite"
    assert not gates["fidelity"]["passed"]
    assert "not measured" in gates["fidelity"]["reason"]


@pytest.mark.parametrize("id", ["lora", "base"])
def test_a_change_where_none_belongs_is_caught_by_structure(home: Home, id: str) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"][9, 9] += 0.5

    spoil(home, id, change)
    gate = verify(home, id)["structure"]
    assert not gate["passed"]
    assert "model.embed_tokens.weight" in gate["reason"]


@pytest.mark.parametrize("fault", ["shape", "dtype", "lost", "added"])
def test_another_layout_is_caught_by_structure(home: Home, fault: str) -> None:
    def change(tensors: Tensors) -> None:
        match fault:
            case "shape":
                tensors[TARGET] = tensors[TARGET][:-1].contiguous()
            case "dtype":
                tensors[TARGET] = tensors[TARGET].bfloat16()
            case "lost":
                del tensors[TARGET]
            case "added":
                tensors["lm_head.weight"] = tensors[TARGET].clone()

    spoil(home, "lora", change)
    gates = verify(home, "lora")
    assert not gates["structure"]["passed"]
    assert ("lm_head.weight" if fault == "added" else TARGET) in gates["structure"]["reason"]
    assert not gates["quality"]["passed"]


def release(home: Home, id: str) -> Path:
    """Make the merged model of a run a release, as far as verify looks at it."""
    folder = home.releases / id
    shutil.copytree(home.runs / id / "merge" / "model", folder)
    recipe = read_recipe(home.runs / id).model_dump(mode="json", exclude_none=True)
    nothing: dict[str, Any] = {}
    manifest = Manifest(
        release=id,
        state="verified",
        reason="all 5 gates passed",
        created=0.0,
        base="tiny",
        datasets=nothing,
        dataset_rows=nothing,
        gates=nothing,
        merge=nothing,
        stages=nothing,
        files=nothing,
        base_files=nothing,
        recipe=recipe,
        recipe_sha256="",
        versions=nothing,
    )
    write_json(folder / "manifest.json", asdict(manifest))
    return folder


def test_a_release_worse_than_the_live_one_is_caught_by_quality(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    release(home, "lora")
    monkeypatch.setenv("APPLIANCE_LIVE_RELEASE", "lora")
    worse = add_run(home, "worse", stage("sft", "FACTS", max_steps=1))
    assert work(worse, "sft", "merge") == 0
    gates = verify(home, "worse")
    assert gates["fidelity"]["passed"]
    assert not gates["quality"]["passed"]
    assert gates["quality"]["figures"]["against"] == "the live release lora"
    assert gates["quality"]["figures"]["loss"] > gates["quality"]["figures"]["other_loss"]
    assert "worse by" in gates["quality"]["reason"]


def test_a_release_as_good_as_the_live_one_passes(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    release(home, "lora")
    monkeypatch.setenv("APPLIANCE_LIVE_RELEASE", "lora")
    gate = verify(home, "lora")["quality"]
    assert gate["passed"]
    assert gate["figures"]["difference"] == pytest.approx(0, abs=1e-4)
    assert "of_live_release" not in gate["figures"], "its rows are the same"


def test_the_live_release_is_told_the_conversations_by_its_own_template(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = release(home, "lora")
    template = folder / "chat_template.jinja"
    template.write_text("<|im_start|>system\nbe brief<|im_end|>\n" + template.read_text())
    monkeypatch.setenv("APPLIANCE_LIVE_RELEASE", "lora")
    figures = verify(home, "lora")["quality"]["figures"]
    chosen = held_out_set(home, read_recipe(home.runs / "lora"), load_tokenizer(home.models / "tiny")).conversations
    theirs = score(load_model(folder), render(load_tokenizer(folder), chosen))
    assert figures["other_loss"] == pytest.approx(theirs.loss, abs=1e-4)
    assert abs(figures["other_loss"] - figures["loss"]) > 1e-3


@pytest.mark.parametrize("file", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_live_release_that_cannot_be_read_keeps_no_other_from_its_place(
    home: Home, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    (release(home, "lora") / file).write_text("{}")
    monkeypatch.setenv("APPLIANCE_LIVE_RELEASE", "lora")
    assert verify(home, "dpo")["quality"]["figures"]["against"] == "the base tiny"


def test_a_destroyed_model_is_worse_than_its_base(home: Home) -> None:
    """With no live release to compare with."""
    rows = [
        {"messages": [{"role": "user", "content": f"Count to {n}."}, {"role": "assistant", "content": f"One, {n}."}]}
        for n in range(120)
    ]
    many = f'"{add_dataset(home, "many", rows)}"'
    taught = add_run(home, "taught", stage("sft", many, max_steps=60))
    assert work(taught, "sft", "merge") == 0
    shutil.copytree(taught / "merge" / "model", home.models / "taught", ignore=shutil.ignore_patterns("adapter"))
    run = add_run(home, "destroyed", stage("sft", many, max_steps=1), base="taught")
    assert work(run, "sft") == 0
    path = run / "sft" / "adapter" / "adapter_model.safetensors"
    torch.manual_seed(3)
    tensors = {name: torch.randn_like(tensor) for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    write_json(run / "sft" / "result.json", {**result(run, "sft"), ADAPTER_SHA256: sha256(path)})
    assert work(run, "merge") == 0
    gates = verify(home, "destroyed")
    assert gates["structure"]["passed"], gates["structure"]
    assert gates["fidelity"]["passed"], gates["fidelity"]
    assert not gates["quality"]["passed"], gates["quality"]
    assert "of the base taught: worse by" in gates["quality"]["reason"]


@pytest.mark.parametrize(("id", "pairs"), [("nudged-dpo", True), ("nudged-kto", False)])
def test_what_was_taught_by_preference_is_judged_by_preference(
    home: Home, monkeypatch: pytest.MonkeyPatch, id: str, pairs: bool
) -> None:
    """Chosen answers that have become rarer are no fault where the others have become rarer still."""
    better = verify(home, id)["quality"]
    assert better["passed"]
    figures = better["figures"]["preference"]
    assert min(figures["good"], figures["bad"]) > 0
    assert (figures["good"] == figures["bad"]) or not pairs
    assert figures["difference"] < 0
    release(home, id)
    monkeypatch.setenv("APPLIANCE_LIVE_RELEASE", id)
    method, dataset = ("dpo", "PREFERENCES") if pairs else ("kto", "JUDGEMENTS")
    run = add_run(home, "again", stage(method, dataset, max_steps=1, learning_rate=1e-6), base="tiny16")
    assert work(run, method, "merge") == 0
    worse = verify(home, "again")["quality"]
    assert worse["figures"]["preference"]["difference"] > 0, "the live one prefers more"
    assert f"nats a token less than the live release {id}" in worse["reason"]


def test_what_is_forgotten_of_the_live_releases_rows_is_said(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    release(home, "lora")
    monkeypatch.setenv("APPLIANCE_LIVE_RELEASE", "lora")
    other = [
        {"messages": [{"role": "user", "content": f"Count to {n}."}, {"role": "assistant", "content": "No, no, no."}]}
        for n in range(20)
    ]
    id = add_dataset(home, "other", other)
    run = add_run(home, "other", stage("sft", f'"{id}"', max_steps=20))
    assert work(run, "sft", "merge") == 0
    gate = verify(home, "other")["quality"]
    assert gate["passed"], gate
    lived = gate["figures"]["of_live_release"]
    assert lived["difference"] > 0.1
    assert "on the live release's own held-out rows" in gate["reason"]
    assert "nats a token forgotten" in gate["reason"]

    recipe = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(recipe.replace("forgetting_limit = 0.0", "forgetting_limit = 0.05"))
    (run / "verify" / "result.json").unlink()
    gate = verify(home, "other")["quality"]
    assert not gate["passed"]
    assert "more than 0.05 nats a token forgotten" in gate["reason"]


@pytest.mark.parametrize("id", ["lora", "base"])
def test_a_live_release_without_files_is_no_hindrance(home: Home, monkeypatch: pytest.MonkeyPatch, id: str) -> None:
    monkeypatch.setenv("APPLIANCE_LIVE_RELEASE", "gone")
    gate = verify(home, id)["quality"]
    assert gate["passed"]
    assert id == "base" or gate["figures"]["against"] == "the base tiny"
