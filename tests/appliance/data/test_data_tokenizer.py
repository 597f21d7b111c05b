"""A tokenizer as every process loads it, and the day that its chat template is told."""

from __future__ import annotations

import copy
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, DATED, PUBLISHED, make_tokenizer

from appliance.data.render import render_conversation, render_prompt
from appliance.data.tokenizer import (
    TemplateSettings,
    load_tokenizer,
    set_template,
    thinking_switches,
    thinks_unasked,
    variables,
)

ASKED = [{"role": "user", "content": "hello"}]
DAY, LATER = date(2024, 2, 29), date(2024, 3, 9)


@pytest.fixture
def dated(tmp_path: Path) -> Path:
    make_tokenizer(DATED).save_pretrained(tmp_path / "dated")
    return tmp_path / "dated"


def said(tokenizer: Any) -> str:
    return str(tokenizer.decode(render_prompt(tokenizer, ASKED))).partition("\n")[0]


def test_a_template_is_told_the_day_that_it_is_rendered_for(dated: Path) -> None:
    tokenizer = load_tokenizer(dated, TemplateSettings(today=DAY))
    assert said(tokenizer) == "It is 29 Feb 2024."
    (whole,) = render_conversation(tokenizer, [*ASKED, {"role": "assistant", "content": "he"}])
    assert tokenizer.decode(whole.input_ids).startswith("It is 29 Feb 2024.")


def test_without_one_it_is_told_today(dated: Path) -> None:
    days = [date.today()]
    told = said(load_tokenizer(dated))
    days.append(date.today())
    assert told in [day.strftime("It is %d %b %Y.") for day in days]


def test_another_day_takes_the_place_of_the_first_also_in_copies(dated: Path) -> None:
    tokenizer = load_tokenizer(dated, TemplateSettings(today=DAY))
    for one in (copy.copy(tokenizer), copy.deepcopy(tokenizer), tokenizer):
        set_template(one, TemplateSettings(today=LATER))
        assert said(one) == "It is 09 Mar 2024."


def test_a_template_that_does_not_ask_is_left_alone(tmp_path: Path) -> None:
    make_tokenizer(CHATML).save_pretrained(tmp_path)
    assert "apply_chat_template" not in vars(load_tokenizer(tmp_path, TemplateSettings(today=DAY, thinking=True)))


def published(name: str) -> str:
    return (PUBLISHED / f"{name}.jinja").read_text()


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        *((name, ("enable_thinking",)) for name in ("qwen3", "qwen3_6", "qwen3_8", "gemma4", "gemma4_v5", "glm4moe")),
        *((name, ("enable_thinking",)) for name in ("nemotron_3_nano", "qwen3_5_think", "qwen3_5_nothink")),
        *((name, ()) for name in ("deepseek_r1_distill", "gptoss", "llama3_1", "qwen3_instruct_2507", "qwen2_5")),
        *((name, ()) for name in ("lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl")),
    ],
)
def test_which_templates_can_be_told_whether_to_think(name: str, switches: tuple[str, ...]) -> None:
    assert thinking_switches(published(name)) == switches


@pytest.mark.parametrize(
    ("name", "thinks"), [("qwen3", True), ("qwen3_5_think", True), ("qwen3_5_nothink", False), ("gemma4_v5", False)]
)
def test_what_a_template_does_by_itself_is_known(name: str, thinks: bool) -> None:
    assert thinks_unasked(published(name)) is thinks


def test_every_published_template_is_read() -> None:
    for path in PUBLISHED.glob("*.jinja"):
        assert not variables(path.read_text()) & {"messages", "tools", "bos_token"}, path.name
    assert variables(published("gptoss")) >= {"reasoning_effort"}
    assert variables("{% if thinking %}{{ messages }}{% endif %}{% generation %}a{% endgeneration %}") == {"thinking"}
    assert variables("{% if") == frozenset()


@pytest.mark.parametrize("thinking", [None, True, False])
def test_without_thinking_the_prompt_has_the_empty_thought_that_is_trained_otherwise(
    tmp_path: Path, thinking: bool | None
) -> None:
    make_tokenizer(published("qwen3")).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, TemplateSettings(thinking=thinking))
    empty = "<think>\n\n</think>\n\n"
    assert tokenizer.decode(render_prompt(tokenizer, ASKED)).endswith(empty) == (thinking is False)
    (whole,) = render_conversation(tokenizer, [*ASKED, {"role": "assistant", "content": "he"}])
    trained = tokenizer.decode([id for id, counts in zip(whole.input_ids, whole.trained, strict=True) if counts])
    assert trained == ("" if thinking is False else empty) + "he<|im_end|>"
    assert empty in tokenizer.decode(whole.input_ids), "either way the model has seen it before the answer"


def test_a_request_may_ask_for_the_other(tmp_path: Path) -> None:
    make_tokenizer(published("qwen3")).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path, TemplateSettings(thinking=False))
    assert not tokenizer.decode(render_prompt(tokenizer, ASKED, enable_thinking=True)).endswith("</think>\n\n")
