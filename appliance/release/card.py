"""The model card of a release: what it is, what it was made of, and what was measured. No torch here."""

from __future__ import annotations

import json
from typing import Any

from appliance.release.manifest import Manifest
from appliance.train.recipe import Recipe, dump_recipe


def model_card(manifest: Manifest, source: dict[str, Any]) -> str:
    """The card as Markdown. `source` is the base's source.json: where it came from and under which licence."""
    origin = str(source.get("source", ""))
    licence = str(source.get("licence", ""))
    repository = origin.removeprefix("hub:").partition("@")[0] if origin.startswith("hub:") else ""
    head = {
        "base_model": repository or manifest.base,
        "license": licence or "other",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    front_matter = "\n".join(f"{key}: {json.dumps(value)}" for key, value in head.items())
    gates = "\n".join(
        f"| {name} | {'passed' if gate['passed'] else 'not passed'} | {_cell(gate['reason'])} |"
        for name, gate in manifest.gates.items()
    )
    losses = "\n".join(f"| {_cell(name)} | {loss:.4f} |" for name, loss in manifest.merge["losses"].items())
    datasets = "\n".join(
        f"- {stage}: `{id}` (SHA-256 of its rows `{manifest.dataset_rows[id]}`)"
        for stage, id in manifest.datasets.items()
    )
    warnings = "".join(
        f"- Warning: {_cell(line)}\n" for figures in manifest.stages.values() for line in figures.get("warnings", ())
    )
    recipe = dump_recipe(Recipe.model_validate(manifest.recipe))
    return f"""---
{front_matter}
---

# {manifest.release}

{manifest.base}, fine-tuned and merged. State: {manifest.state}, {manifest.reason}.

## Base

{manifest.base}{f" from {origin}" if origin else ""}. Licence of the base: {licence or "not stated by its source"}.

{_lineage(manifest)}## Data

{datasets or "None: these are the weights of the base, or of an adapter that was trained elsewhere."}

## Figures

| gate | outcome | figure |
|---|---|---|
{gates}

Kept: the merge into the {manifest.merge["kept"]} base. {manifest.merge.get("trained_on", "")}

| loss over {_conversations(manifest.merge)} of | nats a token |
|---|---|
{losses or "| nothing was trained | |"}

{warnings}{_probed(manifest)}
All figures and the SHA-256 of every file are in `manifest.json`.

## Recipe

```toml
{recipe}```
"""


def _lineage(manifest: Manifest) -> str:
    """Which release this one goes on with; empty: none."""
    start = manifest.recipe.get("start")
    if not start:
        return ""
    return f"## Lineage\n\nGoes on with the adapter of {start['release']} (SHA-256 `{start['sha256']}`).\n\n"


def _probed(manifest: Manifest) -> str:
    """On which engine gates 3 and 4 were measured, and in which precision that serves; empty: nothing says so."""
    reference = manifest.reference
    if "precision" not in reference:
        return ""
    how = " (weights of linear layers in 8 bits, the others in 16)" if reference["precision"] == "FP8" else ""
    return f"\nProbed and served by {reference['engine']} in {reference['precision']}{how}.\n"


def _conversations(merge: dict[str, Any]) -> str:
    """How many held-out conversations the losses of a merge are over, as far as it says."""
    return f"{merge['rows']} held-out conversations, {merge['tokens']} tokens," if "rows" in merge else "held-out rows"


def _cell(text: str) -> str:
    """Text that stays in its cell of a table."""
    return " ".join(text.replace("|", "/").split())
