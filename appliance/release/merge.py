"""The merge stage: base weights plus adapter, as files that differ from the base's in their values only."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from appliance.home import Home, building, require_space
from appliance.models import model_path
from appliance.release.held_out import score, yardstick
from appliance.release.weights import Update, merged, read_update, require_mergeable, shards, write_weights
from appliance.train.model import (
    load_adapter,
    load_model,
    load_tokenizer,
    quantised_modules,
    release_memory,
    stop_token_ids,
)
from appliance.train.recipe import Recipe

SIXTEEN_BIT = "16-bit"
DEQUANTISED = "dequantised"
_OURS = frozenset({"source.json", "generation_config.json"})


def merge_stage(home: Home, run: Path, recipe: Recipe) -> dict[str, Any]:
    """Leave the release's files in `merge/model/` of the run; returns the stage's figures.

    A QLoRA adapter was trained on rounded weights: it is merged into the base as published and as rounded, and
    whichever has the lower held-out loss is kept. Raises NoSpace, InvalidInput for a base that cannot be merged.
    """
    base = model_path(home, recipe.base)
    target = run / "merge" / "model"
    shutil.rmtree(target, ignore_errors=True)
    require_space(run, sum(path.stat().st_size for path in base.iterdir() if path.is_file()), "merging")
    with building(target) as folder:
        _copy_files(base, folder, weights=not recipe.stages)
        _write_generation_config(base, folder)
        figures = _merge(home, run, recipe, base, folder) if recipe.stages else {"kept": SIXTEEN_BIT, "losses": {}}
        figures["files"] = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    figures["base_weights"] = {path.name: _sha256(path) for path in shards(base)}
    return figures


def rounded_weights(base: Path) -> set[str]:
    """Names of the weights that QLoRA trained on in NF4."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, local_files_only=True))
    return {f"{module}.weight" for module in quantised_modules(model)}


def last_adapter(run: Path, recipe: Recipe) -> Path:
    """The adapter that the run's last training stage has left."""
    return run / recipe.stages[-1].name / "adapter"


def _merge(home: Home, run: Path, recipe: Recipe, base: Path, folder: Path) -> dict[str, Any]:
    update = read_update(last_adapter(run, recipe))
    quantised = recipe.adapter.kind == "qlora"
    rounded: dict[str, set[str]] = {SIXTEEN_BIT: set()}
    if quantised:
        rounded[DEQUANTISED] = rounded_weights(base)
    require_mergeable(base, update, set().union(*rounded.values()))

    tokenizer = load_tokenizer(base)
    rows = yardstick(home, recipe, tokenizer).render(tokenizer)
    trained = load_adapter(load_model(base, quantised=quantised), last_adapter(run, recipe), trainable=False)
    losses = {"adapter": score(trained.eval(), rows).loss}
    del trained
    for candidate, weights in rounded.items():
        losses[candidate] = _written_loss(base, folder, update, weights, rows)
    kept = min(rounded, key=losses.__getitem__)
    if kept != list(rounded)[-1]:
        write_weights(base, folder, merged(update, rounded[kept]))
    return {"kept": kept, "losses": losses, "rows": len(rows)}


def _written_loss(base: Path, folder: Path, update: Update, rounded: set[str], rows: list[Any]) -> float:
    """Write one candidate's weights, and score them as they were written."""
    release_memory()
    write_weights(base, folder, merged(update, rounded))
    return score(load_model(folder), rows).loss


def _copy_files(base: Path, folder: Path, *, weights: bool) -> None:
    """The base's files as published; its weights, where they stay as they are, as further names of the same files."""
    for path in base.iterdir():
        if not path.is_file() or path.name in _OURS:
            continue
        if path.suffix != ".safetensors":
            shutil.copyfile(path, folder / path.name)
        elif weights:
            try:
                os.link(path.resolve(), folder / path.name)
            except OSError:
                shutil.copyfile(path, folder / path.name)


def _write_generation_config(base: Path, folder: Path) -> None:
    """The base's generation settings with every token that ends an answer."""
    path = base / "generation_config.json"
    config = json.loads(path.read_bytes()) if path.exists() else {}
    config["eos_token_id"] = stop_token_ids(load_tokenizer(base), base)
    (folder / path.name).write_text(json.dumps(config, indent=2) + "\n")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
