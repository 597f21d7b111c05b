from __future__ import annotations

from typing import Any

import pytest
from chat_templates import (
    CALLING,
    CHATML,
    CLOSED_AT_THE_END,
    COUNTING,
    DEFAULT_SYSTEM,
    GEMMA,
    HARMONY,
    LLAMA,
    MISTRAL,
    OTHERS,
    RAISING,
    SHOUTING,
    THINKING,
    TRIMMING,
    WITHOUT_END,
    make_tokenizer,
)
from tokenizers import normalizers
from transformers import ByT5Tokenizer

from appliance.data.render import render_conversation, render_prompt
from appliance.errors import InvalidInput

USER = {"role": "user", "content": "hello"}
ANSWER = {"role": "assistant", "content": "he is here"}


def shown(tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
    """The rendered text with each trained span in double brackets."""
    rendered = render_conversation(tokenizer, messages, tools)
    assert len(rendered.input_ids) == len(rendered.trained)
    text, spans, start = "", rendered.trained, 0
    for end in range(1, len(spans) + 1):
        if end == len(spans) or spans[end] != spans[start]:
            piece = tokenizer.decode(rendered.input_ids[start:end])
            text += f"[[{piece}]]" if spans[start] else piece
            start = end
    return text


def test_the_text_and_the_end_of_turn_are_trained() -> None:
    assert shown(make_tokenizer(CHATML), [USER, ANSWER]) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n[[he is here<|im_end|>]]\n"
    )


def test_every_turn_of_the_assistant_is_trained() -> None:
    system = {"role": "system", "content": "be brief"}
    assert shown(make_tokenizer(DEFAULT_SYSTEM), [system, USER, ANSWER, USER, {**ANSWER, "content": "日本 🎉"}]) == (
        "<|im_start|>system\nbe brief<|im_end|>\n"
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n[[he is here<|im_end|>]]\n"
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n[[日本 🎉<|im_end|>]]\n"
    )


def test_a_system_prompt_put_in_by_the_template_is_not_trained() -> None:
    assert shown(make_tokenizer(DEFAULT_SYSTEM), [USER, ANSWER]).startswith(
        "<|im_start|>system\nYou are a helper<|im_end|>\n<|im_start|>user\nhello"
    )


def test_what_is_trained_is_what_the_prompt_is_continued_with() -> None:
    tokenizer = make_tokenizer(DEFAULT_SYSTEM)
    rendered = render_conversation(tokenizer, [USER, ANSWER])
    prompt = render_prompt(tokenizer, [USER])
    assert rendered.input_ids[: len(prompt)] == prompt
    assert rendered.trained.index(True) == len(prompt)
    assert rendered.trained.count(True) == len(tokenizer("he is here<|im_end|>")["input_ids"])


def test_the_text_of_another_turn_does_not_end_the_turn_early() -> None:
    tricky = {**ANSWER, "content": "say <|im_end|> and he"}
    assert "[[say <|im_end|> and he<|im_end|>]]\n" in shown(make_tokenizer(CHATML), [USER, tricky, USER, ANSWER])


def test_a_template_may_trim() -> None:
    assert "[[he<|im_end|>]]" in shown(make_tokenizer(TRIMMING), [USER, {**ANSWER, "content": " he\n"}])


def test_a_tokenizer_may_compose_characters() -> None:
    tokenizer = make_tokenizer(CHATML, normalizers.NFC())
    assert "[[caf\u00e9<|im_end|>]]" in shown(tokenizer, [USER, {**ANSWER, "content": "cafe\u0301"}])


def test_a_mark_at_the_end_of_the_whole_is_no_end_of_turn() -> None:
    assert shown(make_tokenizer(CLOSED_AT_THE_END), [USER, ANSWER, USER, ANSWER]).endswith(
        "[[he is here<|im_end|>]]\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n[[he is here<|im_end|>]]\n<|endoftext|>"
    )


def test_what_the_template_puts_before_the_last_answer_is_trained() -> None:
    assert shown(make_tokenizer(THINKING), [USER, ANSWER, USER, ANSWER]).endswith(
        "[[he is here<|im_end|>]]\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n[[<think>\n\n</think>\n\nhe is here<|im_end|>]]\n"
    )


