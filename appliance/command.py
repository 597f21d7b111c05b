"""What the verbs of the command share: the client, a recipe's text, and the option for JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import click

from appliance.errors import ApplianceError, InvalidInput

T = TypeVar("T")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def settings(**overrides: Any) -> Any:
    """The settings, those in `overrides` set on the command line."""
    from appliance.settings import load_settings

    return load_settings(**overrides)


def home() -> Any:
    """The appliance's directory tree."""
    from appliance.home import Home

    found = settings()
    return Home(found.home, found.socket)


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


def _with_client(work: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
    from appliance.client import Client

    async def session() -> T:
        async with Client(home().control_socket()) as client:
            return await work(client)

    return asyncio.run(session())


def ask(call: Callable[[Any], Awaitable[T]]) -> T:
    """What a call of the client answers."""

    async def work(client: Any) -> T:
        return await call(client)

    return _with_client(work)


def each(stream: Callable[[Any], Any], show: Callable[[Any], object]) -> None:
    """Show each item of a stream of the client."""

    async def work(client: Any) -> None:
        async for item in stream(client):
            show(item)

    _with_client(work)


def follow_run(run: str, as_json: bool = False) -> None:
    """Print a run's events until it ends. Raises ApplianceError where it does not end in a verified release."""
    from appliance import console

    if as_json:
        each(lambda client: client.follow(run), console.print_json_line)
        return
    each(lambda client: client.follow(run), lambda event: console.say(console.event_line(event)))
    ended = ask(lambda client: client.run(run))
    if ended.state != "finished" or ended.reason:
        raise ApplianceError("run_ended", f"run {run} {ended.state}: {ended.reason or 'by request'}", ended.next or "-")
