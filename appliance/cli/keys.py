"""The verbs about API keys of the chat endpoint."""

from __future__ import annotations

import click

from appliance.cli import console
from appliance.cli.session import ask, json_option
from appliance.words import ago


@click.group()
def keys() -> None:
    """API keys of the chat endpoint."""


@keys.command("create")
@click.argument("name")
@json_option
def create(name: str, as_json: bool) -> None:
    """Make a key for NAME. It is shown once."""
    key = ask(lambda client: client.create_key(name))
    if as_json:
        console.print_json(key)
    else:
        console.say(f"key {key.id} for {key.name}; it is not shown again")
        print(key.key)


@keys.command("list")
@json_option
def list_keys(as_json: bool) -> None:
    """List the keys."""
    found = ask(lambda client: client.keys())
    if as_json:
        console.print_json(found)
    else:
        rows = [
            (key.id, key.name, f"{key.prefix}...", ago(key.created), "revoked" if key.revoked else "valid")
            for key in found
        ]
        console.print_table(("KEY", "NAME", "BEGINS", "MADE", "STATE"), rows)


@keys.command("revoke")
@click.argument("key")
def revoke(key: str) -> None:
    """Refuse KEY from now on."""
    print(ask(lambda client: client.revoke_key(key)).id)


VERBS = (keys,)
