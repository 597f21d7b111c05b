"""The held-out loss that releases are judged by: which conversations, and how they are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from appliance.data.dataset import Dataset, Row
from appliance.data.render import Rendered, render_conversation
from appliance.home import Home
from appliance.train.recipe import Recipe
from appliance.train.rows import HELD_OUT_ROWS

TOKENS_AT_ONCE = 2048
"""Padded tokens in a forward pass: their logits over a large vocabulary are the peak of memory."""

PLAIN: list[Row] = [
    {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    for question, answer in (
        ("What is the capital of France?", "The capital of France is Paris."),
        ("Name three colours.", "Red, green and blue."),
        ("Why is the sky blue?", "Air scatters blue light more than red light, so blue reaches us from all sides."),
        ("Write a line of Python that prints the numbers from 1 to 5.", "print(*range(1, 6))"),
    )
]
"""Conversations to score on where there is no dataset: what counts is that two models find them equally likely."""


@dataclass(frozen=True)
class Score:
    """The loss over the assistant's turns: `nats` in total over `tokens` trained tokens."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens


@dataclass(frozen=True)
class Yardstick:
    """What a run's models are scored on; `held_out` is False where nothing was held out and training rows stand in."""

    conversations: list[Row]
    held_out: bool

    def render(self, tokenizer: Any) -> list[Rendered]:
        """The conversations through a tokenizer's own template."""
        return [_render(tokenizer, row) for row in self.conversations]


def judged_on(recipe: Recipe) -> tuple[str, int] | None:
    """Dataset id and longest row in tokens that a run is judged on: the first SFT stage's, else the first stage's."""
    if recipe.given and recipe.given.dataset:
        return recipe.given.dataset, TOKENS_AT_ONCE
    stages = [stage for stage in recipe.stages if stage.method == "sft"] or recipe.stages
    return (stages[0].dataset, stages[0].max_length) if stages else None


def yardstick(home: Home, recipe: Recipe, tokenizer: Any) -> Yardstick:
    """The conversations that the run of `recipe` is scored on, at most HELD_OUT_ROWS; PLAIN ones where it has no data.

    Rows that training has left out for their length are left out here.
    """
    judged = judged_on(recipe)
    if judged is None:
        return Yardstick(PLAIN, held_out=False)
    id, longest = judged
    dataset = Dataset.open(home, id)
    train, held_out = dataset.split(recipe.eval_share)
    fitting = _fitting(dataset, held_out[:HELD_OUT_ROWS], tokenizer, longest)
    if fitting:
        return Yardstick(fitting, held_out=True)
    return Yardstick(_fitting(dataset, train, tokenizer, longest)[:HELD_OUT_ROWS], held_out=False)


def conversation(row: Row) -> Row:
    """A row of messages as it is, another as the conversation with its answer: the chosen one, or the one judged."""
    if "messages" in row:
        return row
    answer = row["chosen"] if "chosen" in row else row["completion"]
    return {"messages": [*row["prompt"], *answer], "tools": row.get("tools")}


def _fitting(dataset: Dataset, indices: list[int], tokenizer: Any, max_length: int) -> list[Row]:
    found = (dataset.rows[index] for index in indices)
    rows = [conversation(row) for row in found if row.get("label", True)]
    return [row for row in rows if len(_render(tokenizer, row).input_ids) <= max_length]


def _render(tokenizer: Any, row: Row) -> Rendered:
    return render_conversation(tokenizer, row["messages"], row.get("tools"))


@torch.inference_mode()
def score(model: Any, conversations: Sequence[Rendered]) -> Score:
    """Score `model` on rendered conversations, of which there must be one or more."""
    nats, tokens = 0.0, 0
    for batch in _batches(conversations):
        width = max(len(row.input_ids) for row in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        attended, trained = torch.zeros_like(ids), torch.zeros(len(batch), width, dtype=torch.bool)
        for at, row in enumerate(batch):
            length = len(row.input_ids)
            ids[at, :length] = torch.tensor(row.input_ids)
            trained[at, :length] = torch.tensor(row.trained)
            attended[at, :length] = 1
        logits = model(input_ids=ids.to(model.device), attention_mask=attended.to(model.device), use_cache=False).logits
        counted = trained[:, 1:].to(logits.device)
        wanted = ids[:, 1:].to(logits.device)[counted]
        nats += float(functional.cross_entropy(logits[:, :-1][counted].float(), wanted, reduction="sum"))
        tokens += len(wanted)
    return Score(nats, tokens)


def _batches(conversations: Sequence[Rendered]) -> list[list[Rendered]]:
    """The conversations by length, in batches of at most TOKENS_AT_ONCE padded tokens."""
    batches: list[list[Rendered]] = []
    for row in sorted(conversations, key=lambda row: len(row.input_ids)):
        if batches and (len(batches[-1]) + 1) * len(row.input_ids) <= TOKENS_AT_ONCE:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
