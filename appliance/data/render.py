"""From messages to token ids and the loss mask, through the tokenizer's own chat template only."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from appliance.errors import InvalidInput

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None


@dataclass(frozen=True)
class Rendered:
    """A conversation as token ids; `trained[i]` says whether the loss counts token i."""

    input_ids: list[int]
    trained: list[bool]


def render_prompt(tokenizer: Any, messages: Sequence[Message], tools: Tools = None) -> list[int]:
    """Token ids of `messages` with the header of the assistant's next turn.

    Raises InvalidInput where the template refuses the messages.
    """
    return _encode(tokenizer, messages, tools, add_generation_prompt=True)


def render_conversation(tokenizer: Any, messages: Sequence[Message], tools: Tools = None) -> Rendered:
    """Token ids of `messages`; trained are each assistant turn's text and its end-of-turn token,
    but of turns whose weight is 0.

    A turn begins where the prompt of the messages before it ends: exactly what the model is given when it has
    to answer. So what the template puts between that prompt and the text is trained too: an empty thought, or the name
    of a channel, which the model that is served has to write by itself. Raises InvalidInput where the template refuses
    the messages, where that prompt is not a prefix of the whole, or where the turn does not decode to its text followed
    by an end-of-turn token.
    """
    ids = _encode(tokenizer, messages, tools, add_generation_prompt=False)
    whole = _render(tokenizer, messages, tools)
    special = special_ids(tokenizer)
    positions = [position for position, token in enumerate(ids) if token in special]
    trained = [False] * len(ids)
    place, following = len(whole), 0
    for index in reversed(range(len(messages))):
        message = messages[index]
        if message["role"] != "assistant" or message.get("weight") == 0:
            continue
        prompt = render_prompt(tokenizer, messages[:index], tools)
        start = len(prompt)
        if ids[:start] != prompt:
            raise _not_incremental(index)
        if message.get("tool_calls"):
            turn = _encode(tokenizer, messages[: index + 1], tools, add_generation_prompt=False)
            if ids[: len(turn)] != turn:
                raise _not_incremental(index)
            end = _end_of_calls(turn, start, special, index)
        else:
            # Special tokens are cut out of a text before anything else is: a part of it has as many as it has in the
            # whole, and the one that ends the turn is found by how many follow the text.
            text_end = _end_of_text(tokenizer, messages, tools, whole, index)
            tokens = tokenizer(whole[text_end:place], add_special_tokens=False)["input_ids"]
            place, following = text_end, following + sum(token in special for token in tokens)
            if not 0 < following <= len(positions):
                raise _no_end_of_turn(index)
            end = positions[-following] + 1
            if _normal(message.get("content") or "") not in _normal(_decode(tokenizer, ids[start:end])):
                raise _text_not_rendered(index)
        trained[start:end] = [True] * (end - start)
    return Rendered(ids, trained)


def _end_of_text(tokenizer: Any, messages: Sequence[Message], tools: Tools, whole: str, index: int) -> int:
    """Where in `whole`, the conversation as a text, the text of message `index` ends.

    The same text may stand elsewhere, in the words of the template too. So the conversation is rendered once more with
    a word in its place that nothing else holds: what comes after that word comes after the text.
    """
    word = "text"
    while word in whole:
        word += "x"
    other = [*messages[:index], {**messages[index], "content": word}, *messages[index + 1 :]]
    _, found, after = _render(tokenizer, other, tools).rpartition(word)
    end = len(whole) - len(after)
    text = str(messages[index].get("content") or "").strip()
    if not found or not whole.endswith(after) or not whole[:end].rstrip().endswith(text):
        raise _text_not_rendered(index)
    return end


def _end_of_calls(turn: list[int], start: int, special: frozenset[int], index: int) -> int:
    """Position after the last special token of a turn of tool calls, whose form is the template's own."""
    for position in range(len(turn) - 1, start, -1):
        if turn[position] in special:
            return position + 1
    raise _no_end_of_turn(index)


def _not_incremental(index: int) -> InvalidInput:
    return InvalidInput(
        "template_not_incremental",
        f"the chat template renders the messages up to message {index} differently once others follow",
        "train on conversations with one answer each, or use another base model",
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


def _encode(tokenizer: Any, messages: Sequence[Message], tools: Tools, *, add_generation_prompt: bool) -> list[int]:
    encoded = _apply(tokenizer, messages, tools, add_generation_prompt, tokenize=True, return_dict=True)
    return list(encoded["input_ids"])


def _render(tokenizer: Any, messages: Sequence[Message], tools: Tools) -> str:
    return str(_apply(tokenizer, messages, tools, False, tokenize=False))


def _apply(
    tokenizer: Any, messages: Sequence[Message], tools: Tools, add_generation_prompt: bool, **options: bool
) -> Any:
    try:
        return tokenizer.apply_chat_template(
            list(messages), tools=tools or None, add_generation_prompt=add_generation_prompt, **options
        )
    except Exception as error:  # a template is its publisher's program and raises what it likes
        raise InvalidInput(
            "template_refused",
            f"the chat template refuses the messages: {type(error).__name__}: {error}",
            "mend the row, or use a base model whose template knows these roles",
        ) from error


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of the tokens that are no text: those of the template, and others of the kind."""
    added = tokenizer.added_tokens_decoder
    return frozenset(tokenizer.all_special_ids) | {token for token, about in added.items() if about.special}


def _normal(text: str) -> str:
    """Text without what templates and tokenizers may change: outer white space, the Unicode normal form."""
    return unicodedata.normalize("NFC", text).strip()
