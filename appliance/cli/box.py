"""The verbs about the box as a whole: the daemon, the dashboard, what is going on, what is wrong, clearing up."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from appliance.cli import console
from appliance.cli.session import ask, json_option, settings
from appliance.errors import Exit
from appliance.words import canary_side, check_line, percent, size, visible

if TYPE_CHECKING:
    from appliance import api


@click.command()
@click.option("--host", help="Address of the chat endpoint (APPLIANCE_HOST).")
@click.option("--port", type=int, help="Port of the chat endpoint (APPLIANCE_PORT).")
def serve(host: str | None, port: int | None) -> None:
    """Run the daemon: queue, control socket and chat endpoint."""
    import logging

    from serve import daemon

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    daemon.run(settings(host=host, port=port))


@click.command()
def tui() -> None:
    """Open the dashboard."""
    from appliance.home import find_socket
    from tui import app

    sys.exit(app.run(find_socket(settings())))


@click.command()
@json_option
def status(as_json: bool) -> None:
    """Show the box at a glance."""
    now = ask(lambda client: client.status())
    if as_json:
        console.print_json(now)
        return
    for label, line in _glance(now):
        console.show(f"{label:10}{line}")


def _glance(now: api.Status) -> list[tuple[str, str]]:
    meanwhile = f"{now.routed} answers meanwhile" if now.routed else "nothing answers yet"
    live = f"{now.live or 'nothing'}{'' if now.live == now.routed else f' ({meanwhile})'}"
    lines = [("endpoint", now.endpoint), ("live", live)]
    if now.unmerged:
        until = f"answers on that release's engine until {now.unmerged.run} is verified"
        lines.append(("unmerged", f"{now.unmerged.name} {until}"))
    lines += [("canary", line) for line in (canary_lines(now.canary) if now.canary else ())]
    lines += [("setback", now.setback)] if now.setback else []
    lines += [("check", check_line(check)) for check in now.checks]
    lines += [("engine", engine_line(engine, now.running)) for engine in now.engines]
    return [*lines, ("running", f"{now.running or 'nothing'}, {now.queued} queued, lease {now.lease}")]


def canary_lines(canary: api.Canary) -> list[str]:
    """The canary under way: its share, what it waits for, the figures of both sides, and its limits."""
    first = f"{canary.release} answers {percent(canary.share)} of the conversations; {canary.reason}"
    return [first, *map(canary_side, canary.figures), *canary.limits]


def engine_line(engine: api.Engine, running: str | None) -> str:
    """What an engine process does, where it sleeps for which run, and why the one before it failed."""
    if engine.state == "sleeping" and running:
        return f"{engine.kind} for {engine.release} asleep while {running} trains"
    why = f": the last one {visible(engine.reason)}" if engine.reason else ""
    return f"{engine.kind} {engine.state} for {engine.release}{why}"


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Check what the appliance needs on this box, and say how to mend it."""
    from appliance.doctor import examine

    findings = examine(settings())
    if as_json:
        console.print_json([finding.__dict__ for finding in findings])
    else:
        for finding in findings:
            fix = f" — {finding.fix}" if finding.fix else ""
            console.show(f"{finding.status:5}{finding.name:10}{finding.summary}{fix}")
    if any(finding.status == "fail" for finding in findings):
        sys.exit(Exit.FAILED)


@click.command()
@click.option("--keep", type=click.IntRange(0), default=5, show_default=True, help="How many newest, if whole, stay.")
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@json_option
def gc(keep: int, dry_run: bool, as_json: bool) -> None:
    """Remove what nothing needs: old releases (never the live one or the one before), unnamed datasets, leftovers."""
    garbage = ask(lambda client: client.gc(keep, dry_run))
    if as_json:
        console.print_json(garbage)
        return
    for kind, names in (
        ("release", garbage.releases),
        ("dataset", garbage.datasets),
        ("leftover", garbage.leftovers),
    ):
        for name in names:
            console.show(f"{kind}  {name}")
    console.say(f"{'would free' if dry_run else 'freed'} {size(garbage.bytes)}")


VERBS = (serve, tui, status, doctor, gc)
