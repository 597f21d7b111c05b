"""From messages to token ids and the loss mask, through the tokenizer's own chat template only."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from appliance.data.template_input import THOUGHT_FIELDS, Message, Tools, as_read, special_tokens, tools_as_read
from appliance.errors import InvalidInput, reason

_EMPTY_THOUGHT = re.compile(r"\A\s*<think>\s*</think>\s*")
_OPENED = re.compile(r"<(think|thinking|thought)>\s*\Z")
"""The end of a prompt that has the model begin with a thought."""
_ALIKE = 4
"""Letters by which the end of a prompt is found again."""
_THINKING_FLAGS = re.compile(r"/(?:no_)?think\b")
"""What some templates take out of a system prompt, and obey."""
_CLOSED = re.compile(r"</(think|thinking|thought)>\s*\Z")
"""The end of a prompt that has the model answer without a thought."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as token ids; `trained[i]` says whether the loss counts token i."""

    input_ids: list[int]
    trained: list[bool]


Conversation = list[Rendered]
"""The examples that a conversation is trained as."""


def render_prompt(tokenizer: Any, messages: Sequence[Message], tools: Tools = None, **told: Any) -> list[int]:
    """Token ids of `messages` with the header of the assistant's next turn; the template is `told` more by names.

    Raises InvalidInput where the template refuses the messages.
    """
    messages = as_read(tokenizer, messages)
    return _encode(tokenizer, render_text(tokenizer, messages, tools, add_generation_prompt=True, **told))


def render_conversation(tokenizer: Any, messages: Sequence[Message], tools: Tools = None) -> Conversation:
    """What `messages` are trained as; none where every answer has the weight 0.

    Each answer is trained after the prompt that it is asked for with: the turns before it as the template renders them
    then, which may leave out earlier thoughts, and whatever the template begins an answer with. What it puts between
    that prompt and the text is trained too, such as an empty thought or the name of a channel, because the model that
    is served has to write it by itself; so is the token that ends the turn. Answers of which one's tokens go on with
    the other's share an example, which is all of them on most templates; else each has its own.

    Raises InvalidInput where the template refuses the messages, leaves out or rewrites what they say, or where no
    special token ends the turn.
    """
    messages = as_read(tokenizer, messages)
    examples: Conversation = []
    for index in reversed(range(len(messages))):
        if messages[index]["role"] != "assistant" or messages[index].get("weight") == 0:
            continue
        prompt, answer = _answer(tokenizer, messages[: index + 1], tools)
        ids = prompt + answer
        example = next((one for one in examples if one.input_ids[: len(ids)] == ids), None)
        if example is None:
            example = Rendered(ids, [False] * len(ids))
            examples.append(example)
        example.trained[len(prompt) : len(ids)] = [True] * len(answer)
    return examples[::-1]


def _answer(tokenizer: Any, messages: Sequence[Message], tools: Tools) -> tuple[list[int], list[int]]:
    """The tokens of the prompt for the last of `messages`, and of that answer with the token that ends it."""
    index, message = len(messages) - 1, messages[-1]
    prompt = render_text(tokenizer, messages[:-1], tools, add_generation_prompt=True)
    whole = render_text(tokenizer, messages, tools)
    if absent := tools_absent(whole, messages, tools_as_read(tokenizer, tools)) or _unnamed(tokenizer, messages, tools):
        raise _tools_not_rendered(absent)
    for other, asked in enumerate(messages[:-1]):
        said_before = str(asked.get("content") or "")
        if _is_in(prompt, said_before):
            continue
        # Templates cut earlier thoughts, as which some take what is said beside a call: then it was there in its turn.
        if asked["role"] != "assistant" or not _is_in(
            render_text(tokenizer, messages[: other + 1], tools), said_before
        ):
            raise _text_not_rendered(other)
    if message.get("tool_calls"):
        said, end = _end_of_calls(tokenizer, messages, tools, whole)
    else:
        said, end = _end_of_text(tokenizer, messages, tools, whole)
    answer = _continuation(tokenizer, messages, tools, prompt, said) + end
    ids, prompt_ids = _encode(tokenizer, prompt + answer), _encode(tokenizer, prompt)
    # What is asked with is the prompt's own tokens, also where what follows would change the last of them.
    alike = ids[: len(prompt_ids)] == prompt_ids
    answer_ids = ids[len(prompt_ids) :] if alike else _encode(tokenizer, answer)
    _require_said(_decode(tokenizer, answer_ids), message, index)
    return prompt_ids, answer_ids


