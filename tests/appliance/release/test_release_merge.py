"""The merge stage on a tiny model."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import pkgutil
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import add_run, failure, make_model, result, stage, work

from appliance.adapters import WEIGHTS
from appliance.errors import Exit, InvalidInput
from appliance.home import Home, hashes
from appliance.release import merge
from appliance.release.adapter import LowRank, read_changes, rounded_changes
from appliance.release.rounding import Rounding
from appliance.release.scores import Scores
from appliance.release.weights import layout, write_weights
from appliance.train.interruption import INTERRUPTED
from appliance.train.model import load_adapter, load_model, nf4_round_trip
from appliance.train.recipe import Recipe, parse_recipe

IDS = torch.tensor([[1, 40, 60, 80, 100, 2], [1, 5, 15, 25, 35, 45]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model(IDS).logits
    return values


def test_merged_weights_compute_what_the_adapter_does(trained: Home) -> None:
    run, base = trained.runs / "lora", trained.models / "tiny"
    adapted = logits(load_adapter(load_model(base), run / "sft" / "adapter", trainable=False).eval())
    released = logits(load_model(run / "merge" / "model"))
    assert float((adapted - logits(load_model(base))).abs().max()) > 1
    assert float((adapted - released).abs().max()) < 1e-4


def test_the_files_are_the_bases_but_for_weights_and_end_tokens(trained: Home) -> None:
    base, model = trained.models / "tiny", trained.runs / "lora" / "merge" / "model"
    adapter = trained.runs / "lora" / "sft" / "adapter"
    names = {path.name for path in model.iterdir() if path.is_file()}
    assert names == {path.name for path in base.iterdir()} - {"source.json"}
    configs = [json.loads((folder / "adapter_config.json").read_bytes()) for folder in (model / "adapter", adapter)]
    ours, trained_one = configs
    assert ours == {**trained_one, "base_model_name_or_path": "tiny"}
    assert hashes(model / "adapter")["adapter_model.safetensors"] == hashes(adapter)["adapter_model.safetensors"]
    for path in map(model.joinpath, names):
        same = path.read_bytes() == (base / path.name).read_bytes()
        assert same == (path.name not in ("model.safetensors", "generation_config.json")), path.name
    assert layout(model) == layout(base)
    tokenizer = json.loads((base / "tokenizer.json").read_bytes())["added_tokens"]
    ends = [token["id"] for token in tokenizer if token["content"] in ("<|endoftext|>", "<|im_end|>")]
    config = json.loads((model / "generation_config.json").read_bytes())
    assert config == {"eos_token_id": sorted([7, *ends]), "top_k": 5}
    assert result(trained.runs / "lora", "merge")["files"] == hashes(model)


def test_dtype_and_shards_stay_the_bases(tmp_path: Path, trained: Home) -> None:
    base = make_model(tmp_path / "base", dtype=torch.bfloat16)
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    for part, chosen in enumerate((names[::2], names[1::2]), start=1):
        content = {name: tensors[name] for name in chosen}
        save_file(content, base / f"model-0000{part}-of-00002.safetensors", metadata={"format": "pt"})
    changes = read_changes(trained.runs / "lora" / "sft" / "adapter", base)
    (tmp_path / "out").mkdir()
    write_weights(base, tmp_path / "out", changes)
    assert layout(tmp_path / "out") == layout(base)
    name = "model.layers.1.mlp.down_proj.weight"
    change = changes[name]
    assert isinstance(change, LowRank)
    shard = tmp_path / "out" / layout(base)[name][0]
    exact = tensors[name].float().addmm_(change.left, change.right, alpha=2.0)
    rounding, out = Rounding(name, tuple(exact.shape), torch.bfloat16), torch.empty_like(exact, dtype=torch.bfloat16)
    rounded = rounding(exact.clone(), slice(0, len(exact)), out)
    assert torch.equal(load_file(shard)[name], rounded)
    assert float((rounded.float() - exact).abs().max()) < float(exact.abs().max()) * 2**-7
    assert change.scale == 2.0


def test_qlora_is_scored_on_both_bases_and_the_better_is_kept(trained: Home) -> None:
    run, base = trained.runs / "qlora", trained.models / "tiny"
    figures = result(run, "merge")
    losses = figures["losses"]
    assert losses.keys() == {"adapter", "16-bit", "dequantised"}
    assert losses["dequantised"] == pytest.approx(losses["adapter"], abs=1e-3)
    assert losses[figures["kept"]] == min(losses["16-bit"], losses["dequantised"])
    assert losses["16-bit"] != losses["dequantised"]

    change = read_changes(run / "sft" / "adapter", base)["model.layers.0.self_attn.q_proj.weight"]
    assert isinstance(change, LowRank)
    before = load_file(base / "model.safetensors")
    after = load_file(run / "merge" / "model" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    start = before[name] if figures["kept"] == "16-bit" else nf4_round_trip(before[name])
    assert torch.allclose(after[name], start + change.scale * change.left @ change.right, atol=1e-6)


@pytest.mark.parametrize("better", ["16-bit", "dequantised"])
def test_whichever_is_better_is_what_is_written(home: Home, monkeypatch: pytest.MonkeyPatch, better: str) -> None:
    run = home.runs / "qlora"
    scores = iter([0.5, 0.1, 0.2] if better == "16-bit" else [0.5, 0.2, 0.1])

    monkeypatch.setattr(Scores, "loss", property(lambda _: next(scores)))
    (run / "merge" / "result.json").unlink()
    assert work(run, "merge") == 0
    assert result(run, "merge")["kept"] == better
    base = home.models / "tiny"
    changes = read_changes(run / "sft" / "adapter", base)
    expected = home.root / "expected"
    expected.mkdir()
    write_weights(base, expected, changes if better == "16-bit" else rounded_changes(base, changes))
    written = run / "merge" / "model" / "model.safetensors"
    assert written.read_bytes() == (expected / "model.safetensors").read_bytes()


def test_without_stages_the_weights_are_a_copy_of_the_bases(home: Home) -> None:
    """A base that is written to in place takes no release with it."""
    base, model = home.models / "tiny", home.runs / "base" / "merge" / "model"
    before = (model / "model.safetensors").read_bytes()
    assert before == (base / "model.safetensors").read_bytes()
    with open(base / "model.safetensors", "r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(bytes(8))
    assert (model / "model.safetensors").read_bytes() == before
    assert 7 in json.loads((model / "generation_config.json").read_bytes())["eos_token_id"]
    assert json.loads((base / "generation_config.json").read_bytes())["eos_token_id"] == 7


def test_a_base_that_lacks_a_trained_weight_is_refused(home: Home) -> None:
    run, weights = home.runs / "lora", home.models / "tiny" / "model.safetensors"
    tensors = load_file(weights)
    tensors["renamed"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, weights, metadata={"format": "pt"})
    (run / "merge" / "result.json").unlink()
    assert work(run, "merge") == Exit.FAILED
    assert failure(run, "merge")["code"] == "not_mergeable"
    assert "model.layers.0.mlp.up_proj.weight" in failure(run, "merge")["reason"]
    assert list((run / "merge").iterdir()) == [run / "merge" / "failure.json"]


def test_a_base_that_is_cut_short_is_said(home: Home) -> None:
    run, weights = home.runs / "lora", home.models / "tiny" / "model.safetensors"
    whole = weights.read_bytes()
    for length in (0, 5, 200, len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(InvalidInput, match=r"model\.safetensors is damaged or cut short"):
            layout(home.models / "tiny")
    (run / "merge" / "result.json").unlink()
    assert work(run, "merge") == Exit.FAILED
    assert failure(run, "merge")["code"] == "bad_model"


def test_a_full_disk_is_said_before_anything_is_written(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    run = home.runs / "lora"
    (run / "merge" / "result.json").unlink()
    usage = shutil.disk_usage(home.root)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage._replace(free=1000))
    assert work(run, "merge") == Exit.FAILED
    assert failure(run, "merge")["code"] == "no_space"


@pytest.mark.parametrize(
    ("call", "calls"),
    [("appliance.release.weights._write", 5), ("shutil.copyfile", 2), ("os.fsync", 4), ("os.rename", 0)],
)
def test_a_disk_that_fills_in_the_middle_loses_nothing(
    home: Home, monkeypatch: pytest.MonkeyPatch, call: str, calls: int
) -> None:
    """It fills at a call after so many; what the failed merge then gives back is room for the reason."""
    run = home.runs / "lora"
    whole = hashes(run / "merge" / "model")
    (run / "merge" / "result.json").unlink()
    real = pkgutil.resolve_name(call)
    done = itertools.count()

    def fill(*arguments: Any, **named: Any) -> Any:
        if next(done) == calls:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments, **named)

    monkeypatch.setattr(call, fill)
    assert work(run, "merge") == Exit.FAILED
    assert failure(run, "merge")["code"] == "no_space"
    assert list((run / "merge").iterdir()) == [run / "merge" / "failure.json"]
    assert (run / "sft" / "adapter" / "adapter_model.safetensors").exists()
    monkeypatch.undo()
    assert work(run, "merge") == 0
    assert hashes(run / "merge" / "model") == whole


def test_a_stop_leaves_nothing_half_made(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    run = home.runs / "lora"
    shutil.rmtree(run / "merge")
    with monkeypatch.context() as patch:
        patch.setattr("appliance.release.merge.score", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as ended:
            work(run, "merge")
    assert ended.value.code == INTERRUPTED
    assert list((run / "merge").iterdir()) == []
    assert work(run, "merge") == 0


def test_only_preferences_are_judged_by_their_chosen_answers(home: Home) -> None:
    assert result(home.runs / "dpo", "merge")["rows"] == 1
    run = add_run(home, "again", stage("sft", "FACTS", max_steps=1) + stage("dpo", "PREFERENCES", max_steps=1))
    work(run, "sft", "dpo", "merge")
    assert result(run, "merge")["rows"] == 2, "the SFT stage's rows come first"


def test_an_adapter_that_the_last_stage_has_not_left_is_not_merged(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    run = home.runs / "nudged"
    for name in ("merge", "verify"):
        shutil.rmtree(run / name, ignore_errors=True)
    monkeypatch.setattr(Recipe, "last_adapter", lambda _, folder: folder / "sft" / "adapter")
    assert work(run, "merge") == Exit.FAILED
    assert failure(run, "merge")["reason"] == "the adapter is not the one that dpo has left"
    monkeypatch.undo()
    weights = run / "dpo" / "adapter" / WEIGHTS
    left = weights.read_bytes()
    shutil.copyfile(run / "sft" / "adapter" / WEIGHTS, weights)
    assert work(run, "merge") == Exit.FAILED
    weights.write_bytes(left)
    assert work(run, "merge") == 0
    shutil.copyfile(run / "sft" / "adapter" / WEIGHTS, run / "merge" / "model" / "adapter" / WEIGHTS)
    assert work(run, "verify") == Exit.FAILED, "what is released with the weights is judged, too"
    assert failure(run, "verify")["reason"] == "the adapter is not the one that dpo has left"


@pytest.mark.parametrize(
    ("start", "origin", "loaded"),
    [("", "", None), ('start = "r"\n', "", "start"), ("", "sft", "sft/adapter"), ("", "base", None)],
)
def test_the_margin_is_measured_from_what_the_last_stage_went_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: str, origin: str, loaded: str | None
) -> None:
    sft = '[[stages]]\nmethod = "sft"\ndataset = "d"\n' if origin == "sft" else ""
    last = f'[[stages]]\nmethod = "dpo"\ndataset = "e"\nfrom = "{origin}"\n'
    recipe = parse_recipe(f'{start}name = "a"\nbase = "b"\n{sft}{last}')
    seen: list[Any] = []

    class Model:
        disable_adapter = staticmethod(lambda: contextlib.nullcontext(seen.append(None)))
        load_adapter = staticmethod(lambda path, name, **_: seen.append(path))
        set_adapter = staticmethod(lambda name: None)

    monkeypatch.setattr(merge, "score", lambda *_: SimpleNamespace(logps=torch.zeros(1)))
    merge._before_last_stage(Model(), tmp_path, recipe, [object()])  # type: ignore[list-item]
    assert seen == [tmp_path / loaded if loaded else None]
