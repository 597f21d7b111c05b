"""What an engine serves: the files of a release or of a candidate, what its template is told, in which precision."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

from appliance.api import Precision
from appliance.data.tokenizer import TemplateSettings
from appliance.errors import ApplianceError
from appliance.home import Home
from appliance.release.manifest import manifest_to_be, read_manifest, same_but_for_weights, template_of
from appliance.store.releases import Releases
from appliance.supervisor.engines import EngineKind
from appliance.supervisor.references import reference_answers, speaker
from appliance.train.recipe import parse_recipe

UNREADABLE = (ApplianceError, OSError, ValueError, KeyError, TypeError)
"""What reading files raises that are not what they should be."""


class ServedModels:
    """Questions to the files of releases and of runs. Files that cannot be read answer the careful way."""

    def __init__(self, home: Home, kind: EngineKind, releases: Releases) -> None:
        self._home = home
        self._kind = kind
        self._releases = releases

    def directory(self, release: str) -> Path:
        """The model files of a release, or of a run's merged model that is to become one."""
        directory = self._home.releases / release
        return directory if directory.exists() else self._home.runs / release / "merge" / "model"

    def manifest(self, release: str) -> dict[str, Any]:
        """Empty where the release is not recorded yet, or its manifest cannot be read."""
        try:
            return read_manifest(self._home, release)
        except ApplianceError:
            return {}

    def template(self, release: str) -> TemplateSettings:
        """What the chat template of a release is told, or of a run's merged model that is to become one."""
        if manifest := self.manifest(release):
            return template_of(manifest)
        recipe = self._home.runs / release / "recipe.toml"
        return parse_recipe(recipe.read_text()).template if recipe.exists() else TemplateSettings(today=date.today())

    def precision(self, release: str) -> Precision:
        """In which an engine serves the release: in that of its proof here, and a candidate as there is room for it.

        One that was proven elsewhere is served as there is room for it too.
        """
        manifest = self.manifest(release)
        if manifest and self._releases.get(release).state != "verified elsewhere":
            proven: Precision = manifest.get("reference", {}).get("precision", "16-bit")
            return proven
        return self._kind.room(self.directory(release)).precision

    def memory(self, release: str) -> int:
        """Bytes that its engine takes; 0 where nobody can say."""
        try:
            return self._kind.memory(self.directory(release))
        except UNREADABLE:
            return 0

    def alike(self, one: str, other: str) -> bool:
        """Whether they differ in nothing but weights, as far as their manifests say or will say."""
        try:
            same = same_but_for_weights(self._read_at_start(one), self._read_at_start(other))
            return same and self.precision(one) == self.precision(other)
        except UNREADABLE:
            return False

    def speaker_here(self, release: str) -> str:
        """Which kind of engine says the answers of a release here."""
        return speaker({"engine": self._kind.name, "precision": self.precision(release)})

    def answers(self, release: str) -> list[dict[str, Any]]:
        """What the release answered here when it was verified."""
        return reference_answers(self.manifest(release), self.speaker_here(release))

    def could_be_told(self, release: str) -> bool:
        """Whether weights that are not its own would be found out: by what it has said, or as it will be probed."""
        return not self.manifest(release) or bool(self.answers(release))

    def _read_at_start(self, release: str) -> dict[str, Any]:
        """Its manifest, or as much of that as there is of a run's merged model."""
        return self.manifest(release) or manifest_to_be(self._home.runs / release)
