"""Tools and their calls, from the forms in which files have them to OpenAI's, which chat templates read."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from appliance.data.dropped import Dropped, from_json
from appliance.data.fields import unread
from appliance.data.thoughts import CLOSE

if TYPE_CHECKING:
    from appliance.data.messages import Message, Reading

ARGUMENTS = ("arguments", "args", "parameters", "input")
SCHEMAS = ("parameters", "input_schema", "inputSchema")
"""What a tool's description calls the schema of its arguments."""
_IN_CALLS = frozenset({"function", "type", "id", "tool_call_id", "index", "name", *ARGUMENTS})
_IN_TOOLS = frozenset({"function", "type", "name", "description", "strict", *SCHEMAS})
_CALL = re.compile(r"<tool_call>\s*(\{.*?\}|\[.*?\])\s*</tool_call>", re.DOTALL)
_CALLS_AT_THE_END = re.compile(rf"(?:\s*{_CALL.pattern})+\s*\Z", re.DOTALL)
_WHAT_TOOLS_ARE_FOR = re.compile(
    r"\s*# Tools\s+You may call one or more functions to assist with the user query\."
    r".*?<tools>\s*</tools>\s*For each function call,.*?XML tags:\s*<tool_call>.*?</tool_call>\s*",
    re.DOTALL,
)
"""What Qwen's templates say around the tools, once these are taken out: their own words, and not the row's."""
_ALL_ABOUT_TOOLS = "You are a function calling AI model"
"""How Hermes' system prompts begin, which say nothing else."""
MARKS_OF_CALLS = ("<tool_call>", "<function=", "<functioncall>")
_RESULT = re.compile(r"\s*<tool_response>\s*(.*?)\s*</tool_response>\s*", re.DOTALL)
_TOOLS = re.compile(r"<tools>\s*(.*?)\s*</tools>", re.DOTALL)


def tool_calls(reading: Reading, value: Any) -> list[dict[str, Any]]:
    """Calls with their arguments as objects. Raises Dropped for what has no name or no arguments."""
    given = from_json(value)
    calls = []
    for item in given if isinstance(given, list) else [given]:
        call = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise Dropped("bad_tool_call", "a tool call has no `name` with `arguments`")
        # Some files have the JSON of the arguments written as JSON once more.
        named = [key for key in ARGUMENTS if call.get(key) is not None] or [key for key in ARGUMENTS if key in call]
        held = call[named[0]] if named else None
        arguments = {} if held == "" else from_json(from_json(held))
        if not isinstance(arguments, dict):
            raise Dropped("bad_tool_call", f"the call of {call['name']!r:.40} has no `arguments` that are an object")
        if _has_no_number(arguments):
            raise Dropped("bad_tool_call", f"the call of {call['name']!r:.40} has NaN or an infinite number")
        others = {*unread(item, _IN_CALLS), *(() if call is item else unread(call, _IN_CALLS)), *named[1:]}
        if call is not item:
            others |= {key for key in ("name", *ARGUMENTS) if item.get(key) not in (None, "", call.get(key))}
        reading.unread += [f"messages[].tool_calls[].{key}" for key in sorted(others)]
        ids = [
            one[key] for one in (item, call) for key in ("id", "tool_call_id") if isinstance(one.get(key), str | int)
        ]
        id = str(ids[0]) if ids else None
        if any(str(one) != id for one in ids):
            reading.unread.append("messages[].tool_calls[].tool_call_id")
        calls.append(
            {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
            | ({"id": id} if id else {})
        )
    return calls


def _has_no_number(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_no_number, value.values() if isinstance(value, dict) else value))
    return isinstance(value, float) and not math.isfinite(value)


