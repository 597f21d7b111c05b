"""On every chat template a row is trained as it is said, or refused with the reason, which docs/TEMPLATES.md has."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from chat_templates import templates, tokenizer_of
from template_table import ROWS, SAID, main, trained_as

from appliance.data.render import Rendered, render_prompt
from appliance.data.template_input import special_ids
from appliance.errors import InvalidInput

NAMES = sorted(templates())


@pytest.fixture(scope="module", params=NAMES)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tokenizer_of(templates()[request.param])


def words(message: dict[str, Any]) -> set[str]:
    """The words that only this message says."""
    said = {message["content"], message.get("reasoning_content", "")} & set(SAID)
    if "<think>" in message["content"]:
        said |= {SAID.thought, SAID.answer}
    return said | ({SAID.tool} if message.get("tool_calls") else set())


def spans(rendered: Rendered) -> list[tuple[int, int]]:
    """Where trained tokens begin and end."""
    edges = [False, *rendered.trained, False]
    turns = [place for place, (before, after) in enumerate(pairwise(edges)) if before != after]
    return list(zip(turns[::2], turns[1::2], strict=True))


@pytest.mark.parametrize("kind", ROWS)
def test_exactly_the_assistants_turns_are_trained_each_after_its_prompt(tokenizer: Any, kind: str) -> None:
    examples = trained_as(tokenizer, kind)
    if isinstance(examples, InvalidInput):
        assert kind not in ("one answer", "several turns"), "every template can be told those"
        return
    messages, tools = ROWS[kind]
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    found = [(example, start, end) for example in examples for start, end in spans(example)]
    assert len(found) == len(answers)
    everything = set(SAID)
    for (example, start, end), index in zip(found, answers, strict=True):
        said = tokenizer.decode(example.input_ids[start:end])
        assert {word for word in everything if word in said} == words(messages[index])
        assert example.input_ids[:start] == render_prompt(tokenizer, messages[:index], tools)
        assert example.input_ids[end - 1] in special_ids(tokenizer)
        asked = tokenizer.decode(example.input_ids[:start])
        before = set().union(*(words(message) for message in messages[:index] if message["role"] != "assistant"))
        assert before <= {word for word in everything if word in asked}


@pytest.mark.parametrize("kind", ["call", "call and result", "text beside a call"])
@pytest.mark.parametrize("name", ["cohere", "gemma", "gemma3", "llama3", "phi3", "smollm2"])
def test_templates_that_know_no_tools_say_so(name: str, kind: str) -> None:
    found = trained_as(tokenizer_of(templates()[name]), kind)
    assert isinstance(found, InvalidInput)
    assert found.code == "tools_not_rendered"


def test_the_page_says_what_is_so(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    assert (Path(__file__).parents[3] / "docs/TEMPLATES.md").read_text() == capsys.readouterr().out
