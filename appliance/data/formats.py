"""From a record in one of the known formats to the canonical row, or the reason why not."""

from __future__ import annotations

from collections.abc import Set
from functools import lru_cache
from typing import Any, NamedTuple

from appliance.data.calls import MARKS_OF_CALLS, tools_of
from appliance.data.dataset import Kind, Row
from appliance.data.dropped import Dropped, from_json, kind_name
from appliance.data.exports import read_calls, read_chat, read_transcript, read_vertex
from appliance.data.fields import (
    IN_ROWS,
    MEANING,
    MEDIA,
    OTHER_SPLITS,
    REASONING,
    SPLIT,
    TRAIN_SPLITS,
    VERDICTS,
    number,
    unread,
)
from appliance.data.json_text import RepeatedKey
from appliance.data.messages import ROLES, SPOKEN, Message, Reading, first_said, trimmed
from appliance.data.shapes import (
    ANSWERED,
    ASKED,
    Parts,
    Shape,
    Value,
    read_alpaca,
    read_completion,
    read_instructed_preference,
    read_openai,
    read_preference,
    read_preferred_output,
    read_rejected_response,
    read_second_answer,
    read_second_conversation,
    read_sharegpt,
    read_sharegpt_pair,
    read_turns,
)

_VERDICT = {
    **dict.fromkeys(("true", "1", "1.0", "good", "desirable"), True),
    **dict.fromkeys(("false", "0", "0.0", "-1", "-1.0", "bad", "undesirable"), False),
}


class Canonical(NamedTuple):
    """A record as a row: OpenAI-style `messages`; or `prompt`, `chosen` and `rejected` as lists of such messages; or
    `prompt` and `completion` as such lists, with a `label` that says whether the completion is wanted.

    `trimmed` says that white space was taken off around an answer: a header that runs into it would be tokenised
    otherwise in training than in use. `unread` are the keys that say something and were not read, of a message as
    `messages[].KEY`; `odd` codes of what texts hold that is hardly meant.
    """

    format: str
    row: Row
    trimmed: bool
    unread: tuple[str, ...] = ()
    odd: tuple[str, ...] = ()


def to_canonical(value: Any, format: str | None = None, ignored: Set[str] = frozenset()) -> Canonical:
    """The row that `value` is, in `format` or the one that its keys show, without the keys in `ignored`.

    Raises Dropped.
    """
    if isinstance(value, RepeatedKey):
        raise Dropped("repeated_key", f"`{value.key}` stands in it twice, and only one of the two could be read")
    if not isinstance(value, dict):
        raise Dropped("not_an_object", f"it is {kind_name(value)}, not an object")
    reading = Reading(ignored)
    value = _without(value, ignored)
    if not _AROUND.isdisjoint(value):
        value, reading.unread = _unwrapped(value, format)
        value = _without(value, ignored)
    shape = _shape(value, format)
    if not _MAY_REFUSE.isdisjoint(value):
        _refuse_what_is_not_trained(value)
    parts = shape.read(reading, value)
    name, judged_by = shape.format, ""
    if "messages" in parts and not _JUDGES.isdisjoint(value):
        judged = format == "unpaired" or name in _JUDGED or str(value.get("label")).lower() in ("true", "false")
        may_judge = VERDICTS if judged else VERDICTS[1:]
        judged_by = next((key for key in may_judge if _verdict(value.get(key)) is not None), "")
    if judged_by:
        if "unanswered" in reading.odd:
            why = f"the last message is the user's, so that `{judged_by}` judges no answer to it"
            raise Dropped("roles_out_of_order", why)
        name, parts = "unpaired", _judged(parts["messages"])
        if parts["completion"][-1].get("weight") == 0:
            raise Dropped("nothing_to_train", "the answer that is judged has the weight 0")
    elif format == "unpaired":
        key = next((key for key in VERDICTS if value.get(key) is not None), "label")
        raise Dropped("bad_label", f"`{key}` is {value.get(key)!r:.40}, neither true nor false")
    row: Row = {part: trimmed(messages) for part, messages in parts.items()}
    was_trimmed = row != parts
    if name == "unpaired":
        row["label"] = _verdict(value[judged_by])
    if reading.other_tools and value.get("tools") and from_json(value["tools"]) != reading.tools:
        reading.unread.append("tools")
    if given := reading.tools or value.get("tools") or value.get("functions"):
        if tools := tools_of(reading, given):
            row["tools"] = tools
        if given is value.get("functions"):
            value = {key: item for key, item in value.items() if key != "functions"}
    if (split := value.get(SPLIT)) and str(split).lower() not in TRAIN_SPLITS:
        reading.unread.append(SPLIT)
    if reading.has_marks and _calls_left(row):
        reading.odd.append("call_in_text")
    if not judged_by and value.keys() <= shape.reads and not reading.unread and not reading.odd:
        return Canonical(name, row, was_trimmed)
    if judged_by == "label" and not isinstance(value["label"], bool):
        reading.odd.append("label_of_numbers")
    rest = [key for key in unread(value, shape.reads) if key != judged_by and not _says_again(key, value[key], row)]
    if any(key in VERDICTS and _verdict(value[key]) is not None for key in rest):
        reading.odd.append("judgement_not_used")
    told = dict.fromkeys(key for key in rest + reading.unread if not {key, key.rpartition(".")[2]} & ignored)
    return Canonical(name, row, was_trimmed, tuple(told), tuple(dict.fromkeys(reading.odd)))


