"""From the text of a recipe to a queued run, or to what it would take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fastapi import Request

from appliance import api
from appliance.data.dataset import Dataset
from appliance.data.tokenizer import thinking_switches
from appliance.errors import InvalidInput
from appliance.home import Home, require_space
from appliance.models import count_parameters, model_path, require_trainable, template_and_end
from appliance.release.lineage import copy_start, going_on
from appliance.store.datasets import Datasets
from appliance.supervisor.engines import Room, advice_on_two
from appliance.supervisor.queueing import queueing
from appliance.supervisor.supervisor import Supervisor
from appliance.train.dry_run import DryRunRequest
from appliance.train.events import EventLog
from appliance.train.fit import is_counted, require_fit
from appliance.train.recipe import Recipe, dump_recipe, parse_recipe
from serve.control.children import run_module
from serve.control.uploads import incoming


class Submission:
    """What is asked of a recipe before anything works on it."""

    def __init__(self, home: Home, supervisor: Supervisor, datasets: Datasets) -> None:
        self._home = home
        self._supervisor = supervisor
        self._datasets = datasets

    async def forecast(self, text: str, request: Request) -> api.Forecasts:
        """What each training stage would take, and serving the release. Raises ApplianceError as `queue` does."""
        recipe, datasets = self.complete(text)
        room = self._room_to_serve(recipe)
        freed = self._supervisor.engines.held() if self._supervisor.exclusive else 0
        asked = DryRunRequest(recipe=dump_recipe(recipe), names=_names(datasets), freed=freed)
        outcome = await self._dry_run(asked, request)
        serving = room and api.Serving(
            needed=room.needed,
            available=room.available,
            fits=room.suffices,
            precision=room.precision,
            two=advice_on_two(self._supervisor.engines.kind.room(model_path(self._home, recipe.base), beside=True)),
        )
        return api.Forecasts(stages=outcome["stages"], serving=serving)

    async def queue(self, text: str, request: Request) -> api.Run:
        """Queue a run of the recipe. Raises ApplianceError where it cannot be run here.

        Rows that an import has not counted for this base are looked at first, by a process that keeps what it makes.
        """
        home, runs = self._home, self._supervisor.runs
        recipe, datasets = self.complete(text)
        room = self._room_to_serve(recipe)
        if room:
            room.require(recipe.base)
        weights = sum(file.stat().st_size for file in model_path(home, recipe.base).glob("*.safetensors"))
        require_space(home.root, 2 * weights, "a run with its checkpoints and its release")
        if not all(is_counted(dataset, recipe.base) for dataset in (Dataset.open(home, one.id) for one in datasets)):
            asked = DryRunRequest(recipe=dump_recipe(recipe), names=_names(datasets), forecast=False)
            await self._dry_run(asked, request)
        with queueing(home, runs, recipe) as (id, directory):
            copy_start(home, recipe, directory)
            if room:
                warn_of_fp8(directory, recipe, room)
        return runs.get(id)

    async def _dry_run(self, asked: DryRunRequest, request: Request) -> dict[str, Any]:
        with incoming(self._home) as folder:
            return await run_module("appliance.train.dry_run", self._home, asked, folder, request)

    def complete(self, text: str) -> tuple[Recipe, list[api.Dataset]]:
        """The recipe with its datasets by id and its learning rates, and these datasets.

        Raises ApplianceError where it cannot be run.
        """
        recipe = parse_recipe(text)
        if recipe.given:
            raise InvalidInput("given_adapter", "the recipe has a given adapter", "use `appliance merge --adapter DIR`")
        if recipe.rechecks:
            raise InvalidInput("rechecks", "the recipe names a release", "use `appliance verify RELEASE --gates`")
        base = model_path(self._home, recipe.base)
        if recipe.stages:
            require_trainable(base, quantised=recipe.quantised, experts=bool(recipe.adapter.target_parameters))
        asked = recipe.thinking
        recipe = going_on(self._home, recipe, base).for_base(count_parameters(base))
        found = [self._datasets.find(stage.dataset) for stage in recipe.stages]
        for stage, dataset in zip(recipe.stages, found, strict=True):
            require_fit(stage, Dataset.open(self._home, dataset.id), recipe.base, dataset.name)
        stages = tuple(
            stage.model_copy(update={"dataset": dataset.id})
            for stage, dataset in zip(recipe.stages, found, strict=True)
        )
        if asked == "auto" and stages and thinking_switches(template_and_end(base)[0]):
            counts = [Dataset.open(self._home, dataset.id).report.get("thoughts") for dataset in found]
            recipe = recipe.model_copy(update={"thinking": _thinking(recipe.thinking, counts)})
        return recipe.model_copy(update={"stages": stages}), found

    def _room_to_serve(self, recipe: Recipe) -> Room | None:
        """What the recipe's release takes to be served; None where it makes none."""
        return (
            self._supervisor.engines.kind.room(model_path(self._home, recipe.base)) if recipe.end == "release" else None
        )


def _names(datasets: list[api.Dataset]) -> dict[str, str]:
    return {dataset.id: dataset.name for dataset in datasets}


def warn_of_fp8(run: Path, recipe: Recipe, room: Room) -> None:
    """Say in the events of a new run that its release will be served in FP8, where it will."""
    if room.precision == "FP8":
        message = f"the release does not fit in 16 bits: it takes {room.figures}"
        EventLog(run / "events.jsonl").append("warning", recipe.pipeline()[0], code="fp8", message=message)


def _thinking(inherited: Literal["auto", "on", "off"], thoughts: Sequence[int | None]) -> Literal["auto", "on", "off"]:
    """Whether a model thinks whose recipe leaves it open: by the rows with a thought in each dataset, None where an
    earlier version has not counted them, and by the release that it goes on from."""
    if any(thoughts):
        return "on"
    return "off" if inherited == "auto" and None not in thoughts else inherited
