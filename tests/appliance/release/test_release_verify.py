"""The verify stage: what passes, and each planted fault caught by its gate."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import add_run, events, failure, result, stage, work

from appliance.errors import Exit
from appliance.home import Home
from appliance.release.adapter import LowRank, read_changes

TARGET = "model.layers.0.self_attn.v_proj.weight"
Tensors = dict[str, torch.Tensor]


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


@pytest.mark.parametrize("id", ["lora", "qlora", "dpo", "base"])
def test_what_was_merged_right_passes(home: Home, id: str) -> None:
    gates = verify(home, id)
    assert gates.keys() == {"structure", "fidelity", "quality"}
    assert all(gate["passed"] for gate in gates.values()), gates
    assert gates["structure"]["figures"]["targeted"] == (0 if id == "base" else 14)
    assert gates["structure"]["figures"]["changed"] == (0 if id == "base" else 14)
    assert gates["quality"]["reason"].startswith("no ")
    said = events(home.runs / id, "gate")
    assert [(event["gate"], event["passed"]) for event in said] == [(name, True) for name in gates]


def test_a_transposed_factor_is_caught_by_fidelity(home: Home) -> None:
    base = load_file(home.models / "tiny" / "model.safetensors")
    changes = read_changes(home.runs / "lora" / "sft" / "adapter", home.models / "tiny")

    def transpose(tensors: Tensors) -> None:
        for name, change in changes.items():
            assert isinstance(change, LowRank)
            delta = change.scale * change.left @ change.right
            if delta.shape[0] == delta.shape[1]:
                tensors[name] = base[name] + delta.T

    spoil(home, "lora", transpose)
    gates = verify(home, "lora")
    assert gates["structure"]["passed"]
    assert not gates["fidelity"]["passed"]
    assert gates["fidelity"]["figures"]["merged_loss"] > gates["fidelity"]["figures"]["adapter_loss"] + 0.05


def test_a_wrong_alpha_is_caught_by_fidelity_even_where_the_loss_is_lower(home: Home) -> None:
    base = load_file(home.models / "tiny" / "model.safetensors")
    changes = read_changes(home.runs / "lora" / "sft" / "adapter", home.models / "tiny")

    def scale(by: float) -> dict[str, Any]:
        def change(tensors: Tensors) -> None:
            for name in changes:
                delta = tensors[name] - base[name]
                tensors[name] = base[name] + by * delta

        spoil(home, "lora", change)
        (home.runs / "lora" / "verify" / "result.json").unlink(missing_ok=True)
        return verify(home, "lora")["fidelity"]

    halved = scale(0.5)
    assert not halved["passed"]
    assert halved["figures"]["merged_loss"] > halved["figures"]["adapter_loss"]
    assert scale(2.0)["passed"]
    better = halved["figures"]["adapter_loss"] - 0.2
    path = home.runs / "lora" / "merge" / "result.json"
    figures = json.loads(path.read_bytes())
    figures["losses"]["adapter"] += 0.2
    path.write_text(json.dumps(figures))
    lower = scale(1.0)
    assert better < lower["figures"]["merged_loss"] < lower["figures"]["adapter_loss"]
    assert not lower["passed"]


def test_a_zero_delta_is_caught_by_structure(home: Home) -> None:
    def undo(tensors: Tensors) -> None:
        tensors.update(load_file(home.models / "tiny" / "model.safetensors"))

    spoil(home, "lora", undo)
    gate = verify(home, "lora")["structure"]
    assert not gate["passed"]
    assert gate["reason"].startswith("14 targeted weights are unchanged")


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
    assert "other weights are changed" in gate["reason"]


@pytest.mark.parametrize("fault", ["template", "tokenizer", "lost", "end of turn"])
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


def test_an_untouched_module_is_caught_by_structure(home: Home) -> None:
    def restore(tensors: Tensors) -> None:
        tensors[TARGET] = load_file(home.models / "tiny" / "model.safetensors")[TARGET]

    spoil(home, "lora", restore)
    gate = verify(home, "lora")["structure"]
    assert not gate["passed"]
    assert TARGET in gate["reason"]


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
    shutil.copytree(home.runs / id / "merge" / "model", home.releases / id)
    return home.releases / id


def test_a_release_worse_than_the_live_one_is_caught_by_quality(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    release(home, "lora")
    monkeypatch.setenv("APPLIANCE_LIVE_RELEASE", "lora")
    worse = add_run(home, "worse", stage("sft", "FACTS", max_steps=1))
    assert work(worse, "sft", "merge") == 0
    gates = verify(home, "worse")
    assert gates["fidelity"]["passed"]
    assert not gates["quality"]["passed"]
    assert gates["quality"]["figures"]["live"] == "lora"
    assert gates["quality"]["figures"]["loss"] > gates["quality"]["figures"]["live_loss"]


def test_a_release_as_good_as_the_live_one_passes(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    release(home, "lora")
    monkeypatch.setenv("APPLIANCE_LIVE_RELEASE", "lora")
    gate = verify(home, "lora")["quality"]
    assert gate["passed"]
    assert gate["figures"]["loss"] == pytest.approx(gate["figures"]["live_loss"], abs=1e-4)


def test_without_trained_rows_quality_has_nothing_to_compare_on(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    release(home, "lora")
    monkeypatch.setenv("APPLIANCE_LIVE_RELEASE", "lora")
    assert verify(home, "base")["quality"] == {
        "passed": True,
        "figures": {},
        "reason": "no held-out rows to compare on",
    }


def test_a_live_release_without_files_is_an_error(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APPLIANCE_LIVE_RELEASE", "gone")
    assert work(home.runs / "lora", "verify") == Exit.FAILED
    assert failure(home.runs / "lora", "verify")["code"] == "no_such_release"