def _calls_left(row: Row) -> bool:
    """Whether an answer has a call in its text, in marks that chat templates take for text."""
    return any(
        [
            mark in message["content"]
            for part in ("messages", "completion", "chosen", "rejected")
            for message in row.get(part, ())
            if message["role"] == "assistant" and "<" in message["content"]
            for mark in MARKS_OF_CALLS
        ]
    )


def _says_again(key: str, given: Any, row: Row) -> bool:
    """Whether a text or messages under `key` hold only what the row says, as a prompt does beside its conversation."""
    meaning = MEANING.get(key.lower(), "")
    if meaning == _TRAINED or (meaning == _ANSWER and key.lower().startswith(("reject", "non_"))):
        return False
    system = key.lower().startswith("system")
    roles = ("system",) if system else ("assistant",) if meaning == _ANSWER else ("system", "user", "assistant", "tool")
    said = {
        (message["role"], message["content"].strip())
        for part in row.values()
        if isinstance(part, list)
        for message in part
        if isinstance(message, dict) and isinstance(message.get("content"), str)
    }
    items = given if isinstance(given, list) else [given]
    if not items or not all(
        [isinstance(one, str) or (isinstance(one, dict) and one.keys() <= SPOKEN) for one in items]
    ):
        return False
    for item in items:
        text = first_said(item, ("content", "value", "text")) if isinstance(item, dict) else item
        named = (
            ROLES.get(str(first_said(item, ("role", "from", "speaker"))).lower()) if isinstance(item, dict) else None
        )
        if not isinstance(text, str) or len(text) < 2:
            return False
        if not any((role, text.strip()) in said for role in ((named,) if named else roles)):
            return False
    return bool(items)


def _without(value: Value, ignored: Set[str]) -> Value:
    return value if ignored.isdisjoint(value) else {key: item for key, item in value.items() if key not in ignored}


def _unwrapped(value: Value, format: str | None) -> tuple[Value, list[str]]:
    """The row in what a program has put around it, whose own keys are then not read."""
    for key in sorted(_AROUND & value.keys()):
        inner = value[key]
        if isinstance(inner, dict) and _shape_of(frozenset(value), format) is None:
            return inner, unread(value, {key})
    return value, []


def _shape(value: Value, format: str | None) -> Shape:
    """The shape that `value` has, of those of `format` where it is named. Raises Dropped."""
    given = frozenset([key for key, item in value.items() if item is not None])
    if shape := _shape_of(given, format) or _shape_of(frozenset(value), format):
        return shape
    if format in (None, "unpaired"):
        raise Dropped("unknown_format", f"its keys are of no known format: {shown_keys(value)}")
    lacking = next(key for key in _BY_FORMAT[format][0].keys if key not in value)
    raise Dropped("unknown_format", f"it lacks `{lacking}` of {format}; its keys are {shown_keys(value)}")


@lru_cache(maxsize=256)
def _shape_of(keys: frozenset[str], format: str | None) -> Shape | None:
    """The first shape whose keys are all among these: the rows of a file have few sets of keys."""
    return next((shape for shape in _BY_FORMAT[format] if keys.issuperset(shape.keys)), None)


