"""What the verbs share: the settings, the daemon's client, and the option for JSON."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from appliance.client import Client
    from appliance.settings import Settings

T = TypeVar("T")

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def settings(**overrides: Any) -> Settings:
    """The settings, those in `overrides` set on the command line."""
    from appliance.settings import load_settings

    return load_settings(**overrides)


def ask(call: Callable[[Client], Awaitable[T]]) -> T:
    """What a call of the client answers."""

    async def asked() -> T:
        async with _client() as client:
            return await call(client)

    return asyncio.run(asked())


def each(stream: Callable[[Client], AsyncIterator[T]], show: Callable[[T], object]) -> None:
    """Show each item of a stream of the client."""

    async def shown() -> None:
        async with _client() as client:
            async for item in stream(client):
                show(item)

    asyncio.run(shown())


def _client() -> Client:
    from appliance.client import Client
    from appliance.home import find_socket

    return Client(find_socket(settings()))
