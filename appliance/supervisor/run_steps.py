"""What a run's files say, and the steps that it takes between its stages and at its end."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path

from appliance import api
from appliance.errors import ApplianceError, reason
from appliance.home import Home, disk_error, sha256
from appliance.release.conclude import finalise, judge
from appliance.release.gates import verdicts
from appliance.release.manifest import MANIFEST, Manifest, read_manifest
from appliance.release.recheck import conclude_recheck
from appliance.store.releases import Releases
from appliance.store.runs import Runs
from appliance.supervisor.checks import Checks
from appliance.supervisor.decide import MOST_LOSSES
from appliance.supervisor.probing import Probe
from appliance.supervisor.snapshot import Outcome
from appliance.train.events import EventLog
from appliance.train.recipe import Recipe, parse_recipe

log = logging.getLogger(__name__)


class RunSteps:
    """Everything here is safe to repeat after a kill."""

    def __init__(self, home: Home, runs: Runs, releases: Releases, checks: Checks) -> None:
        self._home = home
        self._runs = runs
        self._releases = releases
        self._checks = checks

    def directory(self, run: str) -> Path:
        return self._home.runs / run

    def recipe(self, run: str) -> Recipe:
        """The run's recipe as it was queued."""
        return parse_recipe((self.directory(run) / "recipe.toml").read_text())

    def events(self, run: str) -> EventLog:
        return EventLog(self.directory(run) / "events.jsonl")

    # What its files say

    def outcome(self, run: api.Run) -> tuple[Outcome, str]:
        """What the files of its present stage say, with the code of a failure, or what is wrong with the files."""
        try:
            return self._outcome(run)
        except OSError as error:
            log.warning("cannot look at the files of %s: %s", run.id, error)
            return "unknown", ""
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return "damaged", f"what its {run.stage} stage has left cannot be read: {reason(error)}"

    def refused(self, run: api.Run) -> bool:
        """Whether verify has refused what is to be probed, so that no engine is needed to say so."""
        try:
            gates = json.loads((self.directory(run.id) / "verify" / "result.json").read_bytes())["gates"]
        except FileNotFoundError:
            return False
        return not all(gate["passed"] for name, gate in gates.items() if name != "quality")

    def _outcome(self, run: api.Run) -> tuple[Outcome, str]:
        directory = self.directory(run.id) / run.stage
        if run.stage == "probe":
            self.refused(run)
            return ("done" if (self._home.releases / run.id / MANIFEST).exists() else "none"), ""
        if (directory / "result.json").exists():
            json.loads((directory / "result.json").read_bytes())
            return "done", ""
        if (directory / "failure.json").exists():
            return "failed", self._failure(run)["code"]
        return "none", ""

    def _failure(self, run: api.Run) -> dict[str, str]:
        """Why its present stage cannot go on, as the worker has said."""
        failure: dict[str, str] = json.loads((self.directory(run.id) / run.stage / "failure.json").read_bytes())
        return failure

    # The steps

    def advance(self, run: api.Run) -> None:
        """On to the next stage, or to the end."""
        place = run.stages.index(run.stage) + 1
        if place == len(run.stages):
            self._runs.finish(run.id, "finished")
            return
        following = run.stages[place]
        self._runs.advance(run.id, following)
        if following == "probe":
            self.events(run.id).append("stage_started", "probe")

    def fail(self, run: api.Run, why: str, said: str, next: str) -> None:
        """Finish a run that cannot go on; `said` and `next` where its stage's own failure.json does not say why."""
        words: list[str] = []
        if why == "stage":
            failure = self._failure(run)
            self._runs.finish(run.id, "failed", failure["reason"], failure["next"])
            return
        if why == "losses":
            death = [event for event in self.events(run.id).read() if "cause" in event][-1]
            said = f"the {run.stage} process died {MOST_LOSSES} times; the last time it {death['cause']}"
            next, words = f"{death['next']}; see `appliance logs {run.id}`", death["log"]
        self.events(run.id).append("failed", run.stage, reason=said, next=next, log=words)
        self._runs.finish(run.id, "failed", said, next)

    def give_up(self, run: str, error: Exception) -> None:
        """Finish a run of which something could not be done."""
        log.error("run %s cannot go on", run, exc_info=error)
        if isinstance(error, OSError):
            error = disk_error(error, self._home.root)
        next = error.next if isinstance(error, ApplianceError) else "see the daemon's log"
        self._runs.finish(run, "failed", reason(error), next)

    def conclude(self, run: api.Run, probe: Probe) -> None:
        """Write the manifest, record the release, finish the run. One that has its manifest is only recorded."""
        events = self.events(run.id)
        for name, gate in probe.gates.items():
            events.append("gate", "probe", gate=name, passed=gate.passed, figures=gate.figures, reason=gate.reason)
        recipe = self.recipe(run.id)
        if recipe.rechecks:
            self._conclude_recheck(run, recipe.rechecks, judge(self._home, run.id, recipe, probe.gates))
            return
        manifest = finalise(self._home, run.id, recipe, probe.gates, probe.reference or None)
        self._end_probe(run.id)
        digest, promote = sha256(self._home.releases / run.id / MANIFEST), self._runs.promotes(run.id)
        passed = verdicts(manifest.gates)
        self._releases.add(run.id, run.base, manifest.state, manifest.reason, passed, promote, digest)
        why = "" if manifest.state == "verified" else f"the release was refused: {manifest.reason}"
        next = "" if manifest.state == "verified" else f"see `appliance releases {run.id}`"
        self._runs.finish(run.id, "finished", why, next)

    def _conclude_recheck(self, run: api.Run, release: str, found: Manifest) -> None:
        self._end_probe(run.id)
        damaged, seen = self._releases.get(release).damage, self._releases.proof(release).seen
        if damaged or (seen and not self._checks.whole(release)):
            why = f"something has written to the files of {release} while its gates were repeated"
            self._runs.finish(run.id, "failed", why, f"`appliance verify {release}` says whether they are whole")
            return
        manifest, gates = read_manifest(self._home, release), verdicts(found.gates)
        outcome, said = conclude_recheck(found, manifest)
        if outcome == "passed":
            self._releases.passed_here(release, manifest["reason"], said, gates)
            self._runs.finish(run.id, "finished")
            return
        if outcome == "refused":
            log.error("release %s does not pass its gates here: %s", release, found.reason)
            self._releases.refuse(release, said, gates)
        else:
            self._releases.note(release, said)
        why = f"{release} did not pass again: {found.reason}"
        self._runs.finish(run.id, "finished", why, f"see `appliance logs {run.id} --events`")

    def _end_probe(self, run: str) -> None:
        events = self.events(run)
        begun = [event["time"] for event in events.read() if event["event"] == "stage_started"]
        events.append("stage_finished", "probe", seconds=round(time.time() - begun[-1], 1))
