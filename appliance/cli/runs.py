"""The verbs about runs: queueing, listing, reading, stopping and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from appliance.cli import console
from appliance.cli.session import ask, each, json_option
from appliance.errors import ApplianceError, InvalidInput
from appliance.words import ago, duration, event_line, log_line, size

if TYPE_CHECKING:
    from appliance import api


@click.command()
@click.argument("recipe")
@click.option("-f", "--follow", is_flag=True, help="Print its events until it ends.")
@click.option("--dry-run", is_flag=True, help="Say what it would take, and queue nothing.")
@json_option
def train(recipe: str, follow: bool, dry_run: bool, as_json: bool) -> None:
    """Queue a run of RECIPE, a TOML file or the name of a shipped recipe, and print its id."""
    text = recipe_text(recipe)
    if dry_run:
        forecasts = ask(lambda client: client.forecast(text))
        console.print_json(forecasts) if as_json else print_forecasts(forecasts)
        return
    if as_json:
        raise InvalidInput("no_json", "a run's id is plain text", "use --json with --dry-run")
    run = ask(lambda client: client.train(text))
    print(run.id, flush=True)
    if follow:
        follow_run(run.id)


@click.command()
@click.argument("run", required=False)
@click.option("-n", "--newest", type=click.IntRange(1, 1000), default=50, show_default=True, help="How many to list.")
@click.option("--before", metavar="RUN", help="List those that were queued before RUN.")
@json_option
def runs(run: str | None, newest: int, before: str | None, as_json: bool) -> None:
    """List the newest runs, or show RUN."""
    found = [ask(lambda client: client.run(run))] if run else ask(lambda client: client.runs(newest, before))
    if as_json:
        console.print_json(found[0] if run else found)
        return
    rows = [
        (one.id, one.state, one.stage, one.base, ago(one.created), " — ".join(filter(None, (one.reason, one.next))))
        for one in found
    ]
    console.print_table(("RUN", "STATE", "STAGE", "BASE", "QUEUED", "WHY"), rows)
    if len(found) == newest and not run:
        console.say(f"older ones: `appliance runs --before {found[-1].id}`")


@click.command()
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Go on until the run ends.")
@click.option("--events", is_flag=True, help="The run's events instead of its log.")
@click.option("--engine", is_flag=True, help="RUN is a release: what its engines have written.")
@click.option("-n", "--lines", type=click.IntRange(1), default=200, help="Lines of the log to show.")
@json_option
def logs(run: str, follow: bool, events: bool, engine: bool, lines: int, as_json: bool) -> None:
    """Print the log of RUN."""
    if engine and (follow or events):
        raise InvalidInput("no_stream", "the log of engines is neither followed nor events", "leave --engine alone")
    if as_json and not events:
        raise InvalidInput("no_json", "the log is plain text", "use `--events --json`")
    if events and follow:
        follow_run(run, as_json)
    elif events:
        for event in ask(lambda client: client.events(run)):
            console.print_json_line(event) if as_json else print(event_line(event))
    elif follow:
        _follow_log(run)
    else:
        for line in ask(lambda client: (client.engine_log if engine else client.log)(run, lines)).splitlines():
            print(log_line(line))


@click.command()
@click.argument("run")
@click.option("--keep", "how", flag_value="keep", help="End the training here and go on with what it has learnt.")
@click.option("--discard", "how", flag_value="discard", help="Take away its work; a resume starts from nothing.")
def stop(run: str, how: api.StopWish | None) -> None:
    """Pause RUN at a checkpoint, from which `appliance resume` goes on; or end it with --keep or --discard."""
    print(ask(lambda client: client.stop(run, how or "pause")).state)


@click.command()
@click.argument("run")
def resume(run: str) -> None:
    """Go on with a stopped or failed RUN from its last checkpoint."""
    print(ask(lambda client: client.resume(run)).state)


def recipe_text(recipe: str) -> str:
    """The text of a TOML file or of a shipped recipe. Raises InvalidInput."""
    from appliance.recipes import shipped_recipes

    path = Path(recipe)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        shipped = {one.name: one.text for one in shipped_recipes()}
        if recipe in shipped:
            return shipped[recipe]
        raise InvalidInput(
            "no_recipe", f"there is no recipe {recipe}", f"name a TOML file, or one of {', '.join(shipped)}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput("no_recipe", f"cannot read {recipe}: {error}", "name a TOML file") from None


def follow_run(run: str, as_json: bool = False) -> None:
    """Print a run's events until it ends. Raises ApplianceError where it does not end in a verified release."""
    if as_json:
        each(lambda client: client.follow(run), console.print_json_line)
        return
    each(lambda client: client.follow(run), lambda event: console.say(event_line(event)))
    ended = ask(lambda client: client.run(run))
    if ended.state != "finished" or ended.reason:
        raise ApplianceError("run_ended", f"run {run} {ended.state}: {ended.reason or 'by request'}", ended.next or "-")


def _follow_log(run: str) -> None:
    """Print the run's log, each line when it has ended."""
    tail = ""

    def take(piece: str) -> None:
        nonlocal tail
        *ended, tail = (tail + piece).split("\n")
        for line in ended:
            print(log_line(line), flush=True)

    each(lambda client: client.follow_log(run), take)
    if tail:
        print(log_line(tail))


def print_forecasts(found: api.Forecasts) -> None:
    """What stages would take, a column each; what does not fit, and what would make it."""
    forecasts = found.stages
    parts = [part for part in forecasts[0]["memory"] if part != "total"] if forecasts else []
    rows = [(part, *(size(one["memory"][part]) for one in forecasts)) for part in parts]
    rows += [
        ("memory", *(size(one["memory"]["total"]) for one in forecasts)),
        ("available", *(size(one["available"]) for one in forecasts)),
        ("disk", *(size(one["disk"]) for one in forecasts)),
        ("largest pass", *(f"{one['rows_at_once']} x {one['width_at_once']} tokens" for one in forecasts)),
        ("gradient checkpointing", *(_checkpointed(one["every_n_layers"]) for one in forecasts)),
        ("tokens", *(f"{one['tokens']:,}" for one in forecasts)),
        ("steps", *(f"{one['steps']:,}" for one in forecasts)),
        ("time", *(f"about {duration(one['seconds'])}" for one in forecasts)),
        ("fits", *("yes" if one["fits"] else "NO" for one in forecasts)),
    ]
    console.print_table(("", *(one["stage"].upper() for one in forecasts)), rows)
    for one in forecasts:
        if not one["fits"]:
            console.say(f"{one['stage']} does not fit: {one['advice']}")
    if serving := found.serving:
        has = "" if serving.available is None else f" of {size(serving.available)}"
        how = " in FP8, because it does not fit in 16 bits" if serving.precision == "FP8" else ""
        print(f"the release takes {size(serving.needed)}{has} to be verified and served{how}")
        if not serving.fits:
            console.say('it does not fit: take a smaller base, or set end = "adapter" to train its adapter alone')
        print(f"for a canary, or its adapter before it is merged: {serving.two}")


def _checkpointed(every_n_layers: int) -> str:
    return {0: "off", 1: "on"}.get(every_n_layers, f"1 layer in {every_n_layers}")


VERBS = (train, runs, logs, stop, resume)
