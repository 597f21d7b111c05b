"""The verb that asks the live release."""

from __future__ import annotations

import sys
from typing import Any

import click

from appliance.cli.session import each
from appliance.words import visible


@click.command()
@click.argument("prompt", required=False)
def chat(prompt: str | None) -> None:
    """Chat with the live release; with PROMPT, answer it and end. A PROMPT of - is read from stdin."""
    if prompt is not None:
        _answer([{"role": "user", "content": sys.stdin.read() if prompt == "-" else prompt}])
        return
    messages: list[dict[str, Any]] = []
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            messages.append({"role": "user", "content": line})
            messages.append({"role": "assistant", "content": _answer(messages)})


def _answer(messages: list[dict[str, Any]]) -> str:
    """Print the live release's answer as it comes, to a pipe as it is; the whole text."""
    pieces: list[str] = []
    on_terminal = sys.stdout.isatty()

    def show(piece: str) -> None:
        pieces.append(piece)
        print(visible(piece) if on_terminal else piece, end="", flush=True)

    each(lambda client: client.chat(messages), show)
    print()
    return "".join(pieces)


VERBS = (chat,)
