"""The loss curves of a run as layers of a plot: the stages one after another along the x axis."""

from __future__ import annotations

from textual.content import Content

from appliance.words import number
from tui.viewmodels.plot import Boundary, Layer, Point, plot, smooth
from tui.viewmodels.styles import MUTED
from tui.viewmodels.trace import RunTrace

TRAIN, RAW, EVALUATION = "$primary", "$foreground 60%", "$accent"


def loss_plot(trace: RunTrace, width: int, height: int) -> Content | None:
    """A legend and the curves in `width` x `height` cells. None before the first loss, or without room."""
    raw: list[list[Point]] = []
    smoothed: list[list[Point]] = []
    evaluation: list[list[Point]] = []
    boundaries: list[Boundary] = []
    start = 0.0
    curves = list(trace.curves.values())
    for index, curve in enumerate(curves):
        raw.append([(start + x, y) for x, y in curve.train])
        smoothed.append(smooth(raw[-1]))
        evaluation.append([(start + x, y) for x, y in curve.evaluation])
        if len(curves) > 1:
            boundaries.append(Boundary(start, curve.stage))
        start += curve.reached if index < len(curves) - 1 else max(curve.steps, curve.reached)
    layers = (
        Layer("dots", RAW, raw),
        Layer("line", TRAIN, smoothed),
        Layer("marks", EVALUATION, evaluation),
    )
    picture = plot(width, height - 1, layers, boundaries, end=start)
    return Content("\n").join([_legend(trace, smoothed), picture]) if picture else None


def _legend(trace: RunTrace, smoothed: list[list[Point]]) -> Content:
    parts: list[Content | tuple[str, str]] = [("  ── ", TRAIN), ("train", MUTED)]
    last = next((part[-1][1] for part in reversed(smoothed) if part), None)
    if last is not None:
        parts.append((f" {number(last)}", "bold"))
    parts += [("   ·· ", RAW), ("each step", MUTED)]
    if trace.evaluation is not None:
        parts += [("   ◆ ", EVALUATION), ("held out", MUTED), (f" {number(trace.evaluation)}", "bold")]
    return Content.assemble(*parts)
