"""What a chat template is told: messages, calls and tools in the form that it reads, and texts as texts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

from appliance.data.calls import SCHEMAS
from appliance.data.thoughts import CLOSE, OPEN, THOUGHT
from appliance.errors import InvalidInput

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None

_THOUGHT_MARKS = (OPEN, CLOSE)
"""They may be special tokens too, and stand in the texts that a model has answered with."""
_JOINER = "\u2060"
"""A character without width, at which no line is broken."""
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""What templates call a thought that is a field of its own."""
_SHORT = 9
_ASKS_FOR_SHORT_IDS = re.compile(r"\|\s*length\s*!=\s*9")
_READS_THOUGHTS = re.compile(r"</think>|reasoning_content|message\.(?:thinking|reasoning)\b|\[['\"]thinking['\"]\]")


def with_call_ids(messages: Sequence[Message], *, short: bool = False) -> list[Message]:
    """The messages with an id for every call and its result, as clients send them: some templates refuse others.

    Ids that are missing are of nine letters and digits, as Mistral's templates ask for, and where these are `short`, so
    are all others.
    """
    found: list[Message] = []
    unanswered: list[str] = []
    for message in messages:
        if isinstance(calls := message.get("tool_calls"), list) and all(isinstance(call, dict) for call in calls):
            ids = [call.get("id") or f"call{len(found):03}{number:02}" for number, call in enumerate(calls)]
            unanswered += ids
            named = [{**call, "id": _short(id) if short else id} for call, id in zip(calls, ids, strict=True)]
            found.append({**message, "tool_calls": named})
        elif message["role"] == "tool" and unanswered:
            id = message.get("tool_call_id") or unanswered[0]
            unanswered = [other for other in unanswered if other != id]
            found.append({**message, "tool_call_id": _short(id) if short else id})
        else:
            found.append(message)
    return found


def _short(id: str) -> str:
    """An id of nine letters and digits that stands for another."""
    if len(id) == _SHORT and id.isalnum():
        return id
    return hashlib.sha256(id.encode()).hexdigest()[:_SHORT]


def take_as_text(tokenizer: Any) -> None:
    """Let the tokenizer's chat template be told, from now on, texts in which no special token is spelled."""
    tokenizer.apply_chat_template = partial(_apply_to_texts, tokenizer.apply_chat_template, special_tokens(tokenizer))


def _apply_to_texts(apply: Any, special: re.Pattern[str], conversation: Any, *arguments: Any, **options: Any) -> Any:
    if options.get("tools"):
        options["tools"] = _texts_within(options["tools"], special)
    return apply([_as_text(message, special) for message in conversation], *arguments, **options)


def as_text(text: str, special: re.Pattern[str]) -> str:
    """A text with an invisible character in what would be taken for a special token."""
    return special.sub(_break, text)


def _as_text(message: Message, special: re.Pattern[str]) -> Message:
    """The message, whoever says it, with its texts as texts."""
    said = {key: message[key] for key in ("content", "tool_calls", *THOUGHT_FIELDS) if message.get(key)}
    return {**message, **_texts_within(said, special)}


def _texts_within(value: Any, special: re.Pattern[str]) -> Any:
    """`value`, as JSON has it, with every text in it as a text, names of keys too."""
    if isinstance(value, str):
        return as_text(value, special)
    if isinstance(value, list | tuple):
        return [_texts_within(item, special) for item in value]
    if isinstance(value, dict):
        return {as_text(str(key), special): _texts_within(item, special) for key, item in value.items()}
    return value


def _break(found: re.Match[str]) -> str:
    token = found[0]
    return token if token in _THOUGHT_MARKS or len(token) < 2 else token[0] + _JOINER + token[1:]


def as_read(tokenizer: Any, messages: Sequence[Message]) -> list[Message]:
    """The messages as chat templates read them: the arguments of calls as objects, which clients send as texts, and a
    thought by the names that templates have for it. What spells a special token in a text is text.

    Where the template knows no thoughts, those that stand in a text are left there.
    """
    thinks = bool(_READS_THOUGHTS.search(str(tokenizer.chat_template)))
    special = special_tokens(tokenizer)
    read = (
        _answer_as_read(message, thinks) if message["role"] == "assistant" else message
        for message in with_call_ids(messages, short=bool(_ASKS_FOR_SHORT_IDS.search(str(tokenizer.chat_template))))
    )
    return [_as_text(message, special) for message in read]


def _answer_as_read(message: Message, thinks: bool) -> Message:
    read = dict(message)
    if calls := message.get("tool_calls"):
        read["tool_calls"] = [_call_as_read(call) for call in calls]
    thought, text = next((message[name] for name in THOUGHT_FIELDS if message.get(name)), None), message.get("content")
    if thinks and not thought and isinstance(text, str) and (found := THOUGHT.match(text)):
        thought, read["content"] = found[1].strip(), found[2].lstrip()
    if thinks and thought:
        read |= dict.fromkeys(THOUGHT_FIELDS, thought)
    return read


def tool_as_read(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as vLLM gives it to a template, whatever a row or a client has beside that, or leaves out."""
    function = tool.get("function", tool)
    if not isinstance(function, dict) or "name" not in function:
        return tool
    schema = next((function[key] for key in SCHEMAS if function.get(key) is not None), None)
    told = {"name": function["name"], "description": function.get("description"), "parameters": schema}
    if function.get("strict") is not None:
        told["strict"] = function["strict"]
    return {"type": "function", "function": told}


def _call_as_read(call: Any) -> dict[str, Any]:
    """A call with its arguments as an object. Raises InvalidInput where it is none."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidInput("bad_tool_call", "a tool call has no function with a name", "mend the call")
    arguments = function.get("arguments") or {}
    try:
        given = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        given = None
    if not isinstance(given, dict):
        raise InvalidInput(
            "bad_tool_call", f"the arguments of {function['name']!r} are no JSON object", "mend the call"
        )
    return {**call, "function": {**function, "arguments": given}}


def tools_as_read(tokenizer: Any, tools: Tools) -> Tools:
    """The tools as templates are told of them; None where there are none."""
    special = special_tokens(tokenizer)
    return [_texts_within(tool_as_read(tool), special) for tool in tools] if tools else None


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """What finds the special tokens of a tokenizer in a text."""
    return _special_tokens(tuple(sorted(tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer))))))


@lru_cache
def _special_tokens(forms: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted((form for form in forms if form.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that are no text: those of the template, and others of the kind."""
    added = tokenizer.added_tokens_decoder
    return frozenset(tokenizer.all_special_ids) | {token for token, about in added.items() if about.special}
