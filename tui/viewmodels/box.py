"""Everything that the daemon tells about the box, as of one moment, and the header's line about it."""

from __future__ import annotations

from dataclasses import dataclass

from textual.content import Content

from appliance import api
from appliance.words import percent, size
from tui.viewmodels.states import CANARY, ENGINES, LIVE, NO_ENGINE
from tui.viewmodels.styles import FAINT, MUTED, fit

_ROOM_FOR_SERVING = 34
_SHORTEST_NAME = 8


@dataclass(frozen=True)
class Box:
    status: api.Status
    runs: tuple[api.Run, ...]
    releases: tuple[api.Release, ...]
    datasets: tuple[api.Dataset, ...]
    recipes: tuple[api.ShippedRecipe, ...]

    def run(self, id: str | None) -> api.Run | None:
        return next((run for run in self.runs if run.id == id), None)

    def release(self, id: str | None) -> api.Release | None:
        return next((release for release in self.releases if release.id == id), None)

    def dataset(self, id: str | None) -> api.Dataset | None:
        return next((dataset for dataset in self.datasets if dataset.id == id), None)

    def recipe(self, name: str | None) -> api.ShippedRecipe | None:
        return next((recipe for recipe in self.recipes if recipe.name == name), None)


def status_line(status: api.Status, width: int) -> Content:
    """What answers, who holds the accelerator and how busy the box is, in `width` cells."""
    for wide in (True, False):
        gap = Content.styled("  │  " if wide else " │ ", FAINT)
        rest = gap.join([_lease(status), *_load(status.hardware, wide)])
        room = width - rest.cell_length - gap.cell_length
        if room >= _ROOM_FOR_SERVING:
            break
    return gap.join([_serving(status, room), rest])


def _serving(status: api.Status, room: int) -> Content:
    release = status.routed or status.live
    if release is None:
        return Content.styled("no live release", MUTED)
    engine = next((engine for engine in status.engines if engine.release == release), None)
    look = ENGINES[engine.state] if engine else NO_ENGINE
    why = f"asleep while {status.running} trains"
    if engine and engine.state == "sleeping" and status.running and len(why) + _SHORTEST_NAME + 5 <= room:
        look = look._replace(word=why)
    canary = f" {CANARY.glyph} {percent(status.canary.share)}" if status.canary else ""
    adapter = status.unmerged.name if status.unmerged and status.unmerged.answers else ""
    name = fit(adapter or release, max(_SHORTEST_NAME, room - len(look.word) - 5 - len(canary)))
    return Content.assemble((f"{LIVE.glyph} {name} ", LIVE.style), look.label(), (canary, CANARY.style))


def _lease(status: api.Status) -> Content:
    if status.lease == "share":
        return Content.assemble(("lease ", MUTED), "shared")
    holder = "training" if status.running else "serving" if status.routed else "free"
    return Content.assemble(("lease ", MUTED), holder)


def _load(hardware: api.Hardware, wide: bool) -> list[Content]:
    memory = 100 * hardware.memory_used / max(1, hardware.memory_total)
    disk = 100 * (1 - hardware.disk_free / max(1, hardware.disk_total))
    figures = [_figure("cpu", f"{hardware.cpu_load:.0f}%", hardware.cpu_load > 95)]
    if gpus := hardware.gpus:
        label = f"{len(gpus)} gpus" if len(gpus) > 1 else "gpu"
        shares = [100 * (gpu.memory_used or 0) / gpu.memory_total for gpu in gpus if gpu.memory_total]
        loads = [gpu.utilisation for gpu in gpus if gpu.utilisation is not None]
        busy = f"{sum(loads) / len(loads):.0f}%" if loads else "?"
        used = f" {max(shares):.0f}% mem" if shares else ""
        figures.append(_figure(label, busy + used if wide or not loads else busy, max(shares, default=0) > 97))
    figures.append(_figure("mem", f"{memory:.0f}%", memory > 92))
    disk_text = f"{size(hardware.disk_free)} free" if wide else f"{disk:.0f}%"
    figures.append(_figure("disk", disk_text, disk > 92))
    return figures if wide else [Content(" ").join(figures)]


def _figure(label: str, text: str, alarming: bool) -> Content:
    """A load; what is nearly used up has an exclamation mark beside the colour."""
    mark = "!" if alarming else ""
    return Content.assemble((f"{label} ", MUTED), (text + mark, "$text-warning" if alarming else ""))
