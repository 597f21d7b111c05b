"""The verify stage: what can be measured on the files of a release without an engine, and the probes for the engine."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from appliance.data.render import Rendered
from appliance.data.tokenizer import load_tokenizer
from appliance.errors import ApplianceError
from appliance.home import Home, write_json
from appliance.models import model_path
from appliance.release.fidelity import TIMES_NOISE, Measured, judge_fidelity, shake
from appliance.release.gates import SERVED, Gate, Scored, Served
from appliance.release.held_out import (
    HeldOutSet,
    held_out_set,
    judged_on,
    last_stage_rows,
    render_answered,
)
from appliance.release.manifest import DEQUANTISED, clock_of, read_manifest
from appliance.release.merge import SCORES
from appliance.release.oracle import Oracle
from appliance.release.probes import make_probes
from appliance.release.quality import Comparison, judge_quality
from appliance.release.scores import Scores, score
from appliance.release.structure import judge_structure
from appliance.release.weights import DTYPES, layout
from appliance.train.events import EventLog
from appliance.train.model import DTYPE, load_model, release_memory
from appliance.train.recipe import Recipe

SERVED_CONVERSATIONS = 16
LEAST_SERVED = 0.02
"""Nats by which an engine's kernels alone may set its log-probabilities apart."""


def verify_stage(home: Home, run: Path, recipe: Recipe, events: EventLog, live: str) -> dict[str, Any]:
    """Judge gates 1, 2 and 5 on `merge/model/` of the run and write `verify/probes.json`; returns the stage's figures.

    `live` is the id of the release that answers now, or empty: then the base is what the release is compared with.
    """
    base = model_path(home, recipe.base)
    model_folder = run / "merge" / "model"
    tokenizer = load_tokenizer(base, recipe.clock)
    write_json(run / "verify" / "probes.json", [asdict(probe) for probe in make_probes(home, recipe, tokenizer)])

    oracle = None
    if recipe.changes_weights:
        kept = json.loads((run / "merge" / "result.json").read_bytes())["kept"]
        oracle = Oracle(recipe.last_adapter(run), base, rounded=kept == DEQUANTISED)
    gates = {"structure": judge_structure(base, model_folder, oracle)}
    if not gates["structure"].passed:
        unmeasured = Gate(False, {}, "not measured, because the structure is wrong")
        gates |= {"fidelity": unmeasured, "quality": unmeasured}
    elif oracle is None:
        gates["fidelity"] = Gate(True, {}, "nothing was trained: the release is the base")
        gates["quality"] = Gate(True, {}, "nothing was trained: the release is the base")
    else:
        gates |= _measure(home, run, recipe, tokenizer, live, oracle.parameters)
    for name, gate in gates.items():
        events.append("gate", "verify", gate=name, **asdict(gate))
    return {"gates": {name: asdict(gate) for name, gate in gates.items()}}


def _measure(home: Home, run: Path, recipe: Recipe, tokenizer: Any, live: str, parameters: set[str]) -> dict[str, Gate]:
    """Gates 2 and 5: what the merged model says of conversations, and what others say of them."""
    measured = Measured.load(run / "merge" / SCORES)
    chosen, answered = held_out_set(home, recipe, tokenizer), last_stage_rows(home, recipe, tokenizer)
    conversations = [*chosen.render(tokenizer), *render_answered(tokenizer, answered)]
    count = len(chosen.conversations)
    lived = _live_set(home, recipe, live)

    model = load_model(run / "merge" / "model")
    own = score(model, conversations, measured.merged_into.ids)
    own_of_live = score(model, lived.render(tokenizer)) if lived else None
    shake(model, parameters, _rounding_step(run / "merge" / "model"))
    noisy = score(model, conversations, own.ids)
    del model
    release_memory()
    write_json(run / "verify" / SERVED, asdict(_served(conversations, measured.merged_into, own, noisy)))
    fidelity = judge_fidelity(measured, own, noisy, [row.sign for row in answered], count)

    rival = _rival(home, recipe, live, chosen)
    comparison = Comparison(own.part(0, count), score(rival.model, rival.conversations))
    remembered = None
    if lived and own_of_live and rival.live:
        remembered = Comparison(own_of_live, score(rival.model, lived.render(rival.tokenizer)))
    quality = judge_quality(rival.name, comparison, plain=chosen.plain, lived=remembered, limit=recipe.forgetting_limit)
    return {"fidelity": fidelity, "quality": quality}


def _served(conversations: list[Rendered], adapter: Scores, own: Scores, noisy: Scores) -> Served:
    """The first conversations, for the engine to say how likely it finds them."""
    some = conversations[:SERVED_CONVERSATIONS]
    logps = torch.split(adapter.logps, adapter.tokens.tolist())
    scored = [
        Scored(row.input_ids, [place for place, trained in enumerate(row.trained) if trained and place], said.tolist())
        for row, said in zip(some, logps, strict=False)
    ]
    noise = float((own.logps - noisy.logps).abs().mean())
    return Served(scored, TIMES_NOISE * noise + LEAST_SERVED)


@dataclass(frozen=True)
class _Rival:
    """The model that the release has to match."""

    name: str
    model: Any
    tokenizer: Any
    conversations: list[Rendered]
    """The held-out set through its own template."""
    live: bool


def _rival(home: Home, recipe: Recipe, live: str, chosen: HeldOutSet) -> _Rival:
    """The live release, else the base.

    A live release that cannot be read, or not be told these conversations, must not keep another from taking its place.
    """
    if live:
        folder = home.releases / live
        try:
            tokenizer = load_tokenizer(folder, clock_of(read_manifest(home, live)))
            rendered = chosen.render(tokenizer)
            return _Rival(f"the live release {live}", load_model(folder), tokenizer, rendered, live=True)
        except ApplianceError as error:
            print(f"the live release is not what this one is compared with: {error}", file=sys.stderr)
    base = model_path(home, recipe.base)
    tokenizer = load_tokenizer(base, recipe.clock)
    return _Rival(f"the base {recipe.base}", load_model(base), tokenizer, chosen.render(tokenizer), live=False)


def _live_set(home: Home, recipe: Recipe, live: str) -> HeldOutSet | None:
    """The live release's own held-out set, where it has one that is here and is another than that of the run."""
    try:
        manifest = read_manifest(home, live)
        its_recipe = Recipe.model_validate(manifest["recipe"])
        if judged_on(its_recipe) in (None, judged_on(recipe)):
            return None
        found = held_out_set(home, its_recipe, load_tokenizer(home.releases / live, clock_of(manifest)))
    except (ApplianceError, ValueError):  # there is none, its dataset is gone, or its recipe is another version's
        return None
    return found if found.held_out else None


def _rounding_step(model: Path) -> float:
    """The distance between neighbours of the coarser of the types in which weights are stored and computed with."""
    stored = {DTYPES[dtype] for _, _, dtype in layout(model).values() if dtype in DTYPES}
    return max(torch.finfo(dtype).eps for dtype in (*stored, DTYPE))