def _continuation(tokenizer: Any, messages: Sequence[Message], tools: Tools, prompt: str, said: str) -> str:
    """What `said`, the conversation up to the end of the answer, has after `prompt`.

    Some templates leave a thought out, or only begin it in the prompt, because the model writes it: it is put where the
    model has it. Some render the turns before the answer otherwise than they do in its prompt: then the answer begins
    after the last header of the kind that ends the prompt.
    """
    index, message = len(messages) - 1, messages[-1]
    thought = _normal(message.get("reasoning_content") or "")
    if said.startswith(prompt):
        answer = said[len(prompt) :]
        if _is_beside(thought, answer, message):
            return answer
    if thought and _CLOSED.search(prompt):
        raise _reasoning_not_rendered(index)
    opened = _OPENED.search(prompt)
    before = prompt[: opened.start()] if opened else prompt
    if said.startswith(before):
        answer = said[len(before) :].lstrip()
    else:
        answer = said[_begin(tokenizer, messages, tools, before, said) :]
    if opened and answer.startswith(f"<{opened[1]}>"):
        return answer.removeprefix(f"<{opened[1]}>").lstrip()
    if opened:
        return f"{thought}\n</{opened[1]}>\n\n{answer}"
    if _is_beside(thought, answer, message):
        return answer
    if "</think>" not in str(tokenizer.chat_template):
        raise _reasoning_not_rendered(index)
    return f"<think>\n{thought}\n</think>\n\n{_EMPTY_THOUGHT.sub('', answer)}"


def _is_beside(thought: str, answer: str, message: Message) -> bool:
    """Whether an answer as it is rendered has the thought of `message` beside its text, which may say the same."""
    answer, said = _normal(answer), _normal(message.get("content") or "")
    before, _, after = answer.rpartition(said) if said in answer and said else (answer, "", "")
    return thought in before or thought in after


def _begin(tokenizer: Any, messages: Sequence[Message], tools: Tools, before: str, said: str) -> int:
    """Where in `said` the last of `messages` begins, whose prompt `before` renders the turns before it otherwise.

    That is after the header that ends the prompt, the last before anything that the message says; where the template
    has no such header, after the words that the prompt ends with.
    """
    index = len(messages) - 1
    if messages[index - 1]["role"] == "assistant":
        raise _not_incremental(index)  # it may have made one turn of both
    others = (render_text(tokenizer, [*messages[:-1], _saying(messages[-1], word)], tools) for word in ("word", "text"))
    lead = _common_begin(said, *others)
    history = render_text(tokenizer, messages[:-1], tools)
    header = before.removeprefix(history)
    if header and header != before:
        at = lead.rfind(header)
        if at < 0:
            raise _not_incremental(index)
        return at + len(header)
    lead = lead.rstrip()
    if lead[-_ALIKE:] != before.rstrip()[-_ALIKE:]:
        raise _not_incremental(index)
    return len(lead)


def _common_begin(first: str, *others: str) -> str:
    letters = zip(first, *others, strict=False)
    return first[: next((at for at, found in enumerate(letters) if len(set(found)) > 1), min(map(len, others)))]


def _saying(message: Message, word: str) -> Message:
    """The message with nothing but `word` in all that it says."""
    said: Message = {key: word for key in ("content", *THOUGHT_FIELDS) if message.get(key)}
    if calls := message.get("tool_calls"):
        said["tool_calls"] = [{**call, "function": {"name": word, "arguments": {}}} for call in calls]
    return message | said


