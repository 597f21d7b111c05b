"""How the shapes in which files have rows are read; formats.py lists them, exports.py has those of chat programs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from appliance.data.calls import called_in_text
from appliance.data.dropped import Dropped, from_json
from appliance.data.fields import IN_ROWS, REASONING, unread
from appliance.data.messages import SPEAKER, Message, Reading, think, trimmed

Parts = dict[str, list[Message]]
"""The lists of messages that a row consists of, by name."""
Value = Mapping[str, Any]
_THOUGHTS = frozenset(REASONING)
ASKED = ("prompt", "question", "query", "input")
ANSWERED = ("completion", "response", "answer", "output", "target")
"""Names of a question and of its answer."""


@dataclass(frozen=True)
class Shape:
    """A way in which files have a row: the keys that it must have and may have, and what reads them."""

    format: str
    keys: tuple[str, ...]
    read: Callable[[Reading, Value], Parts]
    optional: tuple[str, ...] = ()

    @cached_property
    def reads(self) -> frozenset[str]:
        return frozenset(self.keys + self.optional) | IN_ROWS


def read_alpaca(reading: Reading, value: Value) -> Parts:
    messages = [*reading.system(value), *_history(reading, value), *_instructed(reading, value)]
    answer = "response" if value.get("output") is None and "response" in value else "output"
    messages += _with_thought(reading, value, reading.spoken("assistant", value[answer], answer))
    return conversation(reading, messages)


def _with_thought(reading: Reading, value: Value, answer: list[Message]) -> list[Message]:
    """The messages with the thought that the row has beside its answer."""
    if _THOUGHTS.isdisjoint(value):
        return answer
    given = {key: reading.text(value[key], key) for key in REASONING if value.get(key)}
    if flags := [key for key, thought in given.items() if thought.strip().lower() in _FLAGS]:
        reading.odd.append("thought_is_a_flag")
        given = {key: thought for key, thought in given.items() if key not in flags}
    if given and answer and answer[-1]["role"] == "assistant" and not answer[-1].get("reasoning_content"):
        think(answer[-1], next(iter(given.values())))
    said = answer[-1].get("reasoning_content") if answer else None
    reading.unread += [key for key, thought in given.items() if thought != said]
    return answer


_FLAGS = frozenset({"on", "off", "true", "false", "yes", "no", "enabled", "disabled", "none", "low", "medium", "high"})
"""What files say of whether there was a thought, under keys that have the thought elsewhere."""


def _history(reading: Reading, value: Value) -> list[Message]:
    """The turns before the question, which are given as pairs."""
    history = from_json(value.get("history"))
    if not history:
        return []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise Dropped("bad_history", "`history` is not a list of [question, answer]")
    return [
        reading.said(role, text, "history")
        for turn in history
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _instructed(reading: Reading, value: Value) -> list[Message]:
    """The question that an instruction and what it is given make, or the turns that it is, of a dialogue."""
    given = [reading.text(value[key], key) for key in ("instruction", "input", "context") if value.get(key)]
    asked = "\n\n".join([part for part in given if part.strip()])
    return reading.dialogue(asked) or [{"role": "user", "content": asked}]


def read_sharegpt(reading: Reading, value: Value) -> Parts:
    return conversation(
        reading, after_system(reading, value, reading.messages(value["conversations"], "conversations"))
    )


def read_sharegpt_pair(reading: Reading, value: Value) -> Parts:
    prompt = after_system(reading, value, reading.messages(value["conversations"], "conversations"))
    return _preference_row(reading, prompt, value)


def read_turns(reading: Reading, value: Value) -> Parts:
    turns = value["conversation"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Dropped("unknown_format", "`conversation` is not a list of turns with `input` and `output`")
    if turns and all(turn.keys() & SPEAKER for turn in turns):
        return conversation(reading, after_system(reading, value, reading.messages(turns, "conversation")))
    messages = reading.system(value)
    for turn in turns:
        messages += reading.system(turn)
        messages += [
            reading.said("user", turn.get("input"), "input"),
            reading.said("assistant", turn.get("output"), "output"),
        ]
        reading.unread += [f"conversation[].{key}" for key in unread(turn, {"system", "input", "output"})]
    return conversation(reading, messages)


def read_openai(reading: Reading, value: Value) -> Parts:
    return conversation(reading, after_system(reading, value, reading.messages(value["messages"], "messages")))


def read_second_answer(reading: Reading, value: Value) -> Parts:
    """A conversation, and another answer in the place of its last."""
    messages = read_openai(reading, value)["messages"]
    if "unanswered" in reading.odd:
        why = "the last message is the user's, so that `rejected_response` stands beside no answer to it"
        raise Dropped("roles_out_of_order", why)
    end = len(messages) - 1
    return _preference_row(reading, messages[:end], {"chosen": messages[end:], "rejected": value["rejected_response"]})


def read_second_conversation(reading: Reading, value: Value) -> Parts:
    """Two whole conversations."""
    chosen = "chosen_messages" if "chosen_messages" in value else "messages"
    told = {key: value.get(key) for key in ("system", "system_prompt")}
    return read_preference(reading, {**told, "chosen": value[chosen], "rejected": value["rejected_messages"]})


def read_rejected_response(reading: Reading, value: Value) -> Parts:
    """ms-swift's question, its history, and two answers."""
    asked = [*_history(reading, value), *reading.spoken("user", value["query"], "query")]
    both = {"chosen": value["response"], "rejected": value["rejected_response"]}
    return _preference_row(reading, after_system(reading, value, asked), both)


