"""The probes: which prompts, rendered how, and what room their answers have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from typing import Any

import pytest
from chat_templates import CALLING
from tiny import CHATML, FACTS, add_dataset, add_run, read_recipe, stage, work

from appliance.data.render import render_prompt
from appliance.data.tokenizer import load_tokenizer
from appliance.home import Home
from appliance.release.gates import load_probes
from appliance.release.probes import make_probes
from appliance.supervisor.engines import Probe


def probes(home: Home, id: str) -> list[Probe]:
    recipe = read_recipe(home.runs / id)
    return make_probes(home, recipe, load_tokenizer(home.models / "tiny", recipe.template))


def on_rows(home: Home, rows: Sequence[dict[str, Any]], **settings: Any) -> list[Probe]:
    """The probes of a run on `rows`, without the generic ones."""
    dataset = add_dataset(home, "rows", list(rows))
    add_run(home, "rows", stage("sft", f'"{dataset}"', **settings))
    return probes(home, "rows")[:-2]


def turns(question: str, count: int, answer: str = "Yes.") -> dict[str, Any]:
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": said * count}


def test_probes_are_training_prompts_as_the_trainer_renders_them(home: Home) -> None:
    assert work(home.runs / "lora", "verify") == 0
    found = load_probes(home.runs / "lora")
    assert found == probes(home, "lora")
    asked = {row["messages"][0]["content"] for row in FACTS}
    assert len(found) == 10
    assert sum(probe.messages[-1]["content"] in asked for probe in found) == 8
    assert len({probe.messages[-1]["content"] for probe in found}) == 10
    tokenizer = load_tokenizer(home.models / "tiny")
    for probe in found:
        assert probe.token_ids == render_prompt(tokenizer, probe.messages)
        assert tokenizer.decode(probe.token_ids).endswith("<|im_start|>assistant\n")
        assert (probe.max_tokens, probe.thought_tokens) == (512, 0)
    assert len(probes(home, "base")) == 2
    assert any("Say, what colour" in probe.messages[-1]["content"] for probe in probes(home, "dpo"))


def test_probes_are_rendered_on_the_day_of_the_run(home: Home) -> None:
    template = home.models / "tiny" / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }} " + CHATML)
    path = home.runs / "base" / "recipe.toml"
    path.write_text(path.read_text().replace(str(read_recipe(path.parent).clock), "2024-02-29"))
    assert read_recipe(path.parent).clock == date(2024, 2, 29)
    (home.runs / "base" / "merge" / "model" / template.name).write_bytes(template.read_bytes())
    assert work(home.runs / "base", "verify") == 0
    tokenizer = load_tokenizer(home.models / "tiny")
    for probe in load_probes(home.runs / "base"):
        assert tokenizer.decode(probe.token_ids).startswith("29 Feb 2024 ")


def test_they_are_of_one_turn_and_of_the_most(home: Home) -> None:
    rows = [turns(f"What is {number}?", 1) for number in range(60)] + [turns("What is it, then?", 4), turns("What?", 2)]
    found = on_rows(home, rows)
    counts = [len(probe.messages) for probe in found]
    assert len(found) == 8
    assert counts == sorted(counts)
    assert {counts[0], counts[-1]} <= {1, 3, 7}
    assert counts[-1] > counts[0]


def test_a_long_answer_has_room_for_twice_its_length(home: Home) -> None:
    (long,) = {probe.max_tokens for probe in on_rows(home, [turns("Why?", 1, "x" * 400), turns("Why not?", 1)])} - {512}
    assert 512 < long <= 2 * 402 + 64


def test_rows_that_no_answer_can_be_asked_for_are_left_out(home: Home) -> None:
    rows = [turns("What is it? " * 40, 1), turns("Why?", 1), turns("Why not?", 1), turns("What then?", 1)]
    asked = [probe.messages[0]["content"] for probe in on_rows(home, rows, max_length=64, drop_long=True)]
    assert asked
    assert not any("it" in question for question in asked)


def test_tools_and_calls_are_asked_as_clients_send_them(home: Home) -> None:
    (home.models / "tiny" / "chat_template.jinja").write_text(CALLING)
    tool = {"type": "function", "function": {"name": "look_up"}}
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"place": "Rome"}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call, call]}
    results: list[dict[str, Any]] = [{"role": "tool", "content": weather} for weather in ("sun", "rain")]
    answer = {"role": "assistant", "content": "Both."}
    rows = [{"messages": [turns(f"Why {n}?", 1)["messages"][0], called, *results, answer]} for n in range(3)]
    found = on_rows(home, [row | {"tools": [tool]} for row in rows])
    assert found
    tokenizer = load_tokenizer(home.models / "tiny")
    for probe in found:
        _, call_turn, *answers = probe.messages
        assert [json.loads(one["function"]["arguments"]) for one in call_turn["tool_calls"]] == [{"place": "Rome"}] * 2
        ids = [one["id"] for one in call_turn["tool_calls"]]
        assert len(set(ids)) == 2
        assert [one["tool_call_id"] for one in answers] == ids
        assert probe.token_ids == render_prompt(tokenizer, probe.messages, probe.tools)
        assert '"arguments": {"place": "Rome"}' in tokenizer.decode(probe.token_ids)
        assert probe.tools == [tool]


@pytest.mark.parametrize("words", ["{# <think> #}", "{# reasoning_effort #}", "{# [THINK] #}"])
def test_where_the_template_knows_thoughts_they_have_room_of_their_own(home: Home, words: str) -> None:
    (home.models / "tiny" / "chat_template.jinja").write_text(words + CHATML)
    assert {(probe.max_tokens, probe.thought_tokens) for probe in probes(home, "base")} == {(2560, 2048)}
