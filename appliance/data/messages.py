"""From what files call a message, a text, a call or a tool to how the canonical row has it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from appliance.data.calls import tool_calls
from appliance.data.dropped import Dropped, from_json, kind_name
from appliance.data.fields import IN_MESSAGES, REASONING, WEIGHTS, number, unread
from appliance.data.thoughts import OPEN, THOUGHT, CutThought, marked, other_marks

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "ai", "bot", "chatbot", "chatgpt", "bing", "bard"), "assistant"),
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_CALLERS = {"function_call", "tool_call"}
SPEAKER = {"role", "from", "speaker"}
_CONTENTS = ("content", "value", "text")
SPOKEN = SPEAKER | {*_CONTENTS}
"""What a message has that only says something."""
_SAID = {
    **dict.fromkeys(("reasoning", "thinking", "think"), "reasoning_content"),
    **dict.fromkeys(("tool_call", "tool_calls", "tool_use"), "tool_calls"),
}
"""Types of parts that are no text of the answer, and the key under which a message has what they hold."""
_IN_PARTS = frozenset({"type", "text", "value", "cache_control", "signature"})
"""What is read of a part of a content, or says nothing of it."""
_NO_VALUE = frozenset({"nan", "none", "null", "<na>", "n/a", "#n/a", "#ref!", "undefined", "[deleted]", "[removed]"})
"""What programs write where there is nothing, in small letters."""
_PLACEHOLDER = re.compile(r"\{\{\s*[A-Za-z_][\w. ]*\}\}")
_MEDIA_MARK = re.compile(r"(?:^|\n)\s*<(?:image|video|audio)>")
_CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|begin_of_text|>", "<|eot_id|>", "<start_of_turn>"),
    *(
        "<end_of_turn>",
        "[INST]",
        "[/INST]",
        "<|user|>",
        "<|assistant|>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "</s>",
        "<bos>",
    ),
)
_WRITTEN_OUT = re.compile(r"""\s*(?:array\()?\[?\{\s*['"](?:role|from|content|value)['"]\s*:""")
"""How messages begin that a program has written into a cell."""
_IN_PYTHON = re.compile(r"""\s*(?:array\(|\[\s*'.*'\s*\]\s*\Z|\{\s*'[^']*'\s*:)""", re.DOTALL)
"""How lists and objects look that Python has written out."""
_TRANSCRIPT = re.compile(r"(?:^|\n\n)(Human|Assistant): ?")
_DIALOGUE = re.compile(r"\s*Human: ?.*\n\s*Assistant:\s*\Z", re.DOTALL)
"""A prompt that is a transcript, up to the answer that is asked for."""
_DIALOGUE_TURNS = re.compile(r"(?:^|\n)\s*(Human|Assistant): ?")


class Reading:
    """The reading of one record: its messages and texts, and what a person should know of them."""

    def __init__(self, ignored: Set[str] = frozenset()) -> None:
        self.ignored = ignored
        """Keys that are as if they were not there."""
        self.unread: list[str] = []
        """Keys that hold something and were not read; of a message as `messages[].KEY`."""
        self.odd: list[str] = []
        """Codes of what texts hold that is hardly meant."""
        self.has_marks = False
        """Whether a text may hold marks such as those of calls."""
        self.tools: Any = None
        """Descriptions of tools, where the row's own are not taken as they are."""
        self.other_tools = False
        """Whether they stand elsewhere than in the row, whose own are then not read."""

    def found_tools(self, tools: Any) -> None:
        """Take tools that stand elsewhere than in the row."""
        if tools:
            self.tools, self.other_tools = tools, True

    def messages(self, value: Any, key: str) -> list[Message]:
        """Messages given as a list, as one, or as either written out, with role and content or from and value."""
        held = from_json(value, python=True)
        given = _by_item(held) if isinstance(held, dict) else held
        if not isinstance(given, list):
            raise Dropped("unknown_format", f"`{key}` is {kind_name(value)}, not a list of messages")
        if given and all(isinstance(item, dict) and item.get("messageId") for item in given):
            given = self._current(given)
        found: list[Message] = []
        for item in given:
            for message in self.turn(item, key):
                if found and _is_call(message) and found[-1].get("tool_calls") and _alike(message, found[-1]):
                    # One turn, where files have a message for each call.
                    calls = found[-1]["tool_calls"] + message["tool_calls"]
                    found[-1] = {**found[-1], "tool_calls": calls}
                else:
                    found.append(message)
        return found

    def _current(self, given: list[Any]) -> list[Any]:
        """The messages of the branch that goes on to the last, where a chat was asked or answered anew."""
        every = _flat(given)
        if not all(isinstance(item, dict) and item.get("messageId") and "parentMessageId" in item for item in every):
            return every
        by_id = {str(item["messageId"]): item for item in every}
        found = branch(by_id, every[-1]["messageId"], "parentMessageId")
        if len(found) < len(every):
            self.odd.append("other_branches")
        return found

    def turn(self, item: Any, key: str) -> list[Message]:
        """A message; where results of tools stand in it, as Anthropic has them, these first."""
        content = item.get("content") if isinstance(item, dict) else None
        if not isinstance(content, list):
            return [self.message(item, key)]
        results = [part for part in content if isinstance(part, dict) and part.get("type") == "tool_result"]
        said = [
            self.said("tool", part.get("content"), key)
            | ({"tool_call_id": id} if isinstance(id := part.get("tool_use_id"), str) else {})
            for part in results
        ]
        self.unread += [
            f"messages[].content[].{name}"
            for part in results
            for name in unread(part, {"type", "tool_use_id", "content", "cache_control"})
        ]
        rest = [part for part in content if part not in results]
        if results and not rest:
            self.unread += [f"messages[].{name}" for name in unread(item, {"role", "content"})]
        return said + ([self.message({**item, "content": rest}, key)] if rest or not results else [])

    def message(self, item: Any, key: str) -> Message:
        """One message, whatever calls its speaker and its text."""
        if not isinstance(item, dict):
            raise Dropped("unknown_format", f"`{key}` holds {kind_name(item)}, not a message")
        if not self.ignored.isdisjoint(item):
            item = {name: value for name, value in item.items() if name not in self.ignored}
        if not item.keys() <= IN_MESSAGES:
            self.unread += [f"messages[].{name}" for name in unread(item, IN_MESSAGES)]
        named = [name for name in ("role", "from", "speaker") if item.get(name) is not None]
        speaker = item[named[0]] if named else None
        if len(named) > 1:
            self.unread += [f"messages[].{name}" for name in named[1:] if item[name] != speaker]
        speaker = speaker.strip() if isinstance(speaker, str) else speaker
        if speaker is None and isinstance(item.get("isCreatedByUser"), bool):
            speaker = "user" if item["isCreatedByUser"] else "assistant"
        content = first_said(item, _CONTENTS)
        if isinstance(content, list) and any(isinstance(part, dict) and part.get("type") in _SAID for part in content):
            item, content = self._without_typed_parts(item, content)
        if not isinstance(speaker, str) or speaker.lower() not in ROLES:
            shown = f"{speaker!r:.40}" if isinstance(speaker, str) else kind_name(speaker)
            raise Dropped("bad_role", f"`{key}` has a message by {shown}, which is no known role")
        role = ROLES[speaker.lower()]
        if speaker.lower() in _CALLERS:
            self.unread += [f"messages[].{name}" for name in ("tool_calls", "function_call") if item.get(name)]
            item = {name: value for name, value in item.items() if name not in _CONTENTS} | {"tool_calls": content}
            content = None
        message = self.said(role, content, key)
        if len(item) > 2 or content is None:
            self._say_more(message, item, key)
        return message

    def _say_more(self, message: Message, item: Message, key: str) -> None:
        """What a message has beside its speaker and its text."""
        named = [name for name in _CONTENTS if item.get(name)]
        self.unread += [f"messages[].{name}" for name in named[1:] if item[name] != item[named[0]]]
        answers = message["role"] == "assistant"
        if answers and (calls := item.get("tool_calls") or item.get("function_call")):
            message["tool_calls"] = tool_calls(self, calls)
        called = {"tool_calls"} if item.get("tool_calls") else {"function_call"}
        if not _is_trained(item, answers):
            message["weight"] = 0
        thoughts = {name: self.text(item[name], name) for name in REASONING if answers and item.get(name)}
        if thoughts:
            think(message, next(iter(thoughts.values())))
        for field in ("name", "tool_call_id"):
            if isinstance(item.get(field), str):
                message[field] = item[field]
        read = {name for name, thought in thoughts.items() if thought == message["reasoning_content"]}
        read |= called if answers else set()
        read |= message.keys() & {"name", "tool_call_id"}
        beside = (*REASONING, "tool_calls", "function_call", "name", "tool_call_id")
        self.unread += [f"messages[].{name}" for name in beside if item.get(name) and name not in read]

    def spoken(self, role: str, value: Any, key: str, *, whole: bool = False) -> list[Message]:
        """Messages given as a text that `role` says, or as messages, or as the JSON of messages.

        JSON of more than an answer is one only where a `whole` conversation may stand there.
        """
        if isinstance(value, str):
            if role == "user" and (turns := self.dialogue(value)):
                return turns
            held = from_json(value, python=True) if value.lstrip().startswith(("[{", "{'role'", '{"role"')) else None
            held = [held] if isinstance(held, dict) else held
            if isinstance(held, list) and not (whole or role == "user") and not _is_answer(held):
                return [self.said(role, value, key)]  # an answer that is JSON
            if not isinstance(held, list) or not all(isinstance(item, dict) and item.keys() & SPEAKER for item in held):
                if _WRITTEN_OUT.match(value) and (held is not None or value.lstrip().startswith("array(")):
                    raise Dropped(
                        "unreadable_list", f"`{key}` looks like a list of messages, and cannot be read as one"
                    )
                return [self.said(role, value, key)]
            value = held
        is_text = not isinstance(value, list | dict) or (isinstance(value, dict) and not value.keys() & SPEAKER)
        return [self.said(role, value, key)] if is_text else self.messages(value, key)

    def _without_typed_parts(self, item: Message, content: list[Any]) -> tuple[Message, list[Any]]:
        """A message with its thoughts and calls under keys of their own, and the parts of its content that are left."""
        rest: list[Any] = []
        said: dict[str, list[Any]] = {}
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in _SAID:
                rest.append(part)
                continue
            names = ("value", "tool_calls", "tool_call") if _SAID[kind] == "tool_calls" else ("value", kind, "text")
            named = [name for name in names if part.get(name)]
            if _SAID[kind] == "tool_calls":
                held = from_json(part[named[0]] if named else part)
                if isinstance(held, dict) and held.get("output") is not None:
                    raise Dropped("call_with_result", "a part of a message holds a call and its result in one")
            else:
                held = part[named[0]] if named else []
            said.setdefault(_SAID[kind], []).extend(held if isinstance(held, list) else [held])
            if held is not part:  # whose keys are looked at as a call's
                self.unread += [
                    f"messages[].content[].{name}" for name in unread(part, {"type", "signature", *named[:1]})
                ]
        if thoughts := said.pop("reasoning_content", None):
            texts = [_text_of(thought) if isinstance(thought, dict) else thought for thought in thoughts]
            thought = "\n".join(map(str, texts))
            self.unread += [f"messages[].{name}" for name in REASONING if item.get(name) not in (None, "", thought)]
            item = {name: value for name, value in item.items() if name not in REASONING} | {
                "reasoning_content": thought
            }
        if "tool_calls" in said:
            self.unread += [f"messages[].{name}" for name in ("tool_calls", "function_call") if item.get(name)]
        return item | said, rest

    def said(self, role: str, content: Any, key: str) -> Message:
        text = self.text(content, key)
        if role == "assistant" and ("<" in text or text.startswith("[")):
            try:
                text = marked(text)
            except CutThought:
                raise Dropped("cut_thought", f"`{key}` ends within its thought: there is no answer after it") from None
            if other_marks(text):
                self.odd.append("thought_in_other_marks")
        if role == "assistant" and text and _IN_PYTHON.match(text) and from_json(text) == text:
            self.odd.append("written_by_python")
        return {"role": role, "content": text}

    def text(self, content: Any, key: str) -> str:
        """A text given as a string, as text parts, or not at all."""
        if content is None:
            return ""
        if isinstance(content, list):
            parts = [_text_of(part) for part in content]
            self.unread += [
                f"messages[].content[].{name}"
                for part in content
                if isinstance(part, dict)
                for name in unread(part, _IN_PARTS)
            ]
            if not all(isinstance(part, str) for part in parts):
                kinds = [str(part.get("type")) for part in content if isinstance(part, dict) and _text_of(part) is None]
                named = f" ({kinds[0]})" if kinds else ""
                raise Dropped("not_text", f"`{key}` has a part{named} that is not text")
            content = "\n".join(map(str, parts))  # as the endpoint joins them
        if not isinstance(content, str):
            raise Dropped("not_text", f"`{key}` is {kind_name(content)}, not a text")
        if len(content) < 16 and content.strip().lower() in _NO_VALUE:
            self.odd.append("no_value")
        elif "{{" in content and _PLACEHOLDER.search(content):
            self.odd.append("placeholder")
        if "<" in content:
            self.has_marks = True
            if any([mark in content for mark in _CONTROL]):
                self.odd.append("rendered")
            if _MEDIA_MARK.search(content):
                self.odd.append("media_mark")
        elif "INST]" in content and ("[INST]" in content or "[/INST]" in content):
            self.odd.append("rendered")
        if not content.isascii() and ("\ufffd" in content or "â€" in content):
            self.odd.append("broken_characters")
        return content

    def conversation(self, messages: list[Message]) -> list[Message]:
        """The turns as they come, up to the last answer. Raises Dropped where nobody asks, answers, or says anything.

        What the assistant says before anybody has asked is no answer, and is not trained.
        """
        order = _order(tuple([message["role"] for message in messages]))
        if order.fault:
            raise Dropped(*order.fault)
        turns = messages[: order.turns]
        for message in turns:
            _require_content(message)
        for index in order.greetings:
            turns[index] = {**turns[index], "weight": 0}
        self.odd += order.odd
        return turns

    def system(self, value: Mapping[str, Any], key: str = "system") -> list[Message]:
        if not (value.get(key) or value.get("system_prompt")):
            return []
        given = {name: self.text(value[name], name) for name in (key, "system_prompt") if value.get(name)}
        texts = list(dict.fromkeys(text for text in given.values() if text.strip()))
        if len(texts) > 1:
            raise Dropped("two_system_messages", "`system_prompt` is another than `system`")
        return [{"role": "system", "content": text} for text in texts]

    def dialogue(self, text: str) -> list[Message] | None:
        """The turns of a prompt that is a transcript, up to the answer that is asked for; None where it is none."""
        return self.transcript(text, _DIALOGUE_TURNS) if _DIALOGUE.match(text) else None

    def transcript(self, text: str, turn: re.Pattern[str] = _TRANSCRIPT) -> list[Message] | None:
        """The turns of `Human: ... Assistant: ...`; None where it is no such text."""
        before, *turns = turn.split(text)
        if before.strip() or not turns:
            return None
        if turns[-2] == "Assistant" and not turns[-1].strip():
            turns = turns[:-2]
        roles = {"Human": "user", "Assistant": "assistant"}
        return [
            self.said(roles[who], words.strip(), "chosen") for who, words in zip(turns[::2], turns[1::2], strict=True)
        ]


@dataclass(frozen=True)
class _Order:
    """What the roles of a conversation say of it."""

    turns: int = 0
    """Messages up to the last answer."""
    greetings: tuple[int, ...] = ()
    """Answers before anybody has asked."""
    odd: tuple[str, ...] = ()
    fault: tuple[str, str] | None = None
    """Why it cannot be trained: code and reason."""


@lru_cache(maxsize=4096)
def _order(roles: tuple[str, ...]) -> _Order:
    """The rows of a file have few orders of roles."""
    if not roles:
        return _Order(fault=("empty_prompt", "it holds no messages"))
    if "assistant" not in roles:
        why = f"the last message is the {roles[-1]}'s, so there is no answer to train on"
        return _Order(fault=("roles_out_of_order", why))
    turns = len(roles) - roles[::-1].index("assistant")
    odd = set() if turns == len(roles) else {"unanswered"}
    greetings = []
    before, asked = "", False
    for index, role in enumerate(roles[:turns]):
        if role == "tool" and before not in ("assistant", "tool"):
            return _Order(fault=("roles_out_of_order", f"{role} follows {before or 'the start'}"))
        if role == "assistant" and not asked:
            greetings.append(index)
            odd.add("greeting")
        if role == "system" and before not in ("", "system"):
            odd.add("later_system")
        if role == before != "tool":
            odd.add("consecutive")
        asked = asked or role in ("user", "tool")
        before = role
    if not asked:
        return _Order(fault=("roles_out_of_order", "nobody asks anything"))
    return _Order(turns, tuple(greetings), tuple(sorted(odd)))


def think(message: Message, thought: str) -> None:
    """Give an answer its thought, which may stand in its text too. Raises Dropped where that is another."""
    if found := THOUGHT.match(message["content"]):
        if found[1].strip() not in ("", thought.strip()):
            raise Dropped("two_thoughts", "an answer has a thought in its text and another beside it")
        message["content"] = found[2].lstrip()
    message["reasoning_content"] = thought


def branch(messages: Mapping[str, Any], last: Any, parent: str) -> list[Any]:
    """The messages from the first to the one of the id `last`, by the ids of their parents."""
    found: list[Any] = []
    while isinstance(message := messages.get(str(last)), dict) and len(found) < len(messages):
        found.append(message)
        last = message.get(parent)
    return found[::-1]


def _flat(messages: list[Any]) -> list[Any]:
    """Messages that may hold those that follow them under `children`."""
    found: list[Any] = []
    for item in messages:
        children = item.get("children") if isinstance(item, dict) else None
        if isinstance(children, list):
            item = {name: value for name, value in item.items() if name != "children"}
        found += [item, *_flat(children if isinstance(children, list) else [])]
    return found


def _by_item(value: Message) -> list[Any]:
    """One message, or those of lists that each hold one thing of all messages, as tables have them."""
    columns = list(value.values())
    if not value.keys() & SPEAKER or not all(isinstance(column, list) for column in columns):
        return [value]
    if len({len(column) for column in columns}) > 1:
        return [value]
    return [dict(zip(value, item, strict=True)) for item in zip(*columns, strict=True)]


def first_said(given: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What stands under the first of `names` that says something, else under the first that is there."""
    said = next((given[name] for name in names if given.get(name)), None)
    return said if said is not None else next((given[name] for name in names if given.get(name) is not None), None)


def _is_answer(held: list[Any]) -> bool:
    """Whether the items of a list are what an assistant says, as messages have it, and nothing else."""
    return all(
        isinstance(item, dict)
        and ROLES.get(str(next((item[name] for name in SPEAKER if name in item), "")).lower()) in ("assistant", "tool")
        and item.keys() <= SPOKEN | {"tool_calls", "function_call", "reasoning_content", "weight", "tool_call_id"}
        for item in held
    )


def _is_call(message: Message) -> bool:
    return bool(message.get("tool_calls")) and not message["content"] and not message.get("reasoning_content")


def _alike(one: Message, other: Message) -> bool:
    return one.get("weight") == other.get("weight")


def _text_of(part: Any) -> Any:
    """The text of a part of a content, or None."""
    if not isinstance(part, dict) or part.get("type", "text") not in ("text", "input_text", "output_text"):
        return None
    text = first_said(part, ("text", "value"))
    return text.get("value") if isinstance(text, dict) else text


def _is_trained(item: Message, answers: bool) -> bool:
    """Whether a message is to be trained as far as its weights say: an answer is, where they do not."""
    trained = True
    for name in WEIGHTS:
        given = number(item.get(name))
        if given is None:
            continue
        if given not in (0, 1):
            raise Dropped("bad_weight", f"`{name}` is {given!r:.40}, and can be 0 or 1")
        if given and not answers and name not in ("weight", "loss_weight"):
            raise Dropped("bad_weight", f"`{name}` asks to train what is no answer")
        trained = trained and bool(given)
    return trained or not answers


def _require_content(message: Message) -> None:
    said = message["content"].strip()
    if message["role"] == "user" and not said:
        raise Dropped("empty_prompt", "the user says nothing")
    if message["role"] != "assistant" or message.get("tool_calls"):
        return
    if not said:
        raise Dropped("empty_answer", "the assistant says nothing")
    if said.startswith(OPEN) and (thought := THOUGHT.match(said)) and not thought[2].strip():
        raise Dropped("empty_answer", "the assistant says nothing after its thought")


def trimmed(messages: list[Message]) -> list[Message]:
    """The messages without white space around the assistant's texts."""
    return [
        {**message, "content": message["content"].strip()} if message["role"] == "assistant" else message
        for message in messages
    ]
