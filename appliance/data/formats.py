"""From a record in one of the known formats to the canonical row, or the reason why not."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from appliance.data.dataset import Kind, Row

Message = dict[str, Any]
Parts = dict[str, list[Message]]
"""The lists of messages that a row consists of, by name."""

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_SPEAKER = {"role", "from"}
_MAY_FOLLOW = {"": ("user",), "user": ("assistant",), "assistant": ("user", "tool"), "tool": ("assistant", "tool")}


class Dropped(Exception):
    """Why a record is no row: a code for programs, a reason for a person."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Canonical:
    """A record as a row: OpenAI-style `messages`; or `prompt`, `chosen` and `rejected` as lists of such messages; or
    `prompt` and `completion` as such lists, with a `label` that says whether the completion is wanted.

    `trimmed` says that white space was taken off around an answer: a header that runs into it would be tokenised
    otherwise in training than in use.
    """

    format: str
    row: Row
    trimmed: bool


def to_canonical(value: Any, format: str | None = None) -> Canonical:
    """The row that `value` is, in `format` or the one that its keys show. Raises Dropped."""
    if not isinstance(value, dict):
        raise Dropped("not_an_object", f"it is {_kind(value)}, not an object")
    found = format or detect(value)
    if found is None:
        raise Dropped("unknown_format", f"its keys are of no known format: {shown_keys(value)}")
    lacking = [key for key in _REQUIRED[found] if key not in value]
    if lacking:
        raise Dropped("unknown_format", f"it lacks `{lacking[0]}` of {found}; its keys are {shown_keys(value)}")
    parts = _CONVERT[found](value)
    row: Row = {part: _trimmed(messages) for part, messages in parts.items()}
    trimmed = row != parts
    if "completion" in row:
        row["label"] = _verdict(value)
    if tools := _tools(value.get("tools")):
        row["tools"] = tools
    return Canonical(found, row, trimmed)


def detect(value: Mapping[str, Any]) -> str | None:
    """The format whose keys `value` has; None: of no known format."""
    found = next((name for name, keys in _REQUIRED.items() if all(key in value for key in keys)), None)
    judged = found in ("openai", "completion") and _verdict(value) is not None
    return "unpaired" if judged else found


def _alpaca(value: Mapping[str, Any]) -> Parts:
    messages = _system(value)
    history = value.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise Dropped("bad_history", "`history` is not a list of [question, answer]")
    for question, answer in history:
        messages += [_said("user", question, "history"), _said("assistant", answer, "history")]
    instruction = _text(value["instruction"], "instruction")
    given = _text(value.get("input"), "input")
    messages.append({"role": "user", "content": "\n\n".join(part for part in (instruction, given) if part.strip())})
    messages.append(_said("assistant", value["output"], "output"))
    return _conversation(messages)


def _sharegpt(value: Mapping[str, Any]) -> Parts:
    messages = _system(value) + _messages(value["conversations"], "conversations")
    if "chosen" in value and "rejected" in value:
        return _preference_row(messages, value)
    return _conversation(messages)