def read_preferred_output(reading: Reading, value: Value) -> Parts:
    given = value["input"]
    if isinstance(given, dict):
        reading.found_tools(given.get("tools"))
        reading.unread += [f"input.{key}" for key in unread(given, {"messages", "tools"})]
        given = given.get("messages")
    prompt = reading.messages(given, "input")
    both = {"chosen": value["preferred_output"], "rejected": value["non_preferred_output"]}
    return _preference_row(reading, after_system(reading, value, prompt), both)


def read_instructed_preference(reading: Reading, value: Value) -> Parts:
    return _preference_row(reading, [*reading.system(value), *_instructed(reading, value)], value)


def read_preference(reading: Reading, value: Value) -> Parts:
    if (
        asked := next((key for key in ("prompt", "question", "input") if value.get(key) is not None), None)
    ) is not None:
        prompt = after_system(reading, value, reading.spoken("user", value[asked], asked))
        return _preference_row(reading, prompt, value)
    answers = {key: _whole(reading, value[key], key) for key in ("chosen", "rejected")}
    shared = _shared_prompt(answers["chosen"], answers["rejected"])
    rest = {key: messages[len(shared) :] for key, messages in answers.items()}
    return _preference_row(reading, after_system(reading, value, shared), rest)


def _whole(reading: Reading, value: Any, key: str) -> list[Message]:
    """A whole conversation, as messages or as a transcript."""
    turns = reading.transcript(value) if isinstance(value, str) else None
    return reading.messages(value, key) if turns is None else turns


def _shared_prompt(one: list[Message], other: list[Message]) -> list[Message]:
    """What two conversations begin with alike, up to the last turn that is to be answered."""
    alike = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    while alike and one[alike - 1]["role"] not in ("user", "tool"):
        alike -= 1
    if not alike:
        raise Dropped("no_shared_prompt", "`chosen` and `rejected` do not begin with the same turn of the user")
    return one[:alike]


def read_completion(reading: Reading, value: Value) -> Parts:
    asked, answered = _first(value, ASKED), _first(value, ANSWERED)
    first = [*_history(reading, value), *reading.spoken("user", value[asked], asked)]
    prompt = after_system(reading, value, first)
    answer = _after(prompt, reading.spoken("assistant", value[answered], answered))
    return conversation(reading, prompt + _with_thought(reading, value, answer))


def _first(value: Value, names: tuple[str, ...]) -> str:
    """The first of the names under which `value` has something, else the first that it has."""
    return next((name for name in names if value.get(name) is not None), None) or next(
        name for name in names if name in value
    )


def after_system(reading: Reading, value: Value, messages: list[Message]) -> list[Message]:
    """The messages after the row's own system message, which stands once where they begin with it."""
    own = reading.system(value)
    if own and messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() != own[0]["content"].strip():
            raise Dropped("two_system_messages", "`system` is another than the system message of the conversation")
        return messages
    return own + messages


def conversation(reading: Reading, messages: list[Message]) -> Parts:
    messages = reading.conversation(called_in_text(reading, messages))
    if all([message.get("weight") == 0 for message in messages if message["role"] == "assistant"]):
        raise Dropped("nothing_to_train", "every answer has the weight 0")
    return {"messages": messages}


def _preference_row(reading: Reading, prompt: list[Message], value: Value) -> Parts:
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise Dropped("roles_out_of_order", "the prompt does not end with the user's turn")
    answers = {}
    for key in ("chosen", "rejected"):
        answer = _after(prompt, _whole_answer(reading, value[key], key))
        if not answer:
            raise Dropped("empty_answer", f"`{key}` is empty")
        if len(answer) > 1 or answer[0]["role"] != "assistant":
            raise Dropped(
                "several_turns", f"`{key}` has {len(answer)} turns after the shared prompt, and not one answer"
            )
        if answer[0].get("weight") == 0:
            raise Dropped("nothing_to_train", f"`{key}` has the weight 0")
        answers[key] = answer
    for answer in answers.values():
        whole = reading.conversation([*prompt, *answer])
    if trimmed(answers["chosen"]) == trimmed(answers["rejected"]):
        raise Dropped("chosen_equals_rejected", "the chosen answer is the rejected one")
    return {"prompt": whole[:-1], **answers}


def _whole_answer(reading: Reading, value: Any, key: str) -> list[Message]:
    """An answer, or a conversation that ends with it, as messages or as a transcript."""
    turns = reading.transcript(value) if isinstance(value, str) else None
    whole = turns is not None and len(turns) > 1 and [turns[0]["role"], turns[-1]["role"]] == ["user", "assistant"]
    return turns if turns and whole else reading.spoken("assistant", value, key, whole=True)


def _after(prompt: list[Message], messages: list[Message]) -> list[Message]:
    """The messages without the prompt, where they repeat it, with its system message or without."""
    turns = [message for message in prompt if message["role"] != "system"]
    for again in (prompt, turns):
        if messages[: len(again)] == again:
            return messages[len(again) :]
    return messages
