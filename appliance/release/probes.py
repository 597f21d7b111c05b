"""The probes: prompts that a release's engine is asked before it may be released (gates 3 and 4)."""

from __future__ import annotations

import json
import re
from typing import Any

from appliance.data.dataset import Dataset, Row, prompt_group, prompt_messages
from appliance.data.render import render_conversation, render_prompt
from appliance.data.template_input import Message, with_call_ids
from appliance.home import Home
from appliance.release.held_out import conversation, judged_on
from appliance.supervisor.engines import Probe
from appliance.train.recipe import Recipe

PROBES_FROM_DATA = 8
CANDIDATES = 32
"""Rows looked at for those."""
GENERIC_PROMPTS = ("Say hello.", "What is the capital of France?")
ANSWER_TOKENS = 512
"""What any answer may take: a model that was hardly changed answers as its base does, at more length than the rows. One
that ends sooner costs no more for it."""
ANSWER_SLACK = 64
"""Tokens that an answer may have beyond twice the length of the row's own, where that comes to more."""
THOUGHT_TOKENS = 2048
"""What a thought may take before the answer."""
_THOUGHT = re.compile("think|reasoning", re.IGNORECASE)


def make_probes(home: Home, recipe: Recipe, tokenizer: Any) -> list[Probe]:
    """Prompts of the run's training data, then generic ones, as the trainer's tokenizer renders them.

    Those from the data are spread over it, from prompts of one turn to those of the most; each is another prompt. Rows
    too long to be trained on are left out.
    """
    thought = THOUGHT_TOKENS if _THOUGHT.search(str(tokenizer.chat_template)) else 0
    probes = []
    if judged := judged_on(recipe):
        id, longest = judged
        dataset = Dataset.open(home, id)
        train, _ = dataset.split(recipe.eval_share)
        candidates = [dataset.rows[index] for index in evenly(_by_turns(dataset, train), CANDIDATES)]
        asked = [_probe(tokenizer, row, thought, longest) for row in candidates]
        probes = evenly([probe for probe in asked if probe], PROBES_FROM_DATA)
    for prompt in GENERIC_PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        probes.append(Probe(messages, render_prompt(tokenizer, messages), ANSWER_TOKENS + thought, thought))
    return probes


def _by_turns(dataset: Dataset, indices: list[int]) -> list[int]:
    """Of the rows at `indices` one of each prompt, in the order of their turns."""
    turns = {}
    for index in indices:
        row = dataset.rows[index]
        turns[prompt_group(row)] = (len(prompt_messages(row)), index)
    return [index for _, index in sorted(turns.values())]


def _probe(tokenizer: Any, row: Row, thought: int, longest: int) -> Probe | None:
    """The prompt of a row, with room for an answer and a thought; None where the row has more than `longest` tokens."""
    prompt, tools = _as_clients_send(prompt_messages(row)), row.get("tools")
    ids = render_prompt(tokenizer, prompt, tools)
    length = len(render_conversation(tokenizer, conversation(row)["messages"], tools)[-1].input_ids)
    room = max(ANSWER_TOKENS, 2 * (length - len(ids)) + ANSWER_SLACK)
    return Probe(prompt, ids, room + thought, thought, tools=tools) if length <= longest else None


def _as_clients_send(messages: list[Message]) -> list[Message]:
    """The messages in OpenAI's form, in which calls have their arguments as a text."""
    return [
        {
            key: [_as_a_text(call) for call in value] if key == "tool_calls" else value
            for key, value in message.items()
            if key != "weight"
        }
        for message in with_call_ids(messages)
    ]


def _as_a_text(call: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}


def evenly(found: list[Any], count: int) -> list[Any]:
    """At most `count` of the list, from its first to its last."""
    if len(found) <= count:
        return found
    return [found[round(number * (len(found) - 1) / (count - 1))] for number in range(count)]
