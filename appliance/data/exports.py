"""Rows as vendors' fine-tuning files and chat programs' exports have them."""

from __future__ import annotations

import json
import re
from typing import Any

from appliance.data.calls import tool_calls
from appliance.data.dropped import Dropped, from_json, kind_name
from appliance.data.fields import unread
from appliance.data.messages import Message, Reading, branch
from appliance.data.shapes import Parts, Value, after_system, conversation

_TURNS = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE): ?")
_SPEAKERS = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_END = "<|endoftext|>"
_CALL = re.compile(r"<functioncall>\s*(\{.*\})\s*\Z", re.DOTALL)
_VERTEX_FUNCTIONS = ("functionCall", "function_call", "functionResponse", "function_response")
_IN_VERTEX_PARTS = frozenset({"text", "thought", "thoughtSignature", "thought_signature", *_VERTEX_FUNCTIONS})
_QUOTED_ARGUMENTS = re.compile(r"""("arguments":\s*)'(.*)'\s*(?=\})""", re.DOTALL)
_FUNCTIONS = re.compile(r"\s*with access to the following functions\..*?(?=\{)", re.DOTALL)


def read_vertex(reading: Reading, value: Value) -> Parts:
    """Google's `contents` of `parts`, after a `systemInstruction`."""
    contents = value["contents"]
    if not isinstance(contents, list) or not all(isinstance(item, dict) for item in contents):
        raise Dropped("unknown_format", f"`contents` is {kind_name(contents)}, not a list of messages")
    messages: list[Message] = []
    given = {key: value[key] for key in ("systemInstruction", "system_instruction") if value.get(key)}
    texts = [
        reading.text(told.get("parts", told.get("text")) if isinstance(told, dict) else told, key)
        for key, told in given.items()
    ]
    if len(set(texts)) > 1:
        raise Dropped("two_system_messages", "`system_instruction` is another than `systemInstruction`")
    messages += [{"role": "system", "content": text} for text in texts[:1] if text]
    if value.get("completions"):
        raise Dropped("unknown_format", "`completions` beside `contents`, Vertex's preferences, are not read")
    for item in contents:
        reading.unread += [f"contents[].{key}" for key in unread(item, {"role", "parts"})]
        messages += _vertex_turn(reading, str(item.get("role") or "user"), item.get("parts"))
    if isinstance(tools := value.get("tools"), list):
        reading.tools = [tool for one in tools for tool in _declared(reading, one)]
    return conversation(reading, after_system(reading, value, messages))


def _declared(reading: Reading, tools: Any) -> list[Any]:
    """The functions that an item of `tools` declares. Raises Dropped."""
    if not isinstance(tools, dict):
        raise Dropped("bad_tools", "`tools` is not a list of tool descriptions")
    functions = next(
        (tools[key] for key in ("functionDeclarations", "function_declarations") if tools.get(key)), [tools]
    )
    if not isinstance(functions, list):
        raise Dropped("bad_tools", "`tools` is not a list of tool descriptions")
    if functions != [tools] and (others := unread(tools, {"functionDeclarations", "function_declarations"})):
        reading.unread += [f"tools[].{key}" for key in others]
    return functions


def _vertex_turn(reading: Reading, role: str, parts: Any) -> list[Message]:
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise Dropped("unknown_format", f"`parts` is {kind_name(parts)}, not a list of parts")
    for part in parts:
        for key in _VERTEX_FUNCTIONS:
            if key in part and not isinstance(part[key], dict):
                raise Dropped("bad_tool_call", f"`{key}` is {kind_name(part[key])}, not an object")
        reading.unread += [f"contents[].parts[].{key}" for key in unread(part, _IN_VERTEX_PARTS)]
    calls = [part[key] for part in parts for key in ("functionCall", "function_call") if key in part]
    answers = [part[key] for part in parts for key in ("functionResponse", "function_response") if key in part]
    texts = [part for part in parts if "text" in part and not part.get("thought")]
    thoughts = [reading.text(part["text"], "parts") for part in parts if "text" in part and part.get("thought")]
    if len(calls) + len(answers) + len(texts) + len(thoughts) < len(parts):
        raise Dropped("not_text", "`parts` has a part that is neither text nor a function's")
    said: list[Message] = [
        {"role": "tool", "content": _as_text(one.get("response")), "name": one.get("name")}
        | ({"tool_call_id": str(one["id"])} if one.get("id") else {})
        for one in answers
    ]
    reading.unread += [
        f"contents[].parts[].functionResponse.{key}"
        for one in answers
        for key in unread(one, {"id", "name", "response"})
    ]
    if thoughts and not (texts or calls):
        raise Dropped("cut_thought", "`contents` has a thought that is a message of its own, with no answer after it")
    if texts or calls:
        thought = {"reasoning_content": "\n".join(thoughts)} if thoughts else {}
        plain = [{key: item for key, item in part.items() if key != "thought"} for part in texts]
        message = reading.message({"role": role, "content": plain, **thought}, "parts")
        if calls and message["role"] != "assistant":
            raise Dropped("bad_tool_call", f"`functionCall` is the {message['role']}'s, who calls nothing")
        if calls:
            message["tool_calls"] = tool_calls(reading, [{"args": {}, **call} for call in calls])
        said.append(message)
    return said


