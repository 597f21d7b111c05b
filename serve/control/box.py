"""The box at a glance, and the recipes that it came with."""

from __future__ import annotations

from fastapi import APIRouter

from appliance import __version__, api, hardware
from appliance.home import Home
from appliance.recipes import shipped_recipes
from appliance.supervisor.supervisor import Supervisor


def box_router(home: Home, supervisor: Supervisor, endpoint: str) -> APIRouter:
    """What there is on this box. `endpoint` is the chat endpoint's URL."""
    routes = APIRouter(prefix="/v1")
    runs, releases = supervisor.runs, supervisor.releases

    @routes.get("/status")
    async def status() -> api.Status:
        active = runs.active()
        return api.Status(
            version=__version__,
            home=str(home.root),
            endpoint=endpoint,
            live=releases.live(),
            routed=supervisor.routed,
            canary=supervisor.trial.status(),
            unmerged=supervisor.adapter_status(),
            engines=supervisor.engines.shown(),
            setback=releases.setback(),
            checks=supervisor.checks.shown(),
            lease="exclusive" if supervisor.exclusive else "share",
            queued=sum(run.state == "queued" for run in active),
            running=next((run.id for run in active if run.state != "queued"), None),
            hardware=hardware.measure(home.root),
        )

    @routes.get("/recipes")
    def recipes() -> list[api.ShippedRecipe]:
        return shipped_recipes()

    return routes
