"""What the base answers to the probes of a run that only nudges it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import events, read_recipe, work

from appliance.data.tokenizer import load_tokenizer
from appliance.home import Home
from appliance.release import base_answers, verify
from appliance.release.base_answers import ask_base
from appliance.release.gates import load_probes
from appliance.release.probes import make_probes
from appliance.supervisor.engines import Probe
from appliance.train.events import EventLog
from appliance.train.model import load_model, stop_token_ids

ROOM = 12


def asked(home: Home, **room: int) -> list[Probe]:
    """The probes of a run, of different lengths."""
    probes = make_probes(home, read_recipe(home.runs / "lora"), load_tokenizer(home.models / "tiny"))
    return [replace(probe, **{"max_tokens": ROOM, **room}) for probe in probes]


def length(folder: Path, probe: Probe) -> int:
    """Tokens of the greedy answer with the one that ends it, found token by token; 0 where it goes on beyond ROOM."""
    model, ids = load_model(folder), list(probe.token_ids)
    stops = stop_token_ids(load_tokenizer(folder), folder)
    for count in range(1, ROOM + 1):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stops:
            return count
    return 0


def test_it_is_seen_which_answers_end_within_their_room(home: Home) -> None:
    model, log = home.runs / "lora" / "merge" / "model", EventLog(home.runs / "lora" / "events.jsonl")
    probes = asked(home)
    lengths = [length(model, probe) for probe in probes]
    assert any(lengths), "the model that stands for the base has learnt to end"
    tokenizer = load_tokenizer(model)
    assert [probe.base_ends for probe in ask_base(model, tokenizer, probes, log)] == [count > 0 for count in lengths]
    ended = [replace(probe, max_tokens=count) for probe, count in zip(probes, lengths, strict=True) if count]
    assert all(probe.base_ends for probe in ask_base(model, tokenizer, ended, log))
    short = [replace(probe, max_tokens=probe.max_tokens - 1) for probe in ended]
    assert not any(probe.base_ends for probe in ask_base(model, tokenizer, [*short, probes[0]], log)[:-1])


def test_without_the_memory_it_is_not_seen_and_said(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(base_answers, "_answers", fails)
    run, probes = home.runs / "lora", asked(home)
    log = EventLog(run / "events.jsonl")
    assert ask_base(home.models / "tiny", load_tokenizer(home.models / "tiny"), probes, log) == probes
    assert "out of memory" in events(run, "warning", "verify")[-1]["message"]


def test_without_the_memory_for_16_bits_it_is_asked_in_four(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    load, ask, tried = base_answers.load_model, base_answers._answers, []

    def load_it(base: Path, *, quantised: bool) -> Any:
        tried.append(quantised)
        return load(base, quantised=quantised)

    def answers(model: Any, *others: Any) -> Any:
        if tried == [False]:
            raise torch.OutOfMemoryError("out of memory")
        return ask(model, *others)

    monkeypatch.setattr(base_answers, "load_model", load_it)
    monkeypatch.setattr(base_answers, "_answers", answers)
    run = home.runs / "lora"
    found = ask_base(
        home.models / "tiny", load_tokenizer(home.models / "tiny"), asked(home), EventLog(run / "events.jsonl")
    )
    assert tried == [False, True]
    assert not all(probe.base_ends for probe in found), "a model that has learnt nothing goes on"
    assert not [event for event in events(run, "warning", "verify") if "out of memory" in event["message"]]


def test_only_a_run_that_teaches_no_answers_asks_the_base(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def goes_on(base: Path, tokenizer: Any, probes: list[Probe], events: EventLog) -> list[Probe]:
        assert base == home.models / "tiny"
        return [replace(probe, base_ends=False) for probe in probes]

    monkeypatch.setattr(verify, "ask_base", goes_on)
    for id, asks in (("lora", False), ("dpo", True), ("base", False)):
        assert work(home.runs / id, "verify") == 0
        assert {probe.base_ends for probe in load_probes(home.runs / id)} == {not asks}
