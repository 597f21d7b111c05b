"""The gates of a release once more, on this box and on the release's own files. No torch but in `recheck_stage`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from appliance.adapters import WEIGHTS
from appliance.errors import Conflict, InvalidInput
from appliance.home import Home, sha256
from appliance.models import base_hashes, model_path
from appliance.release.gates import verdicts
from appliance.release.held_out import judged_on
from appliance.release.integrity import Reading, examine
from appliance.release.manifest import DEQUANTISED, Manifest, clock_of, read_manifest
from appliance.train.events import EventLog
from appliance.train.recipe import Given, Recipe

_LONGEST_NAME = 50
_WITHOUT_DATA = " (on plain conversations, because its dataset is not on this box)"


def plan_recheck(home: Home, release: str) -> Recipe:
    """The recipe of a run that repeats the gates of a release: that of `appliance merge` for the release's adapter.

    Its base has to be on this box. Its dataset may be; without it the models are compared on plain conversations.
    Raises NotFound without the base, and Conflict where that is another, or the release was refused by its own gates.
    """
    manifest = read_manifest(home, release)
    if manifest["state"] != "verified":
        refused = f"release {release} was refused: {manifest['reason']}"
        raise Conflict("refused_release", refused, f"see `appliance releases {release}`")
    try:
        made_by = Recipe.model_validate(manifest["recipe"])
    except ValidationError:
        raise InvalidInput(
            "other_recipe", f"the recipe of release {release} is of another version", "import or train it again"
        ) from None
    base = base_hashes(model_path(home, manifest["base"]))
    if differing := min((name for name, hash in base.items() if manifest["base_files"].get(name) != hash), default=""):
        raise Conflict(
            "another_base",
            f"release {release} was made of another {manifest['base']} than is on this box: {differing} differs",
            "pull the one that its manifest names under another home, or leave it verified as it is",
        )
    given = None
    if (adapter := home.releases / release / "adapter" / WEIGHTS).exists():
        dataset, _ = judged_on(made_by) or ("", 0)
        here = dataset if dataset and (home.datasets / dataset).exists() else ""
        given = Given(sha256=sha256(adapter), quantised=made_by.quantised, dataset=here, nudges=made_by.only_nudges)
    name = f"{release[:_LONGEST_NAME]}-gates"
    return made_by.model_copy(
        update={
            "name": name,
            "promote": False,
            "stages": (),
            "start": None,
            "given": given,
            "rechecks": release,
            "clock": clock_of(manifest),
        }
    )


def write_recheck(home: Home, directory: Path, recipe: Recipe, release: str) -> None:
    """Fill the directory of such a run."""
    if recipe.given:
        shutil.copytree(home.releases / release / "adapter", directory / "adapter")
        if not recipe.given.dataset and read_manifest(home, release)["datasets"]:
            message = f"no dataset of {release} is on this box: the models are compared on plain conversations"
            EventLog(directory / "events.jsonl").append("warning", "merge", code="no_dataset", message=message)


def recheck_stage(home: Home, run: Path, recipe: Recipe) -> dict[str, Any]:
    """Merge as ever, so that there is something to compare with; then let `merge/model/` be the release's own files."""
    from appliance.release.merge import merge_stage

    release, model = str(recipe.rechecks), run / "merge" / "model"
    if model.is_symlink():
        model.unlink()
    # Damage is no verdict of the gates: it is to be found as such.
    if damage := examine(home.releases / release, "", {}, Reading(from_disk=True)).damage:
        raise Conflict("damaged_release", f"{release} is damaged: {damage}", f"`appliance verify {release}` records it")
    figures = merge_stage(home, run, recipe)
    manifest = read_manifest(home, release)
    on = manifest["merge"].get("on", figures.get("on"))
    if figures["kept"] == DEQUANTISED and on != figures["on"]:
        raise Conflict(
            "another_merge",
            f"{release} was merged on a {on}, which rounds a base to 4 bits otherwise than the {figures['on']} here",
            f"repeat its gates on a box with a {on}",
        )
    if figures["kept"] != (kept := manifest["merge"]["kept"]):
        raise Conflict(
            "another_merge",
            f"{release} was merged into the {kept} base, and here the {figures['kept']} one is better",
            "repeat its gates on a box like the one that made it",
        )
    shutil.rmtree(model)
    model.symlink_to(home.releases / release)
    return {**figures, "files": manifest["files"]}


def conclude_recheck(found: Manifest, manifest: dict[str, Any]) -> tuple[Literal["passed", "noted", "refused"], str]:
    """What becomes of a release with that `manifest` whose gates were `found` to be so here, and what is said of it.

    One that fails another gate than quality is refused. That one depends on what is live meanwhile.
    """
    failed = [name for name, passed in verdicts(found.gates).items() if not passed]
    said = f"repeated here, {found.reason}{'' if found.datasets or not manifest['datasets'] else _WITHOUT_DATA}"
    return ("noted" if failed == ["quality"] else "refused") if failed else "passed", said
