"""A tokenizer as every process loads it, and the day that its chat template is told."""

from __future__ import annotations

import copy
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from chat_templates import CHATML, DATED, make_tokenizer

from appliance.data.render import render_conversation, render_prompt
from appliance.data.tokenizer import load_tokenizer, set_clock

ASKED = [{"role": "user", "content": "hello"}]
DAY, LATER = date(2024, 2, 29), date(2024, 3, 9)


@pytest.fixture
def dated(tmp_path: Path) -> Path:
    make_tokenizer(DATED).save_pretrained(tmp_path / "dated")
    return tmp_path / "dated"


def said(tokenizer: Any) -> str:
    return str(tokenizer.decode(render_prompt(tokenizer, ASKED))).partition("\n")[0]


def test_a_template_is_told_the_day_that_it_is_rendered_for(dated: Path) -> None:
    tokenizer = load_tokenizer(dated, DAY)
    assert said(tokenizer) == "It is 29 Feb 2024."
    (whole,) = render_conversation(tokenizer, [*ASKED, {"role": "assistant", "content": "he"}])
    assert tokenizer.decode(whole.input_ids).startswith("It is 29 Feb 2024.")


def test_without_one_it_is_told_today(dated: Path) -> None:
    days = [date.today()]
    told = said(load_tokenizer(dated))
    days.append(date.today())
    assert told in [day.strftime("It is %d %b %Y.") for day in days]


def test_another_day_takes_the_place_of_the_first_also_in_copies(dated: Path) -> None:
    tokenizer = load_tokenizer(dated, DAY)
    for one in (copy.copy(tokenizer), copy.deepcopy(tokenizer), tokenizer):
        set_clock(one, LATER)
        assert said(one) == "It is 09 Mar 2024."


def test_a_template_that_does_not_ask_is_left_alone(tmp_path: Path) -> None:
    make_tokenizer(CHATML).save_pretrained(tmp_path)
    assert "apply_chat_template" not in vars(load_tokenizer(tmp_path, DAY))