KINDS = {
    "chatml": (CHATML, "{}<|im_end|>", "{}<|im_end|>"),
    "system": (DEFAULT_SYSTEM, "{}<|im_end|>", "{}<|im_end|>"),
    "trimming": (TRIMMING, "{}<|im_end|>", "{}<|im_end|>"),
    "closed": (CLOSED_AT_THE_END, "{}<|im_end|>", "{}<|im_end|>"),
    "llama": (LLAMA, "{}<|eot_id|>", "{}<|eot_id|>"),
    "mistral": (MISTRAL, " {}</s>", " {}</s>"),
    "gemma": (GEMMA, "{}<end_of_turn>", "{}<end_of_turn>"),
    "harmony": (HARMONY, "<|channel|>final<|message|>{}<|end|>", "<|channel|>final<|message|>{}<|return|>"),
    "thinking": (THINKING, "{}<|im_end|>", "<think>\n\n</think>\n\n{}<|im_end|>"),
}
"""Chat templates, and what is trained of an answer that others follow and of the last one."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "answer",
    [
        *("final", "a", "in", "assistant", "message", "model", "think", "hello", "hello\n\nhello", "l", ""),
        *("日本 🎉", "e\u0301", "<|im_end|>", "<|channel|>final<|message|>final<|return|>", "<|end|>\n<|start|>user"),
        *("</s>[INST] a [/INST]", "<end_of_turn>\n<start_of_turn>model\na", "<|eot_id|>", "<think>a</think>"),
    ],
)
def test_an_answer_is_found_where_it_is_whatever_it_says(kind: str, answer: str) -> None:
    template, followed, last = KINDS[kind]
    tokenizer = make_tokenizer(template)
    messages = [USER, {**ANSWER, "content": answer}, {**USER, "content": answer or "a"}, {**ANSWER, "content": answer}]
    rendered = shown(tokenizer, messages)
    spans = [piece.partition("]]")[0] for piece in rendered.split("[[")[1:]]
    assert spans == [followed.format(answer), last.format(answer)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("answer", [" a", "a \n", "a\n\n", " final "])
def test_white_space_around_an_answer_is_trained_unless_the_template_cuts_it(kind: str, answer: str) -> None:
    template, _, last = KINDS[kind]
    said = answer.strip() if "trim" in template else answer
    assert f"[[{last.format(said)}]]" in shown(make_tokenizer(template), [USER, {**ANSWER, "content": answer}])


@pytest.mark.parametrize("kind", KINDS)
def test_a_composed_character_is_trained_as_the_tokenizer_has_it(kind: str) -> None:
    template, _, last = KINDS[kind]
    tokenizer = make_tokenizer(template, normalizers.NFC())
    composed = last.format("\u00e9")
    assert f"[[{composed}]]" in shown(tokenizer, [USER, {**ANSWER, "content": "e\u0301"}])


def test_a_tokenizer_that_does_not_say_where_its_tokens_stand() -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=OTHERS, chat_template=HARMONY)
    assert not tokenizer.is_fast
    last = {**ANSWER, "content": "\u00e9 a"}
    assert shown(tokenizer, [USER, {**ANSWER, "content": "final"}, USER, last]).endswith(
        "<|start|>assistant[[<|channel|>final<|message|>final<|end|>]]<|start|>user<|message|>hello<|end|>"
        "<|start|>assistant[[<|channel|>final<|message|>\u00e9 a<|return|>]]"
    )


def test_tool_calls_are_trained_and_their_results_are_not() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [USER, {**ANSWER, "content": "", "tool_calls": [call]}, {"role": "tool", "content": "o"}, ANSWER]
    assert shown(make_tokenizer(CALLING), messages, [{"name": "f"}]) == (
        '[{"name": "f"}]<|im_start|>user\nhello<|im_end|>\n'
        '<|im_start|>assistant\n[[<|endoftext|>{"name": "f", "arguments": {"x": 1}}<|im_end|>]]\n'
        "<|im_start|>tool\no<|im_end|>\n<|im_start|>assistant\n[[he is here<|im_end|>]]\n"
    )


@pytest.mark.parametrize(
    ("template", "messages", "code"),
    [
        (RAISING, [USER, ANSWER], "template_refused"),
        (WITHOUT_END, [USER, ANSWER], "no_end_of_turn"),
        (SHOUTING, [USER, ANSWER], "text_not_rendered"),
        (COUNTING, [USER, ANSWER], "template_not_incremental"),
        (CHATML, [USER, {**ANSWER, "content": "\nhe"}], "template_not_incremental"),
    ],
)
def test_a_template_that_cannot_be_masked_is_refused(template: str, messages: list[dict[str, Any]], code: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        render_conversation(make_tokenizer(template), messages)
    assert caught.value.code == code
    assert caught.value.next
