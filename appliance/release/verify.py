"""The verify stage: what can be measured on the files of a release without an engine, and the probes for the engine."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from appliance.data.tokenizer import load_tokenizer
from appliance.errors import NotFound
from appliance.home import Home, write_json
from appliance.models import model_path
from appliance.release.adapter import read_changes, rounded_changes
from appliance.release.base_answers import ask_base
from appliance.release.gates import Gate
from appliance.release.held_out import Score, Yardstick, score, yardstick
from appliance.release.manifest import DEQUANTISED
from appliance.release.merge import OURS
from appliance.release.probes import make_probes
from appliance.release.weights import layout, pairs
from appliance.train.events import EventLog
from appliance.train.model import load_model, release_memory, stop_token_ids
from appliance.train.recipe import Recipe

QUALITY_SLACK = 1e-3
"""Nats a token by which a release may be worse than the live one: less than what rounding makes of equal weights."""


def verify_stage(home: Home, run: Path, recipe: Recipe, events: EventLog, live: str) -> dict[str, Any]:
    """Judge gates 1, 2 and 5 on `merge/model/` of the run and write `verify/probes.json`; returns the stage's figures.

    `live` is the id of the release that answers now, or empty. Raises NotFound where that release has no files.
    """
    base = model_path(home, recipe.base)
    model_folder = run / "merge" / "model"
    merge = json.loads((run / "merge" / "result.json").read_bytes())
    tokenizer = load_tokenizer(base, recipe.clock)
    probes = make_probes(home, recipe, tokenizer)
    if recipe.only_nudges:
        probes = ask_base(base, tokenizer, probes, events)
    write_json(run / "verify" / "probes.json", [asdict(probe) for probe in probes])

    gates = {"structure": judge_structure(run, recipe, base, model_folder, merge["kept"])}
    if not gates["structure"].passed:
        unmeasured = Gate(False, {}, "not measured, because the structure is wrong")
        gates |= {"fidelity": unmeasured, "quality": unmeasured}
    elif not recipe.changes_weights:
        gates["fidelity"] = Gate(True, {}, "nothing was trained: the release is the base")
        gates["quality"] = Gate(True, {}, "no held-out rows to compare on")
    else:
        measure = yardstick(home, recipe, tokenizer)
        own = score(load_model(model_folder), measure.render(tokenizer))
        gates["fidelity"] = judge_fidelity(
            own, merge["losses"]["adapter"], recipe.fidelity_tolerance, may_be_better=recipe.quantised
        )
        gates["quality"] = _compare(home, live, measure, own)
    for name, gate in gates.items():
        events.append("gate", "verify", gate=name, **asdict(gate))
    return {"gates": {name: asdict(gate) for name, gate in gates.items()}}


def judge_structure(run: Path, recipe: Recipe, base: Path, model: Path, kept: str) -> Gate:
    """Gate 1: tensors laid out as the base's, all finite, changed where the recipe changes them and nowhere else."""
    if reason := _differing_file(base, model):
        return Gate(False, {}, reason)
    expected, found = layout(base), layout(model)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            was, now = expected.get(name, "absent"), found.get(name, "absent")
            return Gate(False, {"tensor": name}, f"{name} is {now} in the release, {was} in the base")
    changes = read_changes(recipe.last_adapter(run), base) if recipe.changes_weights else {}
    must = changes.keys()
    may = rounded_changes(base, changes).keys() if kept == DEQUANTISED else must
    changed = set()
    for name, before, after in pairs(base, model):
        if not torch.isfinite(after).all():
            return Gate(False, {"tensor": name}, f"{name} holds values that are not finite")
        if not torch.equal(before, after):
            changed.add(name)
    figures = {"tensors": len(found), "targeted": len(must), "changed": len(changed)}
    if must - changed:
        return Gate(False, figures, f"{len(must - changed)} targeted weights are unchanged, as {min(must - changed)}")
    if changed - may:
        return Gate(False, figures, f"{len(changed - may)} other weights are changed, as {min(changed - may)}")
    return Gate(True, figures, f"{len(found)} tensors as in the base, {len(must)} of {len(must)} targeted ones changed")


def _differing_file(base: Path, model: Path) -> str:
    """What is wrong with the files beside the weights; empty where tokenizer, template and settings are the base's."""
    for path in sorted(base.iterdir()):
        if not path.is_file() or path.suffix == ".safetensors" or path.name in OURS:
            continue
        if not (model / path.name).is_file() or (model / path.name).read_bytes() != path.read_bytes():
            return f"{path.name} is not the base's"
    said = json.loads((model / "generation_config.json").read_bytes())["eos_token_id"]
    missing = sorted(set(stop_token_ids(load_tokenizer(base), base)) - set(said if isinstance(said, list) else [said]))
    return f"generation_config.json lacks the end-of-turn tokens {missing}" if missing else ""


def judge_fidelity(own: Score, adapter_loss: float, tolerance: float, *, may_be_better: bool) -> Gate:
    """Gate 2: the merged weights are as good as the adapter on the base that it was trained on.

    Merged into the very base that it was trained on they are neither worse nor better; into a less rounded one,
    they `may_be_better`.
    """
    figures = {"adapter_loss": adapter_loss, "merged_loss": own.loss, "tolerance": tolerance}
    apart = own.loss - adapter_loss
    passed = apart <= tolerance and (may_be_better or apart >= -tolerance)
    comparison = f"held-out loss {own.loss:.4f} merged, {adapter_loss:.4f} with the adapter"
    return Gate(passed, figures, comparison if passed else f"{comparison}: more than {tolerance} apart")


def _compare(home: Home, live: str, measure: Yardstick, own: Score) -> Gate:
    """Gate 5 against the live release's files, rendered by its own tokenizer."""
    if not live:
        return Gate(True, {}, "no live release to compare with")
    if not measure.held_out:
        return Gate(True, {}, "no held-out rows to compare on")
    folder = home.releases / live
    if not folder.is_dir():
        raise NotFound("no_such_release", f"the live release {live} has no files", "promote another release")
    release_memory()
    return judge_quality(own, score(load_model(folder), measure.render(load_tokenizer(folder))), live)


def judge_quality(own: Score, live: Score, live_id: str) -> Gate:
    """Gate 5: no worse than the live release on the same text, whose nats are shared out over our number of tokens."""
    live_loss = live.nats / own.tokens
    figures = {"loss": own.loss, "live_loss": live_loss, "live": live_id}
    passed = own.loss <= live_loss + QUALITY_SLACK
    comparison = f"held-out loss {own.loss:.4f}, {live_loss:.4f} of the live release {live_id}"
    return Gate(passed, figures, comparison if passed else f"{comparison}: worse")
