"""What the examples of all methods have in common."""

from __future__ import annotations

from typing import Any

from appliance.data.dataset import answered
from appliance.data.render import render_conversation
from appliance.errors import InvalidInput

Example = dict[str, Any]
"""Columns named as the method's trainer reads them: token ids, and KTO's label."""

IGNORED = -100
"""The label of a token that the loss leaves out."""

HELD_OUT_ROWS = 64
"""So many of the held-out rows are evaluated in training, which thus stays a small share of it: the first, a draw."""


def nothing_to_train() -> InvalidInput:
    return InvalidInput("nothing_to_train", "it has no assistant turn to train on", "take the row out, or mend it")


def answer_ids(tokenizer: Any, row: dict[str, Any], key: str, prompt: list[int]) -> list[int]:
    """Token ids of the one answer under `key` to `prompt`, up to its end of turn. Raises InvalidInput."""
    rendered = render_conversation(tokenizer, answered(row, key), row.get("tools"))
    if not rendered:
        raise nothing_to_train()
    ids, trained = rendered[0].input_ids, rendered[0].trained
    if len(rendered) > 1 or ids[: len(prompt)] != prompt or not all(trained[len(prompt) :]):
        raise InvalidInput(
            "answer_not_one_turn",
            f"its {key} answer is more than one turn of the assistant",
            "move the turns before the last one into the prompt",
        )
    return ids[len(prompt) :]


def place(index: int, row: dict[str, Any]) -> str:
    """Where a row came from, as a person finds it."""
    source = row.get("source", {})
    file = source.get("file", "the dataset")
    return f"line {source['line']} of {file}" if "line" in source else f"row {source.get('index', index)} of {file}"