def _end_of_text(tokenizer: Any, messages: Sequence[Message], tools: Tools, whole: str) -> tuple[str, str]:
    """`whole`, the conversation as a text, up to the text of its last message, and what ends that.

    The same text may stand elsewhere, in the words of the template too. So the conversation is rendered once more with
    a word in its place that nothing else holds: what comes after that word comes after the text. Some templates end an
    answer only by the token that the next turn begins with, which then is what ends it.
    """
    index = len(messages) - 1
    word = "text"
    while word in whole:
        word += "x"
    other = [*messages[:-1], {**messages[-1], "content": word}]
    _, found, after = render_text(tokenizer, other, tools).rpartition(word)
    said = whole[: len(whole) - len(after)]
    text = str(messages[-1].get("content") or "").strip()
    if not found or not whole.endswith(after) or not said.rstrip().endswith(text):
        raise _text_not_rendered(index)
    special = special_tokens(tokenizer)
    if end := special.search(after):
        return said, after[: end.end()]
    _, _, after = render_text(tokenizer, [*other, {"role": "user", "content": "Go on."}], tools).rpartition(word)
    if (end := special.match(after.lstrip())) and end[0] != tokenizer.bos_token:
        return said.rstrip(), end[0]
    raise _no_end_of_turn(index)


def _end_of_calls(tokenizer: Any, messages: Sequence[Message], tools: Tools, whole: str) -> tuple[str, str]:
    """The same of a turn of tool calls, whose form is the template's own: its last token ends it, which is special."""
    special = special_tokens(tokenizer)
    *_, last = [None, *special.finditer(whole)]
    if last and not whole[last.end() :].strip():
        return whole[: last.start()], last[0]
    longer = render_text(tokenizer, [*messages, {"role": "tool", "content": "Done."}], tools)
    said = whole.rstrip()
    if longer.startswith(said) and (end := special.match(longer[len(said) :].lstrip())):
        return said, end[0]
    raise _no_end_of_turn(len(messages) - 1)


def _require_said(said: str, message: Message, index: int) -> None:
    """Raise InvalidInput unless `said`, the answer as a text, has all that `message` says."""
    said = _normal(said)
    if absent := tools_absent(said, [message], None):
        raise _tools_not_rendered(absent)
    if _normal(message.get("content") or "") not in said:
        raise _text_not_rendered(index)
    if _normal(message.get("reasoning_content") or "") not in said:
        raise _reasoning_not_rendered(index)


def tools_absent(whole: str, messages: Sequence[Message], tools: Tools) -> str:
    """The first word of a tool's or a call's that is not in `whole`, the conversation as a text; empty: all are."""
    described = [tool.get("function") or tool for tool in tools or ()]
    arguments = [name for one in described if isinstance(one, dict) for name in _named_in(one.get("parameters"))]
    called = [call["function"] for message in messages for call in message.get("tool_calls") or ()]
    words = [str(one.get("name") or "") for one in (*described, *called) if isinstance(one, dict)]
    words += arguments + [word for one in called for word in _words(one.get("arguments"))]
    return next((word for word in words if not _is_in(whole, word)), "")


def _unnamed(tokenizer: Any, messages: Sequence[Message], tools: Tools) -> str:
    """The first name of a tool or of a call, or the text beside the last, that the template leaves out; empty: none.

    They are rendered under names, and with words, that nothing else holds: a text may say the name of a tool, and a
    call what the text beside it says.
    """
    named: dict[str, str] = {}

    def other(function: dict[str, Any], number: int) -> dict[str, Any]:
        new = f"{function['name']}x{number}x{len(named)}"
        named[new] = str(function["name"])
        return {**function, "name": new}

    functions: list[Any] = [tool.get("function", tool) for tool in tools or ()]
    renamed = [other(one, 0) if isinstance(one, dict) and "name" in one else one for one in functions]

    def beside(text: str) -> str:
        if not text.strip():
            return text
        word = f"xbeside{len(named)}x"
        named[word] = text
        return f"{text} {word}"

    asked = [
        {
            **message,
            "content": beside(str(message.get("content") or "")) if at == len(messages) else message.get("content"),
            "tool_calls": [{**call, "function": other(call["function"], at)} for call in calls],
        }
        if (calls := message.get("tool_calls"))
        else message
        for at, message in enumerate(messages, 1)
    ]
    if not named:
        return ""
    whole = render_text(tokenizer, asked, renamed or None)
    return next((old for new, old in named.items() if new not in whole), "")


