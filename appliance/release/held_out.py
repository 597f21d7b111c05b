"""Which conversations a run's models are compared on: the held-out set, and rows that its last stage trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from appliance.data.dataset import HELD_OUT_AT_MOST, Dataset, Row, answered
from appliance.data.render import Conversation, render_conversation
from appliance.home import Home
from appliance.release.plain import PLAIN
from appliance.train.recipe import Recipe

LEAST_ROWS = 64
ENOUGH_TOKENS = 20_000
"""A set has at most HELD_OUT_AT_MOST rows, and from LEAST_ROWS on not more than hold ENOUGH_TOKENS in all."""
LAST_STAGE_ROWS = 32
LONGEST_GIVEN = 2048
"""Tokens of a row on which an adapter from elsewhere is judged."""


@dataclass(frozen=True)
class HeldOutSet:
    """Conversations to measure the loss on; `held_out` is False where nothing was and others stand in."""

    conversations: list[Row]
    held_out: bool
    plain: bool = False
    """Whether they have nothing to do with what was trained."""


@dataclass(frozen=True)
class Answered:
    """A conversation of the last stage, and what that stage does to its answer."""

    conversation: Row
    sign: int
    """1: made likelier than the reference finds it, -1: less likely, 0: simply trained."""


def judged_on(recipe: Recipe) -> tuple[str, int] | None:
    """Dataset id and longest row in tokens that a run is judged on: the first SFT stage's, else the first stage's."""
    if recipe.given and recipe.given.dataset:
        return recipe.given.dataset, LONGEST_GIVEN
    stages = [stage for stage in recipe.chain() if stage.method == "sft"] or recipe.chain()
    return (stages[0].dataset, stages[0].max_length) if stages else None


@dataclass(frozen=True)
class Preferred:
    """Answers that the last stage is to make likelier, and such as it is to make less likely."""

    good: list[Row]
    bad: list[Row]
    pairs: bool
    """Whether the two lists are answers to the same prompts, one after the other."""


def held_out_set(home: Home, recipe: Recipe, tokenizer: Any) -> HeldOutSet:
    """What the run of `recipe` is measured on; PLAIN conversations where it has no data.

    Rows that training has left out for their length are left out here.
    """
    judged = judged_on(recipe)
    if judged is None:
        return HeldOutSet(PLAIN, held_out=False, plain=True)
    id, longest = judged
    dataset = Dataset.open(home, id)
    train, held_out = dataset.split(recipe.eval_share)
    for indices in (held_out, train):
        rows = (conversation(dataset.rows[index]) for index in indices if dataset.rows[index].get("label", True))
        if found := _enough(tokenizer, rows, longest):
            return HeldOutSet(found, held_out=indices is held_out)
    return HeldOutSet(PLAIN, held_out=False, plain=True)


def last_stage_rows(home: Home, recipe: Recipe, tokenizer: Any) -> list[Answered]:
    """Conversations that the last stage has trained on, spread over its rows; none where nothing was trained here."""
    return _of_last_stage(home, recipe, tokenizer, held_out=False)


def preferred(home: Home, recipe: Recipe, tokenizer: Any) -> Preferred | None:
    """Held-out answers of the last stage by which a preference is seen; None where it learns none, or has not both."""
    answered = _of_last_stage(home, recipe, tokenizer, held_out=True)
    good, bad = ([one.conversation for one in answered if one.sign == sign] for sign in (1, -1))
    return Preferred(good, bad, pairs=recipe.stages[-1].method == "dpo") if good and bad else None


def _of_last_stage(home: Home, recipe: Recipe, tokenizer: Any, *, held_out: bool) -> list[Answered]:
    """Conversations of the last stage's dataset, held out or trained on; none where nothing was trained here."""
    if not recipe.stages:
        return []
    stage = recipe.stages[-1]
    dataset = Dataset.open(home, stage.dataset)
    chosen = dataset.split(recipe.eval_share)[held_out]
    if dataset.kind != "unpaired":
        return _spread(tokenizer, dataset, chosen, LAST_STAGE_ROWS, stage.max_length)
    labels = {index: dataset.rows[index]["label"] for index in chosen}
    by_label = ([index for index in chosen if labels[index] == label] for label in (True, False))
    return [
        answer
        for indices in by_label
        for answer in _spread(tokenizer, dataset, indices, LAST_STAGE_ROWS // 2, stage.max_length)
    ]


def render_answered(tokenizer: Any, rows: Iterable[Answered]) -> list[Conversation]:
    """The conversations of `rows` through a tokenizer's own template."""
    return render(tokenizer, [row.conversation for row in rows])


def render(tokenizer: Any, rows: Iterable[Row]) -> list[Conversation]:
    """Conversations through a tokenizer's own template."""
    return [_render(tokenizer, row) for row in rows]


def conversation(row: Row) -> Row:
    """A row of messages as it is, another as the conversation with its answer: the chosen one, or the one judged."""
    if "messages" in row:
        return row
    return _answered_by(row, "chosen" if "chosen" in row else "completion")


def _spread(tokenizer: Any, dataset: Dataset, indices: list[int], count: int, longest: int) -> list[Answered]:
    """The answers of `count` rows spread over those at `indices`, without rows of more than `longest` tokens."""
    step = max(1, len(indices) // count)
    rows = (_answered(dataset.rows[index]) for index in indices[::step])
    short = (row for row in rows if all(_length(one) <= longest for one in render_answered(tokenizer, row)))
    return [answer for row in islice(short, count) for answer in row]


def _answered(row: Row) -> list[Answered]:
    if "messages" in row:
        return [Answered(row, 0)]
    if "chosen" in row:
        return [Answered(_answered_by(row, "chosen"), 1), Answered(_answered_by(row, "rejected"), -1)]
    return [Answered(_answered_by(row, "completion"), 1 if row["label"] else -1)]


def _answered_by(row: Row, part: str) -> Row:
    return {"messages": answered(row, part), "tools": row.get("tools")}


def _enough(tokenizer: Any, rows: Iterator[Row], longest: int) -> list[Row]:
    """As many of the first `rows` as a set has, without those of more than `longest` tokens."""
    found: list[Row] = []
    tokens = 0
    for row in rows:
        length = _length(_render(tokenizer, row))
        if length > longest:
            continue
        if len(found) == HELD_OUT_AT_MOST or (len(found) >= LEAST_ROWS and tokens + length > ENOUGH_TOKENS):
            break
        found.append(row)
        tokens += length
    return found


def _length(conversation: Conversation) -> int:
    """Tokens of the longest example of a conversation."""
    return max(len(one.input_ids) for one in conversation)


def _render(tokenizer: Any, row: Row) -> Conversation:
    return render_conversation(tokenizer, row["messages"], row.get("tools"))
