"""What can be trained on which chat template, as a table: `python tests/appliance/data/template_table.py`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))
from chat_templates import templates, tokenizer_of

from appliance.data.render import Conversation, render_conversation
from appliance.data.template_input import Message, Tools
from appliance.errors import InvalidInput


class Said(NamedTuple):
    """Words that stand nowhere else."""

    system: str = "sysword"
    first: str = "askword"
    second: str = "againword"
    answer: str = "saidword"
    other: str = "lastword"
    thought: str = "thinkword"
    deeper: str = "deepword"
    result: str = "foundword"
    tool: str = "look_up"


SAID = Said()
_CALL = {
    "type": "function",
    "id": "call00001",
    "function": {"name": SAID.tool, "arguments": {"place": "Rome"}},
}
_PARAMETERS = {"type": "object", "properties": {"place": {"type": "string", "description": "where"}}}
TOOLS = [
    {"type": "function", "function": {"name": SAID.tool, "description": "looks it up", "parameters": _PARAMETERS}},
]


def _message(role: str, content: str, **more: Any) -> Message:
    return {"role": role, "content": content, **more}


_SYSTEM, _FIRST, _SECOND = _message("system", SAID.system), _message("user", SAID.first), _message("user", SAID.second)
_ANSWER, _OTHER = _message("assistant", SAID.answer), _message("assistant", SAID.other)
_RESULT = _message("tool", SAID.result, name=SAID.tool, tool_call_id="call00001")
ROWS: dict[str, tuple[list[Message], Tools]] = {
    "one answer": ([_FIRST, _ANSWER], None),
    "system message": ([_SYSTEM, _FIRST, _ANSWER], None),
    "several turns": ([_FIRST, _ANSWER, _SECOND, _OTHER], None),
    "thought": ([_FIRST, {**_ANSWER, "reasoning_content": SAID.thought}], None),
    "thought in the text": (
        [_FIRST, {**_ANSWER, "content": f"<think>\n{SAID.thought}\n</think>\n\n{SAID.answer}"}],
        None,
    ),
    "several thoughts": (
        [
            _FIRST,
            {**_ANSWER, "reasoning_content": SAID.thought},
            _SECOND,
            {**_OTHER, "reasoning_content": SAID.deeper},
        ],
        None,
    ),
    "call": ([_FIRST, _message("assistant", "", tool_calls=[_CALL])], TOOLS),
    "call and result": ([_FIRST, _message("assistant", "", tool_calls=[_CALL]), _RESULT, _OTHER], TOOLS),
    "text beside a call": ([_FIRST, {**_ANSWER, "tool_calls": [_CALL]}, _RESULT, _OTHER], TOOLS),
}
"""Rows of every kind."""


def trained_as(tokenizer: Any, kind: str) -> Conversation | InvalidInput:
    """The examples of the row of `kind`, or why there are none."""
    messages, tools = ROWS[kind]
    try:
        return render_conversation(tokenizer, messages, tools)
    except InvalidInput as error:
        return error


def main() -> None:
    """Print the page."""
    reasons: dict[str, str] = {}
    lines = []
    for name, template in templates().items():
        tokenizer = tokenizer_of(template)
        cells = []
        for kind in ROWS:
            found = trained_as(tokenizer, kind)
            if isinstance(found, InvalidInput):
                reasons[found.code] = re.sub(r"message \d", "a message", found.message.partition(":")[0])
                cells.append(found.code.replace("_", " "))
            else:
                cells.append("yes" if len(found) == 1 else f"yes, {len(found)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    print(_PAGE)
    print(f"| template | {' | '.join(ROWS)} |\n|{'---|' * (len(ROWS) + 1)}")
    print("\n".join(lines))
    print("\nWhy a row is refused:\n")
    for code, reason in sorted(reasons.items()):
        print(f"- *{code.replace('_', ' ')}*: {reason}.")


_PAGE = """# Chat templates

<!-- `make docs` writes this page; tests/appliance/data/template_table.py holds it. -->

What rows can be trained on which chat template. *yes*: the assistant's turns are trained, each with the token that ends
it, and nothing else is. *yes, 2*: the template renders an answer otherwise once another turn follows (it cuts earlier
thoughts, or ends the last answer by another token), so that each answer is an example of its own, after the prompt that
it is asked with. Anything else is refused at import and by training, with that reason. The templates are those that TRL
carries of their publishers, and of models that it has none of some written after theirs (granite, mistral, olmo2, phi4,
smollm2).
"""

if __name__ == "__main__":
    main()