def _named_in(schema: Any) -> list[str]:
    """The names of all arguments in a JSON schema, those within others too."""
    if isinstance(schema, list):
        return [name for item in schema for name in _named_in(item)]
    if not isinstance(schema, dict):
        return []
    own = schema.get("properties")
    return [*(own if isinstance(own, dict) else ()), *(name for item in schema.values() for name in _named_in(item))]


def _words(value: Any) -> list[str]:
    """The keys and texts of a value as JSON has it."""
    if isinstance(value, dict):
        return [word for key, item in value.items() for word in (str(key), *_words(item))]
    if isinstance(value, list):
        return [word for item in value for word in _words(item)]
    return [value] if isinstance(value, str) else []


def _is_in(rendered: str, text: str) -> bool:
    """Whether a template has rendered a text, as it is or as JSON writes it."""
    forms = (text, _THINKING_FLAGS.sub("", text), json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    return any(form.strip() in rendered for form in forms)


def _tools_not_rendered(name: str) -> InvalidInput:
    return InvalidInput(
        "tools_not_rendered",
        f"the chat template leaves out a tool or a call: {name!r:.60} is not in what it makes of the row",
        "use a base model whose template knows tools, such as Qwen3 or Llama 3.1, or rows without them",
    )


def _reasoning_not_rendered(index: int) -> InvalidInput:
    return InvalidInput(
        "reasoning_not_rendered",
        f"the chat template leaves out the reasoning of message {index}",
        'use a base model whose template has reasoning, with `thinking = "on"` where it can be told; or take the '
        "thoughts out of the texts, or --ignore their key",
    )


def _not_incremental(index: int) -> InvalidInput:
    return InvalidInput(
        "template_not_incremental",
        f"the chat template does not render message {index} as what its prompt goes on with",
        "use another base model, or rows of another kind",
    )


def _text_not_rendered(index: int) -> InvalidInput:
    return InvalidInput(
        "text_not_rendered",
        f"the chat template does not render the text of message {index} as it is",
        "take out of the text what the template cuts or rewrites, or use another base model",
    )


def _no_end_of_turn(index: int) -> InvalidInput:
    return InvalidInput(
        "no_end_of_turn",
        f"the chat template puts no end-of-turn token after message {index}: it would not learn to stop",
        "use a base model whose template ends the assistant's turn with a special token",
    )


def _encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of what a chat template has rendered, as `apply_chat_template` makes them."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def render_text(
    tokenizer: Any, messages: Sequence[Message], tools: Tools, *, add_generation_prompt: bool = False, **told: Any
) -> str:
    """What the chat template makes of `messages`, and of what else it is told. Raises InvalidInput where it refuses."""
    shown = tools_as_read(tokenizer, tools)
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages), tools=shown, add_generation_prompt=add_generation_prompt, tokenize=False, **told
            )
        )
    except Exception as error:  # a template is its publisher's program and raises what it likes
        if "tool" not in str(tokenizer.chat_template) and (name := tools_absent("", messages, shown)):
            raise _tools_not_rendered(name) from error
        if isinstance(error, TypeError) and any(message.get("tool_calls") for message in messages):
            raise InvalidInput(
                "template_refused",
                f"the chat template cannot take the arguments of calls as objects, as engines give them: {error}",
                "use a base model whose template can, or rows without calls",
            ) from error
        raise InvalidInput(
            "template_refused",
            f"the chat template refuses the messages: {reason(error)}",
            "mend the row, or use a base model whose template knows these roles",
        ) from error


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _normal(text: str) -> str:
    """Text without what templates and tokenizers may change: outer white space, the Unicode normal form."""
    return unicodedata.normalize("NFC", text).strip()