def read_calls(reading: Reading, value: Value) -> Parts:
    """A question, and the calls that answer it."""
    calls = {"role": "assistant", "content": "", "tool_calls": tool_calls(reading, value["answers"])}
    return conversation(reading, after_system(reading, value, [reading.said("user", value["query"], "query"), calls]))


def read_transcript(reading: Reading, value: Value) -> Parts:
    """`USER: ... ASSISTANT: ...` in one text, with calls in it and the functions in the system prompt."""
    chat, system = value["chat"], value.get("system") or ""
    if not isinstance(chat, str) or not isinstance(system, str):
        raise Dropped("unknown_format", f"`chat` is {kind_name(chat)}, not a transcript")
    before, *turns = _TURNS.split(chat)
    if before.strip() or not turns:
        raise Dropped("unknown_format", "`chat` does not begin with `USER:`")
    tools, told = _functions(system.removeprefix("SYSTEM:").strip())
    reading.found_tools(tools)
    messages = reading.system({**value, "system": told})
    for who, words in zip(turns[::2], turns[1::2], strict=True):
        text = words.replace(_END, "").strip()
        found = _CALL.search(text) if who == "ASSISTANT" else None
        if found:
            call = _QUOTED_ARGUMENTS.sub(lambda quoted: quoted[1] + quoted[2], found[1])
            said = reading.said("assistant", text[: found.start()].strip(), "chat")
            messages.append({**said, "tool_calls": tool_calls(reading, call)})
        else:
            messages.append(reading.said(_SPEAKERS[who], text, "chat"))
    return conversation(reading, messages)


def _functions(system: str) -> tuple[list[Any] | None, str]:
    """The functions that a system prompt describes as JSON objects, and the prompt without them."""
    begin = _FUNCTIONS.search(system)
    if not begin:
        return None, system
    functions, at, decoder = [], begin.end(), json.JSONDecoder()
    try:
        while at < len(system):
            function, at = decoder.raw_decode(system, at)
            functions.append(function)
            at += len(system[at:]) - len(system[at:].lstrip())
    except ValueError:
        return None, system
    return functions, system[: begin.start()].rstrip(" ,") + "."


def read_chat(reading: Reading, value: Value) -> Parts:
    """A chat as Open WebUI exports it: the messages of its current branch."""
    chat = value["chat"]
    if not isinstance(chat, dict):
        raise Dropped("unknown_format", f"`chat` is {kind_name(chat)}, not a chat")
    read = {"messages", "history", "system", "params"}
    reading.unread += [f"chat.{key}" for key in unread(chat, read)]
    history = chat.get("history")
    every = history.get("messages") if isinstance(history, dict) else None
    given = chat.get("messages") or []
    if isinstance(every, dict) and isinstance(history, dict):
        given = branch(every, str(history.get("currentId")), "parentId") or given
        if len(given) < len(every):
            reading.odd.append("other_branches")
    params = chat.get("params")
    messages = after_system(reading, {"system": chat.get("system")}, reading.messages(given, "chat.messages"))
    if isinstance(params, dict):
        messages = after_system(reading, {"system": params.get("system")}, messages)
    return conversation(reading, after_system(reading, value, messages))


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(from_json(value), ensure_ascii=False)
