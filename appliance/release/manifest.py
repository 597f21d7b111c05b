"""The manifest, which makes model files a release: all gates, what it was made of, and by what. No torch here."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from appliance.api import Precision
from appliance.archive import CARD
from appliance.data.tokenizer import TemplateSettings
from appliance.errors import ApplianceError, Conflict, InvalidInput, NotFound
from appliance.home import Home, json_bytes, sha256, write_json
from appliance.release.gates import GATES, verdicts
from appliance.train.recipe import THINKS, Recipe, parse_recipe

MANIFEST = "manifest.json"
SIXTEEN_BIT, DEQUANTISED = "16-bit", "dequantised"
"""The form of the base that an adapter was merged into."""
ALL_PASSED = f"all {len(GATES)} gates passed"
_ACCEPTED = "accepted by the operator in spite of "


@dataclass(frozen=True)
class Manifest:
    """What manifest.json holds."""

    release: str
    state: Literal["verified", "refused"]
    reason: str
    """One line: that every gate has passed, or why those that have not did not."""
    created: float
    base: str
    datasets: dict[str, str]
    """Dataset id of each training stage."""
    dataset_rows: dict[str, str]
    """SHA-256 of the canonical rows of each dataset, by id."""
    gates: dict[str, dict[str, Any]]
    """`passed`, `figures` and `reason` of each of the five."""
    merge: dict[str, Any]
    """Which base the adapter was merged into, and the held-out losses that decided it."""
    stages: dict[str, dict[str, Any]]
    """Figures of each training stage."""
    files: dict[str, str]
    """SHA-256 of every other file of the release."""
    base_files: dict[str, str]
    """SHA-256 of every file of the base."""
    recipe: dict[str, Any]
    recipe_sha256: str
    versions: dict[str, str]
    reference: dict[str, Any] = field(default_factory=dict)
    """What the engine that was probed answered greedily: its kind (`engine`), the `precision` in which it serves, and
    `answers` to `messages`."""
    accepted: dict[str, float] = field(default_factory=dict)
    """Gates that did not pass and that the operator accepted by name, and when."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True)


class _Outcome(_Strict):
    passed: bool
    figures: dict[str, Any]
    reason: str


class _Asked(_Strict):
    messages: list[dict[str, Any]] = Field(min_length=1)
    text: str


class _Reference(_Strict):
    engine: str = ""
    precision: Precision = "16-bit"
    answers: list[_Asked] = []


class _Foreign(_Strict):
    """What a manifest has to hold within, where nobody here has written it."""

    gates: dict[str, _Outcome]
    recipe: Recipe
    reference: _Reference = _Reference()
    accepted: dict[Literal["quality"], float] = {}


_TYPES = TypeAdapter(Manifest)


def accept_quality(home: Home, release_id: str, recorded: str, refusal: str) -> Manifest:
    """Verify a release that only gate 5 has refused, because the operator says so, and say so in its manifest.

    This is the one change that a manifest ever sees; the files that it lists stay as they are. Safe to repeat.
    `recorded` is the hash of the manifest that refused it, empty where that is not known, and `refusal` the reason that
    is recorded. Raises NotFound, and Conflict where the manifest is another, or something else has refused the release:
    another gate, or what was seen of it since.
    """
    folder = home.releases / release_id
    for left_by_a_kill in folder.glob(".*.tmp"):
        left_by_a_kill.unlink()
    content = read_manifest(home, release_id)
    manifest = Manifest(**content)
    not_acceptable = Conflict(
        "not_acceptable",
        f"release {release_id} was refused: {refusal}",
        "only what its quality gate, and nothing else, has refused can be accepted",
    )
    if refusal != manifest.reason.removeprefix(_ACCEPTED):
        raise not_acceptable
    before = sha256(folder / MANIFEST)
    if manifest.accepted:
        refused = {"state": "refused", "reason": manifest.reason.removeprefix(_ACCEPTED), "accepted": {}}
        before = hashlib.sha256(json_bytes(content | refused)).hexdigest()
    if recorded and before != recorded:
        raise Conflict(
            "damaged_release",
            f"release {release_id} is damaged: {MANIFEST} is not the one that was recorded",
            "restore it, or train again",
        )
    if [name for name, gate in manifest.gates.items() if not gate["passed"]] != ["quality"]:
        raise not_acceptable
    if manifest.accepted:
        return manifest
    now = {"quality": round(time.time(), 3)}
    content |= {"state": "verified", "reason": f"{_ACCEPTED}{manifest.reason}", "accepted": now}
    write_json(folder / MANIFEST, content)
    return Manifest(**content)


