"""The head of a run's view: its state, its stages, how far it is and its figures now."""

from __future__ import annotations

import math

from textual.content import Content

from appliance import api
from appliance.words import ago, duration, number, size, visible
from tui.viewmodels import states
from tui.viewmodels.styles import FAINT, MUTED
from tui.viewmodels.trace import RunTrace


def run_summary(run: api.Run, trace: RunTrace, width: int, now: float) -> Content:
    """Four lines, or more where a reason has to be told."""
    lines = [_title(run, now), _stages(run, trace)]
    if run.state in ("failed", "stopped") and (run.reason or trace.failure):
        lines += _reason(run, trace)
    else:
        lines += [_progress(run, trace, width), _figures(trace, width)]
    return Content("\n").join(lines)


def _title(run: api.Run, now: float) -> Content:
    parts: list[Content | tuple[str, str]] = [
        states.RUNS[run.state].label(),
        ("   recipe ", MUTED),
        (run.recipe, ""),
        ("   base ", MUTED),
        (run.base, ""),
    ]
    if run.finished and run.started:
        parts += [("   took ", MUTED), (duration(run.finished - run.started), "")]
    elif run.started:
        parts += [("   started ", MUTED), (ago(run.started, now), "")]
    return Content.assemble(*parts)


def _stages(run: api.Run, trace: RunTrace) -> Content:
    present = run.stages.index(run.stage) if run.stage in run.stages else len(run.stages)
    parts: list[Content] = []
    for index, stage in enumerate(run.stages):
        if run.state == "finished" or index < present:
            look = states.STAGE_DONE
        elif index > present or run.state == "queued":
            look = states.STAGE_AHEAD
        else:
            look = {"failed": states.STAGE_BROKEN, "stopped": states.RUNS["stopped"]}.get(run.state, states.STAGE_NOW)
        took = f" {duration(trace.seconds[stage])}" if stage in trace.seconds else ""
        parts.append(Content.assemble((f"{look.glyph} {stage}", look.style), (took, MUTED)))
    return Content.styled(" → ", FAINT).join(parts)


def _progress(run: api.Run, trace: RunTrace, width: int) -> Content:
    """A bar of the present stage's steps where it counts any, else of the stages."""
    if run.state != "finished" and trace.progress:
        done, total = trace.progress
        label = f"step {done}/{total}"
        eta = trace.last.get("eta_seconds")
        tail = f"{100 * done // total:3d}%"
        tail += f"  eta {duration(eta)}" if eta and run.state == "running" else ""
    else:
        total = len(run.stages)
        done = total if run.state == "finished" else run.stages.index(run.stage) if run.stage in run.stages else 0
        label, tail = f"stage {done}/{total}", f"{100 * done // max(1, total):3d}%"
    room = max(10, width - len(label) - len(tail) - 4)
    filled = round(room * done / max(1, total))
    return Content.assemble(
        (f"{label}  ", "bold"),
        ("━" * filled, "$success" if run.state == "finished" else "$primary"),
        ("─" * (room - filled), FAINT),
        (f"  {tail}", ""),
    )


def _figures(trace: RunTrace, width: int) -> Content:
    """What was measured last, the most telling first, as much as there is room for."""
    step = trace.last
    figures: list[tuple[str, str | None]] = [
        ("loss", number(step["loss"]) if "loss" in step else None),
        ("held out", number(trace.evaluation) if trace.evaluation is not None else None),
        ("tok/s", f"{step['tokens_per_second']:,.0f}" if step.get("tokens_per_second") else None),
        ("lr", f"{step['lr']:.1e}" if step.get("lr") is not None else None),
        ("grad", number(step["grad_norm"]) if step.get("grad_norm") is not None else None),
        ("memory", size(step["memory"]) if step.get("memory") else None),
    ]
    if not step and trace.gates:
        figures = [("gates passed", f"{sum(trace.gates.values())} of {len(trace.gates)}"), *figures]
    known = [Content.assemble((f"{label} ", MUTED), (value, "")) for label, value in figures if value]
    loss = step.get("loss")
    if loss is not None and not math.isfinite(loss):
        known.insert(0, Content.styled("✗ the loss is not a number", "$text-error"))
    line = Content("   ").join(known) if known else Content.styled("no figures yet", MUTED)
    while line.cell_length > width and len(known) > 1:
        known.pop()
        line = Content("   ").join(known)
    return line


def _reason(run: api.Run, trace: RunTrace) -> list[Content]:
    failure = trace.failure or {}
    reason = run.reason or str(failure.get("reason", ""))
    following = run.next or str(failure.get("next", ""))
    lines = [Content.styled(visible(reason), "$text-error" if run.state == "failed" else "$text-warning")]
    if following:
        lines.append(Content.assemble(("→ ", MUTED), visible(following)))
    return lines