def tools_of(reading: Reading, value: Any) -> list[Any]:
    """Tool descriptions given as a list or its JSON, as OpenAI has them. Raises Dropped."""
    given = from_json(value) or []
    given = [from_json(tool) for tool in given] if isinstance(given, list) else given
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise Dropped("bad_tools", "`tools` is not a list of tool descriptions")
    for tool in given:
        about = tool.get("function", tool)
        others = {*unread(tool, _IN_TOOLS), *(unread(about, _IN_TOOLS) if isinstance(about, dict) else ())}
        if about is not tool:
            others |= {key for key in ("name", "description", *SCHEMAS) if tool.get(key)}
        if isinstance(about, dict):
            others |= {*[key for key in SCHEMAS if about.get(key)][1:]}
        reading.unread += [f"tools[].{key}" for key in sorted(others)]
    return list(map(_with_schema, given))


def _with_schema(tool: dict[str, Any]) -> dict[str, Any]:
    """The tool with its arguments as a JSON schema, where it has them by their names alone, as xLAM's files do."""
    about = tool.get("function", tool)
    named = about.get("parameters") if isinstance(about, dict) else None
    if not isinstance(named, dict) or not named or "properties" in named or "$ref" in named:
        return tool
    if not all(isinstance(one, dict) for one in named.values()):
        return tool
    about = {**about, "parameters": {"type": "object", "properties": named}}
    return {**tool, "function": about} if "function" in tool else about


def called_in_text(reading: Reading, messages: list[Message]) -> list[Message]:
    """The messages with the calls and results that are written into their texts in Hermes' marks taken out of these.

    A system prompt that describes the tools in such marks gives way to the template's own words for them.
    """
    calling = [message for message in messages if "<tool_call>" in message["content"]]
    if not any([message["role"] == "assistant" and _calls_in(message) for message in calling]):
        return messages
    found: list[Message] = []
    for message in messages:
        text = message["content"]
        if message["role"] == "assistant" and (calls := _calls_in(message)):
            held = [from_json(call, python=True) for call in _CALL.findall(calls)]
            made = tool_calls(reading, [call for one in held for call in (one if isinstance(one, list) else [one])])
            message = {**message, "content": text[: len(text) - len(calls)].rstrip(), "tool_calls": made}
        elif message["role"] in ("tool", "user") and (results := _RESULT.findall(text)) and not _RESULT.sub("", text):
            found += [{**message, "role": "tool", "content": result} for result in results[:-1]]
            message = {**message, "role": "tool", "content": results[-1]}
        elif message["role"] == "system" and (tools := _described(text)):
            reading.found_tools(tools)
            reading.odd.append("tools_in_text")
            if not (rest := _without_tools(text)):
                continue
            message = {**message, "content": rest}
        found.append(message)
    return found


def _calls_in(message: Message) -> str:
    """The calls with which the text of an answer ends; empty: none, or such as are thought over, quoted or shown."""
    if message.get("tool_calls"):
        return ""
    text = message["content"]
    answer = text[text.rfind(CLOSE) + len(CLOSE) :] if CLOSE in text else text
    if not (calls := _CALLS_AT_THE_END.search(answer)):
        return ""
    before = answer[: calls.start()]
    return "" if "<tool_call>" in before or before.count("```") % 2 else calls[0]


def _described(system: str) -> list[dict[str, Any]]:
    """The tools that a system prompt describes in Hermes' marks; none where it describes none."""
    found: list[dict[str, Any]] = []
    for described in _TOOLS.findall(system):
        tools = from_json(described, python=True)
        if not isinstance(tools, list):
            tools = [from_json(line, python=True) for line in described.splitlines() if line.strip()]
        if all(isinstance(tool, dict) for tool in tools):
            found += tools
    return found


def _without_tools(system: str) -> str:
    """What a system prompt says beside the tools that it describes, and beside how these are called."""
    if system.lstrip().startswith(_ALL_ABOUT_TOOLS):
        return ""
    return _WHAT_TOOLS_ARE_FOR.sub("\n", _TOOLS.sub("<tools></tools>", system)).replace("<tools></tools>", "").strip()
