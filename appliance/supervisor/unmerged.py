"""The adapter that answers before its release can: whether it may, its files, its record."""

from __future__ import annotations

from pathlib import Path

from appliance import api
from appliance.errors import Conflict
from appliance.home import Home
from appliance.models import base_hashes, model_path
from appliance.release.difference import write_difference
from appliance.release.manifest import DEQUANTISED, read_manifest
from appliance.store.releases import Releases
from appliance.store.unmerged import UnmergedAdapters
from appliance.supervisor.snapshot import UnmergedView
from appliance.train.recipe import AFTER_TRAINING, Recipe


def served_name(run: str) -> str:
    """What the adapter of a run is called at the endpoint: unlike any release, because those have no plus sign."""
    return f"{run}+adapter"


class Unmerged:
    """At most one adapter. Its record outlasts the daemon; its engine is the live release's."""

    def __init__(self, home: Home, records: UnmergedAdapters, releases: Releases) -> None:
        self._home = home
        self._records = records
        self._releases = releases

    def files(self, run: str) -> Path:
        """What an engine loads for the adapter of a run."""
        return self._home.runs / run / "unmerged"

    def require_possible(self, run: api.Run) -> str:
        """The live release that the adapter of `run` may answer beside. Raises Conflict where it may not."""
        live = self._releases.live()
        if live is None:
            raise Conflict("nothing_live", "no release is live whose engine could serve it", "wait for the release")
        if run.state != "running" or run.stage not in AFTER_TRAINING:
            raise Conflict(
                "not_between",
                f"run {run.id} is {run.state} at {run.stage}; an adapter goes live after its training and before its "
                "release",
                f"see `appliance runs {run.id}`; a release goes live by `appliance promote {run.id}`",
            )
        return live

    def under_way(self, run: str, live: str) -> bool:
        """Whether this very one is to answer already, so that its files are there and may be read just now."""
        return self.view() == UnmergedView(run, live)

    def write(self, run: str, live: str, recipe: Recipe, largest_rank: int) -> None:
        """Write the files that an engine with the weights of `live` loads.

        Raises Conflict where the run trains no adapter, or those weights are not what it was trained on, but for an
        adapter of their own.
        """
        if not recipe.changes_weights:
            raise Conflict("no_adapter", f"run {run} releases the base as it is", "wait for the release")
        manifest = read_manifest(self._home, live)
        base = base_hashes(model_path(self._home, recipe.base))
        if any(manifest["base_files"].get(name) != hash for name, hash in base.items()):
            raise Conflict(
                "another_base",
                f"the adapter was trained on {recipe.base}, and the live release {live} is of another base",
                "wait for the merged release",
            )
        if recipe.quantised != (manifest["merge"]["kept"] == DEQUANTISED):
            has, was = ("16 bits", "NF4") if recipe.quantised else ("the values of NF4", "16 bits")
            raise Conflict(
                "another_precision",
                f"the adapter was trained on the base in {was}, and the live release {live} has it in {has}",
                "wait for the merged release",
            )
        merged = self._home.releases / live / "adapter"
        trained = recipe.last_adapter(self._home.runs / run)
        write_difference(trained, merged if merged.exists() else None, self.files(run), largest_rank)

    def start(self, run: str, live: str) -> None:
        """Record that the adapter of `run` is to answer beside `live`. Raises Conflict beside another's."""
        self._records.start(run, live)

    def view(self) -> UnmergedView | None:
        """The adapter under way as decisions see it."""
        row = self._records.current()
        return None if row is None else UnmergedView(row.run, row.live)

    def end(self, reason: str) -> None:
        """Record why it answers no longer."""
        self._records.end(reason)

    def ended_because(self, run: str) -> str:
        """Why the adapter of `run` answers no longer; empty while it does."""
        row = self._records.newest()
        return row.reason if row and row.run == run else ""

    def status(self, answers: bool) -> api.Unmerged | None:
        """The adapter under way. `answers`: its engine has loaded it."""
        row = self._records.current()
        if row is None:
            return None
        return api.Unmerged(run=row.run, live=row.live, name=served_name(row.run), since=row.since, answers=answers)