def read_manifest(home: Home, release_id: str) -> dict[str, Any]:
    """The manifest of a release as it is on disk. Raises NotFound, and ApplianceError for one that is damaged."""
    try:
        content = (home.releases / release_id / MANIFEST).read_bytes()
        _TYPES.validate_json(content, strict=True)
        manifest: dict[str, Any] = json.loads(content)
    except FileNotFoundError:
        raise NotFound("no_such_release", f"there is no release {release_id}", "see `appliance releases`") from None
    except ValidationError as error:
        raise _damaged(release_id, _fault(error)) from None
    except (OSError, ValueError) as error:
        raise _damaged(release_id, str(error)) from None
    return manifest


def read_foreign(content: bytes, engine: str) -> Manifest:
    """The manifest of an archive, as one that was made here would be down to every field.

    Raises InvalidInput naming the field that is not, also where the release was made on the kind of `engine` that is
    here and has no answers that it could be asked for.
    """
    try:
        manifest = _TYPES.validate_json(content, strict=True)
        why = _contradiction(manifest, json.loads(content), _Foreign.model_validate_json(content), engine)
    except ValidationError as error:
        why = _fault(error)
    except ValueError as error:
        why = str(error)
    if why:
        message = f"the release cannot be imported: its manifest is none of a release: {why}"
        raise InvalidInput("bad_archive", message, "export it again on the box that made it")
    return manifest


def _contradiction(manifest: Manifest, content: dict[str, Any], within: _Foreign, engine: str) -> str:
    """Which field cannot be beside the others; empty: none."""
    failed = [name for name in GATES if name in within.gates and not within.gates[name].passed]
    accepted = bool(within.accepted)
    state = "refused" if failed and not accepted else "verified"
    gates = {name: gate.model_dump() for name, gate in within.gates.items()}
    reason = f"{_ACCEPTED * accepted}{refusal(gates)}" if failed else ALL_PASSED
    if unknown := min(content.keys() - {each.name for each in fields(Manifest)}, default=""):
        return f"{unknown!r} is no field of it"
    if within.gates.keys() != set(GATES):
        return f"'gates' has to hold {', '.join(GATES)}"
    if accepted and failed != ["quality"]:
        return "'accepted' is not the gate that failed"
    if manifest.state != state:
        return f"'state' is {manifest.state}, and its gates say {state}"
    if manifest.reason != reason:
        return "'reason' is not what its gates say"
    if manifest.base != within.recipe.base:
        return "'base' is not that of its recipe"
    if within.reference.engine == engine and not within.reference.answers:
        return "it has no reference answers to be repeated ('reference')"
    try:
        clock_of(content)
    except (ValueError, TypeError, OverflowError, OSError):
        return "'created' or 'recipe.clock' is no day"
    return ""


def _fault(error: ValidationError) -> str:
    """The first thing that is wrong, in a few words."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"it lacks {where!r}"
    return f"{where!r} is not valid: {first['msg']}" if where else str(first["msg"])


def _damaged(release_id: str, why: str) -> ApplianceError:
    return ApplianceError(
        "bad_manifest",
        f"the manifest of release {release_id} cannot be read: {why}",
        "make or import the release again; what it was is not proven any more",
    )


def clock_of(manifest: dict[str, Any]) -> date:
    """The day that a release's chat template takes for today: that of its run, else the day on which it was made."""
    day = manifest["recipe"].get("clock")
    return date.fromisoformat(day) if day else date.fromtimestamp(manifest["created"])


def template_of(manifest: dict[str, Any]) -> TemplateSettings:
    """What a release's chat template is told."""
    return TemplateSettings(today=clock_of(manifest), thinking=THINKS.get(manifest["recipe"].get("thinking", "auto")))


def same_but_for_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether an engine that has read the one release need read nothing but weights to serve the other.

    Both are manifests; an empty one is like no other.
    """
    return bool(one) and bool(other) and _read_at_start(one) == _read_at_start(other)


def manifest_to_be(run: Path) -> dict[str, Any]:
    """What of a run's manifest `same_but_for_weights` asks for, once its model is merged; empty before."""
    result = run / "merge" / "result.json"
    if not result.exists():
        return {}
    recipe = parse_recipe((run / "recipe.toml").read_text())
    return {"files": _read(result)["files"], "recipe": recipe.model_dump(mode="json", exclude_none=True)}


def _read_at_start(manifest: dict[str, Any]) -> dict[str, str]:
    """Hashes of the configuration, the tokenizer and the template, and whether that has the model think."""
    weights = (".safetensors", ".safetensors.index.json", CARD)
    read = {name: hash for name, hash in manifest["files"].items() if not name.endswith(weights) and "/" not in name}
    return read | {"thinking": manifest["recipe"].get("thinking", "auto")}


def refusal(gates: dict[str, dict[str, Any]]) -> str:
    """Why the gates that did not pass did not, in their order; of those that were measured, if any was."""
    failed = [name for name, passed in verdicts(gates).items() if not passed]
    return "; ".join(f"{name}: {gates[name]['reason']}" for name in failed or gates if not gates[name]["passed"])


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content
