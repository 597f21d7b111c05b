"""Why an action cannot be done now, in words for the person who tried. None: it can."""

from __future__ import annotations

from appliance import api
from appliance.api import ACTIVE
from tui.viewmodels.states import is_canary


def why_not_stop(run: api.Run | None) -> str | None:
    if run is None:
        return "there is no run to stop"
    if run.state == "stopping":
        return f"{run.id} is stopping already; it writes a checkpoint first"
    if run.state not in ACTIVE:
        return f"{run.id} has {run.state} already"
    return None


def why_not_resume(run: api.Run | None) -> str | None:
    if run is None:
        return "there is no run to resume"
    if run.state in ACTIVE:
        return f"{run.id} is {run.state}"
    if run.state == "finished":
        return f"{run.id} has finished; start its recipe again for another run"
    return None


def why_not_serve_adapter(run: api.Run | None, status: api.Status | None) -> str | None:
    """Why a run's adapter cannot answer before its release can, as far as can be seen from here."""
    if run is None:
        return "there is no run whose adapter could answer"
    if run.state != "running":
        return f"{run.id} is {run.state}; an adapter answers while its run merges and verifies it"
    if status is None or status.live is None:
        return "no release is live whose engine could serve it; wait for the release"
    return None


def why_not_promote(release: api.Release | None) -> str | None:
    if release is None:
        return "there is no release to promote"
    if release.live:
        return f"{release.id} is live already"
    if release.damage:
        return f"{release.id} is damaged: {release.damage}"
    if release.state == "refused":
        return f"{release.id} was refused: {release.reason or 'a gate failed'}"
    return None


def why_not_try(release: api.Release | None, status: api.Status | None) -> str | None:
    """Why a release cannot be the canary."""
    if reason := why_not_promote(release):
        return reason
    if status is None or status.live is None:
        return "no release is live to compare with; promote it"
    if status.canary is not None:
        return f"{status.canary.release} is the canary; promote it, or roll it back, first"
    if status.lease == "exclusive":
        return "a canary needs two engines at once, and the lease is exclusive; promote it"
    return None


def why_not_roll_back(releases: tuple[api.Release, ...], status: api.Status | None) -> str | None:
    if (status and status.unmerged) or any(is_canary(release) for release in releases):
        return None
    if not any(release.live for release in releases):
        return "nothing is live, so there is nothing to roll back from"
    if sum(release.state != "refused" and not release.damage for release in releases) < 2:
        return "there is no other verified release to go back to"
    return None