def _turns(value: Mapping[str, Any]) -> Parts:
    turns = value["conversation"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Dropped("unknown_format", "`conversation` is not a list of turns with `input` and `output`")
    messages: list[Message] = []
    for turn in turns:
        messages += _system(turn)
        messages += [_said("user", turn.get("input"), "input"), _said("assistant", turn.get("output"), "output")]
    return _conversation(messages)


def _openai(value: Mapping[str, Any]) -> Parts:
    return _conversation(_messages(value["messages"], "messages"))


def _preference(value: Mapping[str, Any]) -> Parts:
    if "prompt" in value:
        return _preference_row(_system(value) + _spoken("user", value["prompt"], "prompt"), value)
    answers = {key: _messages(value[key], key) for key in ("chosen", "rejected")}
    shared = _shared_prompt(answers["chosen"], answers["rejected"])
    rest = {key: messages[len(shared) :] for key, messages in answers.items()}
    return _preference_row(_system(value) + shared, rest)


def _shared_prompt(one: list[Message], other: list[Message]) -> list[Message]:
    """What two conversations begin with alike, up to the last turn that is to be answered."""
    alike = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    while alike and one[alike - 1]["role"] not in ("user", "tool"):
        alike -= 1
    if not alike:
        raise Dropped("no_shared_prompt", "`chosen` and `rejected` do not begin with the same turn of the user")
    return one[:alike]


def _completion(value: Mapping[str, Any]) -> Parts:
    prompt = _system(value) + _spoken("user", value["prompt"], "prompt")
    return _conversation(prompt + _after(prompt, _spoken("assistant", value["completion"], "completion")))


def _conversation(messages: list[Message]) -> Parts:
    _check_order(messages)
    if all(message.get("weight") == 0 for message in messages if message["role"] == "assistant"):
        raise Dropped("nothing_to_train", "every answer has the weight 0")
    return {"messages": messages}


def _preference_row(prompt: list[Message], value: Mapping[str, Any]) -> Parts:
    answers = {}
    for key in ("chosen", "rejected"):
        answer = _after(prompt, _spoken("assistant", value[key], key))
        if not answer:
            raise Dropped("empty_answer", f"`{key}` is empty")
        _check_order([*prompt, *answer])
        answers[key] = answer
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise Dropped("roles_out_of_order", "the prompt does not end with the user's turn")
    if _trimmed(answers["chosen"]) == _trimmed(answers["rejected"]):
        raise Dropped("chosen_equals_rejected", "the chosen answer is the rejected one")
    return {"prompt": prompt, **answers}


def _unpaired(value: Mapping[str, Any]) -> Parts:
    if _verdict(value) is None:
        raise Dropped("bad_label", f"`label` is {value['label']!r:.40}, neither true nor false")
    if "messages" in value:
        messages = _openai(value)["messages"]
    elif "prompt" in value and "completion" in value:
        messages = _completion(value)["messages"]
    else:
        raise Dropped("unknown_format", "beside `label` it has neither `messages` nor `prompt` and `completion`")
    start = max(index for index, message in enumerate(messages) if message["role"] == "user") + 1
    return {"prompt": messages[:start], "completion": messages[start:]}


def _verdict(value: Mapping[str, Any]) -> bool | None:
    """Whether `label` calls the answer wanted; None where it is no such judgement."""
    return {"true": True, "1": True, "false": False, "0": False}.get(str(value.get("label")).lower())


def _spoken(role: str, value: Any, key: str) -> list[Message]:
    """Messages given as a text that `role` says, or as messages, or as the JSON of messages."""
    if isinstance(value, str):
        held = _from_json(value) if value.lstrip().startswith("[{") else None
        if not isinstance(held, list) or not all(isinstance(item, dict) and item.keys() & _SPEAKER for item in held):
            return [_said(role, value, key)]
    return _messages(value, key)


def _after(prompt: list[Message], messages: list[Message]) -> list[Message]:
    """The messages without the prompt, where they repeat it."""
    return messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages


_CONVERT: dict[str, Callable[[Mapping[str, Any]], Parts]] = {
    "sharegpt": _sharegpt,
    "preference": _preference,
    "openai": _openai,
    "turns": _turns,
    "alpaca": _alpaca,
    "completion": _completion,
    "unpaired": _unpaired,
}
_REQUIRED = {
    "sharegpt": ("conversations",),
    "preference": ("chosen", "rejected"),
    "openai": ("messages",),
    "turns": ("conversation",),
    "alpaca": ("instruction", "output"),
    "completion": ("prompt", "completion"),
    "unpaired": ("label",),
}
FORMATS = tuple(_CONVERT)
"""Names of the formats, in the order in which they are tried."""
_OPTIONAL = ("input", "history", "system", "tools")
KEYS = tuple(dict.fromkeys([*(key for keys in _REQUIRED.values() for key in keys), *_OPTIONAL]))
"""The keys that the formats read."""


def _check_order(messages: list[Message]) -> None:
    """Raise Dropped unless the turns alternate, after one system message at most, and the assistant has the last."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        raise Dropped("empty_prompt", "it holds no messages")
    before = ""
    for message in turns:
        role = message["role"]
        if role not in _MAY_FOLLOW[before]:
            raise Dropped("roles_out_of_order", f"{role} follows {before or 'the start'}")
        if role == "user" and not message["content"].strip():
            raise Dropped("empty_prompt", "the user says nothing")
        if role == "assistant" and not message["content"].strip() and not message.get("tool_calls"):
            raise Dropped("empty_answer", "the assistant says nothing")
        before = role
    if before != "assistant":
        raise Dropped("roles_out_of_order", f"the last message is the {before}'s, so there is no answer to train on")


def _messages(value: Any, key: str) -> list[Message]:
    """Messages given as a list, as one, or as the JSON of either, with role and content or from and value."""
    held = _from_json(value)
    given = [held] if isinstance(held, dict) else held
    if not isinstance(given, list):
        raise Dropped("unknown_format", f"`{key}` is {_kind(value)}, not a list of messages")
    return [_message(item, key) for item in given]


def _message(item: Any, key: str) -> Message:
    if not isinstance(item, dict):
        raise Dropped("unknown_format", f"`{key}` holds {_kind(item)}, not a message")
    speaker = item.get("role", item.get("from"))
    content = item.get("content", item.get("value"))
    if not isinstance(speaker, str) or speaker.lower() not in _ROLES:
        shown = f"{speaker!r:.40}" if isinstance(speaker, str) else _kind(speaker)
        raise Dropped("bad_role", f"`{key}` has a message by {shown}, which is no known role")
    role = _ROLES[speaker.lower()]
    if speaker.lower() == "function_call":
        return {"role": role, "content": "", "tool_calls": _tool_calls(content)}
    message = _said(role, content, key)
    if role == "assistant" and item.get("tool_calls"):
        message["tool_calls"] = _tool_calls(item["tool_calls"])
    if role == "assistant" and item.get("weight") is not None:
        if item["weight"] not in (0, 1):
            raise Dropped("bad_weight", f"`weight` is {item['weight']!r:.40}, and can be 0 or 1")
        if item["weight"] == 0:
            message["weight"] = 0
    for field in ("name", "tool_call_id"):
        if isinstance(item.get(field), str):
            message[field] = item[field]
    return message


def _said(role: str, content: Any, key: str) -> Message:
    return {"role": role, "content": _text(content, key)}


def _text(content: Any, key: str) -> str:
    """A text given as a string, as text parts, or not at all."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if all(isinstance(part, str) for part in parts):
            return "".join(map(str, parts))
        raise Dropped("not_text", f"`{key}` has a part that is not text")
    raise Dropped("not_text", f"`{key}` is {_kind(content)}, not a text")


def _system(value: Mapping[str, Any]) -> list[Message]:
    text = _text(value.get("system"), "system")
    return [{"role": "system", "content": text}] if text.strip() else []


def _tool_calls(value: Any) -> list[dict[str, Any]]:
    """Calls in OpenAI's form with the arguments as an object, which is what chat templates read."""
    given = _from_json(value)
    calls = []
    for item in given if isinstance(given, list) else [given]:
        call = item.get("function", item) if isinstance(item, dict) else None
        arguments = _from_json(call.get("arguments", {})) if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or not isinstance(arguments, dict):
            raise Dropped("bad_tool_call", "a tool call has no `name` with `arguments`")
        calls.append({"type": "function", "function": {"name": call["name"], "arguments": arguments}})
    return calls


def _tools(value: Any) -> list[Any]:
    given = _from_json(value) or []
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise Dropped("bad_tools", "`tools` is not a list of tool descriptions")
    return given


def _from_json(value: Any) -> Any:
    """What a string holds as JSON, as ShareGPT and OpenAI files have it; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=lambda _: None) if value.strip() else None
    except (ValueError, RecursionError):
        return value


def _trimmed(messages: list[Message]) -> list[Message]:
    """The messages without white space around the assistant's texts."""
    return [
        {**message, "content": message["content"].strip()} if message["role"] == "assistant" else message
        for message in messages
    ]


def kind_of(row: Row) -> Kind:
    """What a canonical row can be trained by."""
    return "messages" if "messages" in row else "preference" if "chosen" in row else "unpaired"


def shown_keys(value: Mapping[str, Any]) -> str:
    """The keys of a row, as many as fit into a message."""
    shown = ", ".join(list(value)[:8])[:120] or "none"
    return shown.encode(errors="replace").decode()


def _kind(value: Any) -> str:
    names = {
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")
