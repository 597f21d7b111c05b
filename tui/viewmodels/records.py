"""The entries of the lists: two lines each, the name and what matters about it."""

from __future__ import annotations

from textual.content import Content

from appliance import api
from appliance.api import ACTIVE
from appliance.words import ago, duration, one_line
from tui.viewmodels.states import CANARY, LIVE, RUNS, is_canary, release_look
from tui.viewmodels.styles import MUTED
from tui.viewmodels.trace import RunTrace


def run_entry(run: api.Run, trace: RunTrace | None, now: float) -> Content:
    look = RUNS[run.state]
    if run.state in ACTIVE:
        detail = _stage_words(run, trace)
    else:
        span = duration(run.finished - run.started) if run.finished and run.started else ""
        detail = ", ".join(part for part in (span, ago(run.finished or run.created, now)) if part)
    return _entry(look.glyph, run.id, look.word, look.style, detail)


def release_entry(release: api.Release, now: float) -> Content:
    look = LIVE if release.live else CANARY if is_canary(release) else release_look(release)
    passed = f"{sum(release.gates.values())}/{len(release.gates)} gates" if release.gates else "no gates"
    return _entry(look.glyph, release.id, look.word, look.style, f"{passed}, {ago(release.created, now)}")


def dataset_entry(dataset: api.Dataset) -> Content:
    detail = f"{dataset.rows:,} rows"
    return _entry("•", dataset.name, dataset.kind, "$text-primary", detail)


def recipe_entry(recipe: api.ShippedRecipe) -> Content:
    return Content.assemble(
        ("• ", "$text-primary"),
        (recipe.name, "bold"),
        "\n  ",
        (one_line(recipe.summary), MUTED),
    )


def _entry(glyph: str, name: str, word: str, style: str, detail: str) -> Content:
    return Content.assemble(
        (f"{glyph} ", style),
        (one_line(name), "bold"),
        ("\n  ", ""),
        (word, style),
        ("  ", ""),
        (detail, MUTED),
    )


def _stage_words(run: api.Run, trace: RunTrace | None) -> str:
    if run.state == "queued":
        return f"next {run.stage}"
    place = f"{run.stages.index(run.stage) + 1}/{len(run.stages)}" if run.stage in run.stages else ""
    words = f"{run.stage} {place}"
    if trace and trace.stage == run.stage and trace.progress:
        done, steps = trace.progress
        words += f"  {100 * done // steps}%"
    return words
