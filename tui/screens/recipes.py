"""Recipes: what comes with the appliance, as it is written, ready to be trained."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.highlight import highlight

from appliance import api
from appliance.words import visible
from tui.screens.page import RecordPage
from tui.viewmodels.box import Box
from tui.viewmodels.records import recipe_entry
from tui.widgets.panes import Panes
from tui.widgets.text_pane import TextPane


class RecipesPage(RecordPage):
    NAME = "recipes"
    LABEL = "Recipes"
    EMPTY = "This installation came without recipes.\n\nWrite one, then:\n\n  appliance train RECIPE.toml"
    ABOUT = (
        "The recipes that come with the appliance. A recipe names a base model, data sets, stages and every figure of "
        "the training; what it leaves out takes the defaults, and the run keeps a copy with all of them written out."
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("t", "train", "Train", tooltip="Queue a run of this recipe", id="recipe.train"),
    ]

    def compose_detail(self) -> ComposeResult:
        yield Panes({"Recipe": TextPane(id="recipe")})

    def entries(self, box: Box) -> list[tuple[str, Content]]:
        return [(recipe.name, recipe_entry(recipe)) for recipe in box.recipes]

    def show_record(self, box: Box, id: str) -> None:
        if recipe := box.recipe(id):
            self.query_one(TextPane).show(highlight(visible(recipe.text), language="toml"))

    def action_train(self) -> None:
        box = self.appliance.box
        recipe = box.recipe(self.chosen) if box else None
        if self.appliance.refused(None if recipe else "there is no recipe to train") or not box or not recipe:
            return
        self.appliance.confirm(
            f"Train {recipe.name}?",
            recipe.summary + _cost(box.status),
            "Train",
            lambda: self.appliance.perform(self.appliance.client.train(recipe.text), self._queued),
        )

    def _queued(self, run: api.Run) -> str:
        self.app.call_later(self.appliance.open_record, "runs", run.id)
        return f"{run.id} is {run.state}"


def _cost(status: api.Status) -> str:
    """What it means for others, in words."""
    if status.lease == "exclusive" and status.routed:
        return f"\n\nThe accelerator is leased to one at a time: {status.routed} does not answer while this trains."
    if status.queued or status.running:
        return "\n\nIt waits until the runs before it have ended."
    return ""
