"""From a dataset's rows to a method's examples, with everything checked that would train badly in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from appliance.data.dataset import Dataset, answered
from appliance.data.render import render_conversation
from appliance.errors import InvalidInput
from appliance.train.recipe import Stage

Example = dict[str, Any]
"""Columns named as the method's trainer reads them: token ids, and KTO's label."""

IGNORED = -100
"""The label of a token that the loss leaves out."""

HELD_OUT_ROWS = 64
"""So many of the held-out rows are evaluated in training, which thus stays a small share of it: the first, a draw."""


def tokenise(
    dataset: Dataset,
    indices: list[int],
    stage: Stage,
    examples_of: Callable[[dict[str, Any]], list[Example]],
    length: Callable[[Example], int],
) -> tuple[list[Example], int]:
    """Examples of the rows at `indices`, and how many rows were left out because they are too long.

    Raises InvalidInput naming the row that cannot be trained on, or how many rows are longer than `stage.max_length`
    unless `stage.drop_long`.
    """
    examples, too_long = [], []
    for index in indices:
        row = dataset.rows[index]
        try:
            found = examples_of(row)
        except InvalidInput as error:
            raise InvalidInput(error.code, f"{_place(index, row)}: {error.message}", error.next) from None
        longest = max(map(length, found), default=0)
        if longest > stage.max_length:
            too_long.append((longest, _place(index, row)))
        else:
            examples += found
    if too_long and not stage.drop_long:
        longest, place = max(too_long)
        raise InvalidInput(
            "row_too_long",
            f"{len(too_long)} rows are longer than max_length = {stage.max_length} tokens; "
            f"the longest is {place} with {longest}",
            f"set max_length = {longest}, or drop_long = true to leave them out",
        )
    return examples, len(too_long)


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


def _place(index: int, row: dict[str, Any]) -> str:
    """Where a row came from, as a person finds it."""
    source = row.get("source", {})
    file = source.get("file", "the dataset")
    return f"line {source['line']} of {file}" if "line" in source else f"row {source.get('index', index)} of {file}"
