"""The verbs about base models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from appliance.cli import console
from appliance.cli.session import ask, json_option, settings
from appliance.words import size


@click.command()
@click.argument("name")
@click.option("--from", "source", type=click.Path(path_type=Path), help="A folder, tar or GGUF of a model.")
@click.option("--serve-only", is_flag=True, help="Take a model that cannot be trained.")
def pull(name: str, source: Path | None, serve_only: bool) -> None:
    """Get the base model NAME: smollm2-135m, a Hub id, a GGUF on the Hub (ORG/REPO/FILE.gguf), or any name with --from.

    Run again after a break, it goes on where it was. HF_ENDPOINT names a mirror of the Hub, HF_TOKEN an account.
    """
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
