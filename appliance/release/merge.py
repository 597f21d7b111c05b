"""The merge stage: base weights plus adapter, as files that differ from the base's in their values only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from appliance.adapters import CONFIG
from appliance.data.dataset import ROWS
from appliance.data.render import Conversation
from appliance.data.tokenizer import load_tokenizer
from appliance.home import Home, building, copy_file, hashes, require_space, sha256, write_json
from appliance.models import SOURCE, in_mxfp4, model_path
from appliance.release.adapter import read_changes, require_complete, require_trained, rounded_changes
from appliance.release.fidelity import Measured
from appliance.release.held_out import held_out_set, last_stage_rows, render, render_answered
from appliance.release.manifest import DEQUANTISED, SIXTEEN_BIT
from appliance.release.scores import score
from appliance.release.streaming import load_to_score
from appliance.release.weights import write_weights
from appliance.train.model import ON_GPU, load_adapter, load_model, release_memory, stop_token_ids
from appliance.train.recipe import Recipe

_EXPERTS_DEQUANTISED = (
    "The experts of the base are in MXFP4, and so they are here; the adapter was trained on their de-quantised values."
)

OURS = frozenset({"source.json", "generation_config.json", "README.md", "manifest.json"})
"""Files of the base that a release has not, or has of its own."""
GENERATION_CONFIG = "generation_config.json"
SCORES = "scores.safetensors"
"""What the adapter says of the conversations that the merged files are judged on."""


def merge_stage(home: Home, run: Path, recipe: Recipe) -> dict[str, Any]:
    """Leave the release's files in `merge/model/` of the run; returns the stage's figures.

    A QLoRA adapter was trained on rounded weights: it is merged into the base as published and as rounded, and
    whichever has the lower held-out loss is kept. Raises NoSpace, InvalidInput for a base that cannot be merged.
    """
    base = model_path(home, recipe.base)
    target = run / "merge" / "model"
    shutil.rmtree(target, ignore_errors=True)
    require_space(run, sum(path.stat().st_size for path in base.iterdir() if path.is_file()), "merging")
    scores = run / "merge" / SCORES
    try:
        with building(target) as folder:
            _copy_files(base, folder, weights=not recipe.changes_weights)
            (folder / GENERATION_CONFIG).write_text(json.dumps(generation_config(base), indent=2) + "\n")
            figures = {"kept": SIXTEEN_BIT, "losses": {}}
            if recipe.changes_weights:
                _copy_adapter(recipe.last_adapter(run), folder / "adapter", base)
                figures, measured = _merge(home, run, recipe, base, folder)
                figures |= {"trained_on": _EXPERTS_DEQUANTISED} if in_mxfp4(base) else {}
                measured.save(scores)
            figures["files"] = hashes(folder)
    except BaseException:
        scores.unlink(missing_ok=True)
        raise
    figures["base_files"] = hashes(base)
    rows = {id: sha256(home.datasets / id / ROWS) for id in recipe.datasets.values()}
    return {**figures, "dataset_rows": rows, "recipe_sha256": sha256(run / "recipe.toml")}


def _merge(home: Home, run: Path, recipe: Recipe, base: Path, folder: Path) -> tuple[dict[str, Any], Measured]:
    adapter = recipe.last_adapter(run)
    require_trained(adapter, run, recipe)
    changes = read_changes(adapter, base)
    if recipe.given:
        require_complete(adapter, base)
    candidates = {SIXTEEN_BIT: changes}
    if recipe.quantised:
        candidates[DEQUANTISED] = rounded_changes(base, changes)

    tokenizer = load_tokenizer(base, recipe.template)
    chosen = render(tokenizer, held_out_set(home, recipe, tokenizer).conversations)
    answered = last_stage_rows(home, recipe, tokenizer)
    conversations = [*chosen, *render_answered(tokenizer, answered)]
    as_trained = load_model(base, quantised=True) if recipe.quantised else load_to_score(base)
    model = load_adapter(as_trained, adapter, trainable=False).eval()
    trained = merged_into = score(model, conversations)
    judged = conversations[len(chosen) :] if any(answer.sign for answer in answered) else []
    reference = _before_last_stage(model, run, recipe, judged)
    del model, as_trained
    losses = {"adapter": trained.part(0, len(chosen)).loss}
    for candidate, its_changes in candidates.items():
        release_memory()
        write_weights(base, folder, its_changes)
        losses[candidate] = score(load_to_score(folder), chosen).loss
    kept = min(candidates, key=losses.__getitem__)
    release_memory()
    if kept != list(candidates)[-1]:
        write_weights(base, folder, candidates[kept])
    if recipe.quantised and kept == SIXTEEN_BIT:
        model = load_adapter(load_to_score(base), adapter, trainable=False).eval()
        merged_into = score(model, conversations, trained.ids)
        reference = _before_last_stage(model, run, recipe, judged)
    figures = {
        "kept": kept,
        "on": "gpu" if ON_GPU else "cpu",
        "losses": losses,
        "rows": len(chosen),
        "tokens": int(trained.tokens[: len(chosen)].sum()),
    }
    return figures, Measured(trained, merged_into, reference)


def _before_last_stage(model: Any, run: Path, recipe: Recipe, conversations: list[Conversation]) -> torch.Tensor:
    """[tokens] What the last stage began with says: `model` with the adapter that it went on with, or without any."""
    if not conversations:
        return torch.empty(0)
    before = recipe.starting_adapter(run, recipe.stages[-1].name)
    if before is None:
        with model.disable_adapter():
            return score(model, conversations).logps
    model.load_adapter(before, "before", local_files_only=True)
    model.set_adapter("before")
    return score(model, conversations).logps


def _copy_adapter(adapter: Path, target: Path, base: Path) -> None:
    """The adapter as PEFT loads it, naming its base as other boxes know it instead of a path on this one."""
    shutil.copytree(adapter, target)
    config = json.loads((target / CONFIG).read_bytes())
    source = json.loads((base / SOURCE).read_bytes()) if (base / SOURCE).exists() else {}
    origin = str(source.get("source", ""))
    published = origin.removeprefix("hub:").partition("@")[0] if origin.startswith("hub:") else base.name
    write_json(target / CONFIG, {**config, "base_model_name_or_path": published})


def _copy_files(base: Path, folder: Path, *, weights: bool) -> None:
    """The base's files as published, and its `weights` where they stay as they are."""
    for path in base.iterdir():
        if path.is_file() and path.name not in OURS and (weights or path.suffix != ".safetensors"):
            copy_file(path, folder / path.name)


def generation_config(base: Path) -> dict[str, Any]:
    """The base's generation settings with every token that ends an answer."""
    path = base / GENERATION_CONFIG
    config = json.loads(path.read_bytes()) if path.exists() else {}
    return {**config, "eos_token_id": stop_token_ids(load_tokenizer(base), base)}
