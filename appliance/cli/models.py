"""The verbs about base models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from appliance.cli import console
from appliance.cli.session import ask, each, json_option, settings
from appliance.errors import ApplianceError, Unreachable
from appliance.words import pull_line, size

if TYPE_CHECKING:
    from appliance import api


@click.command()
@click.argument("name")
@click.option("--from", "source", type=click.Path(path_type=Path), help="A folder, tar or GGUF of a model.")
@click.option("--serve-only", is_flag=True, help="Take a model that cannot be trained.")
@click.option("--stop", is_flag=True, help="End the pull of NAME that the daemon is at.")
def pull(name: str, source: Path | None, serve_only: bool, stop: bool) -> None:
    """Get the base model NAME: smollm2-135m, a Hub id, a GGUF on the Hub (ORG/REPO/FILE.gguf), or any name with --from.

    Run again after a break, it goes on where it was. HF_ENDPOINT names a mirror of the Hub, HF_TOKEN an account. Where
    a daemon serves another home than this user's own, as the service does, it pulls, with its own settings.
    """
    if stop:
        console.say(ask(lambda client: client.stop_pull(name)).said)
    elif _daemon_has_another_home():
        _pull_by_daemon(name, source, serve_only)
    else:
        _pull_here(name, source, serve_only)


def _daemon_has_another_home() -> bool:
    try:
        return Path(ask(lambda client: client.status()).home) != settings().home
    except Unreachable as error:
        if error.code == "daemon_unreachable":
            return False
        raise


def _pull_by_daemon(name: str, source: Path | None, serve_only: bool) -> None:
    """Have the daemon pull, and say how it goes. Raises ApplianceError where it fails."""
    path = str(source.absolute() if source.exists() else source) if source else None
    told = ""

    def show(now: api.Pull) -> None:
        nonlocal told
        if now.problem:
            raise ApplianceError(now.problem.code, now.problem.message, now.problem.next)
        if (line := pull_line(now)) not in ("", told):
            console.say(line)
        told = line

    try:
        each(lambda client: client.pull(name, path, serve_only), show)
    except KeyboardInterrupt:
        console.say("the daemon goes on with it; the same command shows how far it is, --stop ends it")
        raise


def _pull_here(name: str, source: Path | None, serve_only: bool) -> None:
    """Pull into this user's own home, and leave with the status of that."""
    from appliance.home import Home

    found = settings()
    home = Home(found.home, found.socket)
    home.create()
    arguments = [name, str(home.root), *(["--from", str(source)] if source else [])]
    arguments += ["--serve-only"] if serve_only else []
    sys.exit(subprocess.run([sys.executable, "-m", "appliance.pull", *arguments], check=False).returncode)


@click.command()
@json_option
def models(as_json: bool) -> None:
    """List the base models on this box."""
    found = ask(lambda client: client.models())
    if as_json:
        console.print_json(found)
    else:
        rows = [(model.name, size(model.bytes), str(model.context), model.source) for model in found]
        console.print_table(("NAME", "SIZE", "CONTEXT", "SOURCE"), rows)


VERBS = (pull, models)
