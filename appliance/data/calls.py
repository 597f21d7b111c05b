"""Tools and their calls, from the forms in which files have them to OpenAI's, which chat templates read."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from appliance.data.dropped import Dropped, from_json
from appliance.data.fields import unread

if TYPE_CHECKING:
    from appliance.data.messages import Message, Reading

ARGUMENTS = ("arguments", "args", "parameters", "input")
SCHEMAS = ("parameters", "input_schema", "inputSchema")
"""What a tool's description calls the schema of its arguments."""
_IN_CALLS = frozenset({"function", "type", "id", "tool_call_id", "index", "name", *ARGUMENTS})
_IN_TOOLS = frozenset({"function", "type", "name", "description", "strict", *SCHEMAS})
_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
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
        held = next((call[key] for key in ARGUMENTS if key in call), None)
        arguments = from_json(from_json(held))
        if not isinstance(arguments, dict):
            raise Dropped("bad_tool_call", f"the call of {call['name']!r:.40} has no `arguments` that are an object")
        others = {*unread(item, _IN_CALLS), *(() if call is item else unread(call, _IN_CALLS))}
        reading.unread += [f"messages[].tool_calls[].{key}" for key in sorted(others)]
        id = next((item[key] for key in ("id", "tool_call_id") if isinstance(item.get(key), str)), None)
        calls.append(
            {"type": "function", "function": {"name": call["name"], "arguments": arguments}}
            | ({"id": id} if id else {})
        )
    return calls


def tools_of(reading: Reading, value: Any) -> list[Any]:
    """Tool descriptions given as a list or its JSON, as OpenAI has them. Raises Dropped."""
    given = from_json(value) or []
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise Dropped("bad_tools", "`tools` is not a list of tool descriptions")
    for tool in given:
        about = tool.get("function", tool)
        others = {*unread(tool, _IN_TOOLS), *(unread(about, _IN_TOOLS) if isinstance(about, dict) else ())}
        reading.unread += [f"tools[].{key}" for key in sorted(others)]
    return given


def called_in_text(reading: Reading, messages: list[Message]) -> list[Message]:
    """The messages with the calls and results that are written into their texts in Hermes' marks taken out of these.

    A system prompt that describes the tools in such marks gives way to the template's own words for them.
    """
    calling = [message for message in messages if "<tool_call>" in message["content"]]
    if not any([message["role"] == "assistant" and _CALL.search(message["content"]) for message in calling]):
        return messages
    found: list[Message] = []
    for message in messages:
        text = message["content"]
        if message["role"] == "assistant" and (calls := _CALL.findall(text)) and not message.get("tool_calls"):
            made = tool_calls(reading, [from_json(call, python=True) for call in calls])
            message = {**message, "content": _CALL.sub("", text).strip(), "tool_calls": made}
        elif message["role"] in ("tool", "user") and (results := _RESULT.findall(text)) and not _RESULT.sub("", text):
            found += [{**message, "role": "tool", "content": result} for result in results[:-1]]
            message = {**message, "role": "tool", "content": results[-1]}
        elif message["role"] == "system" and (described := _TOOLS.search(text)):
            tools = from_json(described[1], python=True)
            if not isinstance(tools, list):
                tools = [from_json(line, python=True) for line in described[1].splitlines() if line.strip()]
            if all(isinstance(tool, dict) for tool in tools):
                reading.found_tools(tools)
                reading.odd.append("tools_in_text")
                continue
        found.append(message)
    return found
