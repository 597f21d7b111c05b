"""A share of the conversations goes to the canary, and a canary that fails costs no client an answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_engine import ANSWER, STREAM, Script, ScriptedEngine, answer, broken_answer, chunk, events, route, stall

from appliance.canary import FIRST_TOKEN, LATER_TOKEN, WHOLE_ANSWER, Comparison
from serve.gateway.canary import chosen
from serve.gateway.edge import Gateway

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
ASK_STREAM = {**ASK, "stream": True}
CHAT = "/v1/chat/completions"
MANY = 20_000


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_a_share_of_the_conversations_is_chosen(share: float) -> None:
    count = sum(chosen(f"conversation {number}", share) for number in range(MANY))
    deviation = (MANY * share * (1 - share)) ** 0.5
    assert abs(count - MANY * share) < 4 * deviation


def test_a_larger_share_only_adds_conversations() -> None:
    before: set[int] = set()
    for share in (0.0, 0.05, 0.1, 0.5, 0.9, 1.0):
        now = {number for number in range(1000) if chosen(str(number), share)}
        assert before <= now
        before = now
    assert len(before) == 1000
    assert not any(chosen(str(number), 0.0) for number in range(1000))


def test_the_same_conversation_always_falls_to_the_same_side() -> None:
    """Known values: a daemon that is started again, or a later version, must not move anybody."""
    assert [number for number in range(60) if chosen(f"{number}", 0.1)] == [18, 29, 47, 55]
    assert not chosen("\ud800", 0.0), "half of a surrogate pair has a place too"


@pytest.fixture
async def candidate(tmp_path: Path) -> AsyncIterator[ScriptedEngine]:
    engine = ScriptedEngine(tmp_path / "candidate.sock")
    engine.script = answer(200, {**ANSWER, "model": "r2"})
    await engine.start()
    yield engine
    await engine.stop()


@pytest.fixture
async def comparison(gateway: Gateway, candidate: ScriptedEngine) -> Comparison:
    """Figures of a canary that half of the conversations go to."""
    comparison = Comparison("r1", "r2")
    gateway.route_canary(route(candidate, "r2"), 0.5, comparison)
    return comparison


def named(side: str, share: float = 0.5) -> dict[str, str]:
    """A header that names a conversation of one side, live or canary."""
    wanted = side == "canary"
    return {
        "x-conversation-id": next(
            str(number) for number in range(999) if chosen(f"r2/k1/header/{number}", share) is wanted
        )
    }


async def counted(comparison: Comparison, requests: int) -> None:
    """Until so many are counted: a client may have its answer a moment before."""
    async with asyncio.timeout(60):
        while comparison.live_tally.requests + comparison.candidate_tally.requests < requests:
            await asyncio.sleep(0.005)


async def test_conversations_divide_by_the_share_and_stay(
    http: httpx.AsyncClient, engine: ScriptedEngine, candidate: ScriptedEngine, comparison: Comparison
) -> None:
    answered: dict[int, str] = {}
    for number in [*range(60), *range(60)]:
        response = await http.post(CHAT, json=ASK, headers={"x-conversation-id": str(number)})
        assert answered.setdefault(number, response.json()["model"]) == response.json()["model"]
    await counted(comparison, 120)
    by = list(answered.values())
    assert 15 < by.count("r2") < 45
    assert {request["model"] for request in candidate.requests} == {"r2"}
    assert (comparison.live_tally.requests, comparison.candidate_tally.requests) == (
        len(engine.requests),
        len(candidate.requests),
    )


async def test_without_a_name_the_api_key_decides(
    http: httpx.AsyncClient, engine: ScriptedEngine, candidate: ScriptedEngine, comparison: Comparison
) -> None:
    for _ in range(5):
        await http.post(CHAT, json=ASK)
    assert sorted((len(engine.requests), len(candidate.requests))) == [0, 5]


async def test_an_operator_who_names_no_conversation_talks_to_the_live_release(
    gateway: Gateway, listen: Any, candidate: ScriptedEngine, comparison: Comparison
) -> None:
    gateway.route_canary(route(candidate, "r2"), 0.999999, comparison)
    async with httpx.AsyncClient(base_url=await listen(gateway.operator)) as client:
        assert (await client.post(CHAT, json=ASK)).json()["model"] == "r1"
        assert (await client.post(CHAT, json={**ASK, "user": "me"})).json()["model"] == "r2"


@pytest.mark.parametrize(("model", "answers"), [("r1", "r1"), ("r2", "r2"), ("live", None)])
@pytest.mark.parametrize("side", ["live", "canary"])
async def test_a_release_that_is_asked_for_by_name_answers(
    http: httpx.AsyncClient, comparison: Comparison, model: str, answers: str | None, side: str
) -> None:
    response = await http.post(CHAT, json={**ASK, "model": model}, headers=named(side))
    assert response.json()["model"] == (answers or {"live": "r1", "canary": "r2"}[side])


async def test_a_canary_whose_engine_is_away_is_to_be_asked_again(
    http: httpx.AsyncClient, gateway: Gateway, engine: ScriptedEngine, wanted: set[str], comparison: Comparison
) -> None:
    gateway.end_canary()
    assert (await http.post(CHAT, json={**ASK, "model": "r2"})).status_code == 404
    wanted.add("r2")
    response = await http.post(CHAT, json={**ASK, "model": "r2"})
    assert response.status_code == 503
    assert int(response.headers["retry-after"]) > 0
    assert response.json()["error"]["code"] == "engine_unavailable"
    assert engine.requests == []


async def test_models_name_the_canary(http: httpx.AsyncClient, gateway: Gateway, comparison: Comparison) -> None:
    listed = (await http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["live", "r1", "r2"]
    gateway.end_canary()
    listed = (await http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == ["live", "r1"]


async def hang_up(writer: asyncio.StreamWriter) -> None:
    """No answer at all."""


FAULTS: dict[str, Script] = {
    "an error": answer(500, {"error": {"message": "CUDA error"}}),
    "overload": answer(503, {"error": {"message": "no"}}),
    "half an answer": broken_answer(),
    "no answer": hang_up,
    "half an event": events(chunk("Hel")[:20], end=False),
}


@pytest.mark.parametrize("fault", [*FAULTS, "no engine"])
@pytest.mark.parametrize("ask", [ASK, ASK_STREAM], ids=["whole", "stream"])
async def test_what_the_canary_fails_before_the_first_byte_the_live_release_answers(
    http: httpx.AsyncClient,
    engine: ScriptedEngine,
    candidate: ScriptedEngine,
    comparison: Comparison,
    fault: str,
    ask: dict[str, Any],
) -> None:
    engine.script = events(STREAM) if ask is ASK_STREAM else answer(200, ANSWER)
    if fault == "no engine":
        await candidate.stop()
    else:
        candidate.script = FAULTS[fault]
    response = await http.post(CHAT, json=ask, headers=named("canary"))
    assert response.status_code == 200
    assert response.content == STREAM if ask is ASK_STREAM else response.json() == ANSWER
    await counted(comparison, 2)
    assert (comparison.candidate_tally.requests, comparison.candidate_tally.errors) == (1, 1)
    assert (comparison.live_tally.requests, comparison.live_tally.errors) == (1, 0)


@pytest.mark.parametrize("patience", [0.2])
async def test_a_canary_that_says_nothing_is_given_up_for_the_live_release(
    http: httpx.AsyncClient, candidate: ScriptedEngine, comparison: Comparison
) -> None:
    candidate.script = stall()
    assert (await http.post(CHAT, json=ASK, headers=named("canary"))).json()["model"] == "r1"
    assert comparison.candidate_tally.errors == 1


async def test_a_canary_that_was_asked_for_by_name_is_not_replaced(
    http: httpx.AsyncClient, engine: ScriptedEngine, candidate: ScriptedEngine, comparison: Comparison
) -> None:
    candidate.script = hang_up
    response = await http.post(CHAT, json={**ASK, "model": "r2"})
    assert response.status_code == 502
    assert engine.requests == []
    await counted(comparison, 1)
    assert comparison.candidate_tally.errors == 1


@pytest.mark.parametrize("side", ["live", "canary"])
async def test_a_stream_that_breaks_is_an_error_of_its_side(
    http: httpx.AsyncClient,
    engine: ScriptedEngine,
    candidate: ScriptedEngine,
    comparison: Comparison,
    side: str,
) -> None:
    engine.script = candidate.script = events(chunk("Hel"), end=False)
    response = await http.post(CHAT, json=ASK_STREAM, headers=named(side))
    assert response.text.startswith(chunk("Hel").decode()), "what has begun cannot be answered by another"
    assert "engine_died" in response.text
    assert len(engine.requests) + len(candidate.requests) == 1
    await counted(comparison, 1)
    asked = comparison.candidate_tally if side == "canary" else comparison.live_tally
    assert (asked.requests, asked.errors) == (1, 1)
    assert comparison.live_tally.requests + comparison.candidate_tally.requests == 1


async def test_a_stream_that_breaks_after_its_last_event_is_counted_once(
    http: httpx.AsyncClient, engine: ScriptedEngine, comparison: Comparison
) -> None:
    engine.script = events(STREAM, b"data: ", end=False)
    await http.post(CHAT, json=ASK_STREAM, headers=named("live"))
    engine.script = events(STREAM)
    await http.post(CHAT, json=ASK_STREAM, headers=named("live"))
    await counted(comparison, 2)
    assert (comparison.live_tally.requests, comparison.live_tally.errors) == (2, 1)


@pytest.mark.parametrize("side", ["live", "canary"])
async def test_a_failure_that_is_told_in_a_stream_is_an_error(
    http: httpx.AsyncClient, engine: ScriptedEngine, candidate: ScriptedEngine, comparison: Comparison, side: str
) -> None:
    told = chunk("Hel") + b'data: {"error": {"message": "CUDA error"}}\n\ndata: [DONE]\n\n'
    engine.script = candidate.script = events(told)
    assert (await http.post(CHAT, json=ASK_STREAM, headers=named(side))).content == told
    await counted(comparison, 1)
    assert {"live": comparison.live_tally, "canary": comparison.candidate_tally}[side].errors == 1


@pytest.mark.parametrize("side", ["live", "canary"])
@pytest.mark.parametrize("mistake", ["field", "engine's refusal", "leaves"])
async def test_a_clients_own_mistake_is_not_counted(
    http: httpx.AsyncClient,
    engine: ScriptedEngine,
    candidate: ScriptedEngine,
    comparison: Comparison,
    side: str,
    mistake: str,
) -> None:
    engine.script = candidate.script = answer(400, {"error": {"message": "too long"}})
    if mistake == "leaves":
        engine.script = candidate.script = stall(chunk("Hel"))
        async with http.stream("POST", CHAT, json=ASK_STREAM, headers=named(side)) as response:
            await anext(response.aiter_bytes())
        await asyncio.wait_for((candidate if side == "canary" else engine).left.wait(), 10)
    else:
        asked = {**ASK, "logprobs": True} if mistake == "field" else ASK
        assert (await http.post(CHAT, json=asked, headers=named(side))).status_code == 400
    assert comparison.live_tally.requests == comparison.candidate_tally.requests == 0


async def test_both_sides_answers_are_timed_and_their_ends_counted(
    http: httpx.AsyncClient, engine: ScriptedEngine, candidate: ScriptedEngine, comparison: Comparison
) -> None:
    cut = chunk("Hel") + chunk("lo") + chunk("", "length") + b"data: [DONE]\n\n"
    engine.script, candidate.script = events(STREAM), events(cut, pause=0.01)
    for side in ("live", "canary"):
        await http.post(CHAT, json=ASK_STREAM, headers=named(side))
    engine.script = answer(200, ANSWER)
    await http.post(CHAT, json=ASK, headers=named("live"))
    await counted(comparison, 3)
    assert comparison.live_tally.stops == {"stop": 2}
    assert comparison.candidate_tally.stops == {"length": 1}
    timed = {name: len(times) for name, times in comparison.live_tally.seconds.items()}
    assert timed == {FIRST_TOKEN: 1, LATER_TOKEN: 1, WHOLE_ANSWER: 1}
    assert comparison.candidate_tally.errors == comparison.live_tally.errors == 0


async def test_a_canary_that_ends_finishes_its_answers_and_gets_no_more(
    http: httpx.AsyncClient, gateway: Gateway, candidate: ScriptedEngine, comparison: Comparison
) -> None:
    candidate.script = events(chunk("Hel"), STREAM, pause=0.3)
    asking = asyncio.create_task(http.post(CHAT, json=ASK_STREAM, headers=named("canary")))
    await asyncio.wait_for(candidate.arrived.wait(), 60)
    gateway.end_canary()
    draining = asyncio.create_task(gateway.drained(candidate.address, 10))
    assert (await http.post(CHAT, json=ASK, headers=named("canary"))).json()["model"] == "r1"
    assert not draining.done(), "its engine may not stop yet"
    assert (await asking).content == chunk("Hel") + STREAM
    await asyncio.wait_for(draining, 60)
    assert comparison.live_tally.requests == 0, "nobody counts any more"


async def test_an_engine_that_has_failed_is_not_waited_for_while_another_one_is(
    http: httpx.AsyncClient, gateway: Gateway, engine: ScriptedEngine, candidate: ScriptedEngine, comparison: Comparison
) -> None:
    candidate.script = hang_up
    gateway.hold(True)
    gateway.route(None)
    asking = asyncio.create_task(http.post(CHAT, json=ASK, headers=named("canary")))
    async with asyncio.timeout(60):
        while not gateway._dispatch.live.waiting:
            await asyncio.sleep(0.01)
    await asyncio.wait_for(gateway.drained(candidate.address, 600), 10)
    gateway.route(route(engine))
    assert (await asking).json()["model"] == "r1"


async def test_a_canary_that_ends_keeps_nobody_waiting(
    http: httpx.AsyncClient, gateway: Gateway, candidate: ScriptedEngine, comparison: Comparison
) -> None:
    candidate.script = stall()
    gateway._dispatch._candidate.at_once = 1
    asking = [asyncio.create_task(http.post(CHAT, json=ASK, headers=named("canary"))) for _ in range(2)]
    async with asyncio.timeout(60):
        while gateway._dispatch._candidate.waiting < 1:
            await asyncio.sleep(0.01)
    gateway.end_canary()
    done, _ = await asyncio.wait(asking, timeout=30, return_when=asyncio.FIRST_COMPLETED)
    assert [each.result().json()["model"] for each in done] == ["r1"], "the live release answers who has waited for it"
    assert len(candidate.requests) == 1
    for task in asking:
        task.cancel()
    await asyncio.wait_for(candidate.left.wait(), 60)


async def test_a_new_share_keeps_the_figures(
    http: httpx.AsyncClient, gateway: Gateway, candidate: ScriptedEngine, comparison: Comparison
) -> None:
    await http.post(CHAT, json=ASK, headers=named("canary"))
    gateway.route_canary(route(candidate, "r2"), 0.9999, comparison)
    assert (await http.post(CHAT, json=ASK, headers=named("live"))).json()["model"] == "r2"
    await counted(comparison, 2)
    assert comparison.candidate_tally.requests == 2


async def test_the_canary_answers_its_share_while_the_live_engine_is_away(
    http: httpx.AsyncClient, gateway: Gateway, comparison: Comparison
) -> None:
    gateway.route(None)
    assert (await http.post(CHAT, json=ASK, headers=named("canary"))).json()["model"] == "r2"
    assert (await http.post(CHAT, json=ASK, headers=named("live"))).status_code == 503
    assert comparison.live_tally.requests == 0, "an engine that is away has not failed"