def _refuse_what_is_not_trained(value: Value) -> None:
    """Raise Dropped for a row that says of itself that it is not to be trained, or needs more than text."""
    for key in MEDIA:
        if value.get(key):
            raise Dropped("not_text", f"`{key}` holds more than text, which cannot be trained here")
    if str(value.get(SPLIT)).lower() in OTHER_SPLITS:
        raise Dropped("other_split", f"`{SPLIT}` says {value[SPLIT]!r:.40}, and such rows are not for training")
    weight = number(value.get("weight"))
    if weight is not None and weight not in (0, 1):
        raise Dropped("bad_weight", f"`weight` is {weight!r:.40}, and can be 0 or 1")
    if weight == 0:
        raise Dropped("weight_0", "its `weight` is 0")


def _judged(messages: list[Message]) -> Parts:
    """A conversation parted before its last answer, which is the one that is judged."""
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def _verdict(label: Any) -> bool | None:
    """Whether a label calls the answer wanted; None where it is no such judgement."""
    return _VERDICT.get(str(label).lower())


_WITH_ALPACA = ("input", "context", "history", *REASONING)
SHAPES = (
    Shape("sharegpt", ("conversations", "chosen", "rejected"), read_sharegpt_pair),
    Shape("sharegpt", ("conversations",), read_sharegpt),
    Shape("preference", ("chosen_messages", "rejected_messages"), read_second_conversation),
    Shape("preference", ("messages", "rejected_messages"), read_second_conversation),
    Shape("preference", ("messages", "rejected_response"), read_second_answer),
    Shape("preference", ("input", "preferred_output", "non_preferred_output"), read_preferred_output),
    Shape("preference", ("prompt", "chosen", "rejected"), read_preference),
    Shape("preference", ("question", "chosen", "rejected"), read_preference),
    Shape("preference", ("instruction", "chosen", "rejected"), read_instructed_preference, ("input", "context")),
    Shape("preference", ("input", "chosen", "rejected"), read_preference),
    Shape("preference", ("query", "response", "rejected_response"), read_rejected_response, ("history",)),
    Shape("preference", ("chosen", "rejected"), read_preference),
    Shape("openai", ("messages",), read_openai),
    Shape("turns", ("conversation",), read_turns),
    Shape("vertex", ("contents",), read_vertex, ("systemInstruction", "system_instruction")),
    Shape("transcript", ("chat", "system"), read_transcript),
    Shape("chat", ("chat",), read_chat),
    Shape("calls", ("query", "answers"), read_calls),
    Shape("alpaca", ("instruction", "output"), read_alpaca, _WITH_ALPACA),
    Shape("alpaca", ("instruction", "response"), read_alpaca, _WITH_ALPACA),
    *(
        Shape(
            "completion" if asked in ASKED[:2] and answered in ANSWERED[:2] else "pair",
            (asked, answered),
            read_completion,
            ("history", *REASONING),
        )
        for asked in ASKED
        for answered in ANSWERED
    ),
)
"""In the order in which they are tried. Where a row has the keys of several, the first of them reads it."""
_AROUND = frozenset({"data", "fields", "record", "row"})
"""Keys under which annotation tools and viewers export the row."""
_MAY_REFUSE = frozenset({*MEDIA, SPLIT, "weight"})
"""Keys by which a row may say that it is not to be trained."""
_JUDGES = frozenset(VERDICTS)
_TRAINED, _ANSWER = MEANING["mask"], MEANING["rejected"]
_JUDGED = frozenset({"openai", "completion"})
"""Formats in which `label` may be a judgement; in others it is a class. `kto_tag` is one everywhere."""
FORMATS = (*dict.fromkeys(shape.format for shape in SHAPES), "unpaired")
"""Names of the formats."""
_BY_FORMAT: dict[str | None, list[Shape]] = {
    None: list(SHAPES),
    **{name: [shape for shape in SHAPES if shape.format == name] for name in FORMATS},
    "unpaired": [shape for shape in SHAPES if shape.format != "preference"],
}
KEYS = tuple(
    dict.fromkeys([*(key for shape in SHAPES for key in shape.keys + shape.optional), *sorted(IN_ROWS), *VERDICTS])
)
"""The keys that the formats read."""


def kind_of(row: Row) -> Kind:
    """What a canonical row can be trained by."""
    return "messages" if "messages" in row else "preference" if "chosen" in row else "unpaired"


def shown_keys(value: Value) -> str:
    """The keys of a row, as many as fit into a message."""
    shown = ", ".join(list(value)[:8])[:120] or "none"
    return shown.encode(errors="replace").decode()
