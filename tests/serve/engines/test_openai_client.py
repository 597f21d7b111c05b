"""The official client, through the gateway, to a real engine. APPLIANCE_ENGINE says which; the tests are the same."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from engine_process import KEY, Served, listening

from appliance.traffic import Traffic
from serve.gateway.admission import Route
from serve.gateway.edge import Gateway
from serve.gateway.ledger import Ledger

pytestmark = pytest.mark.slow

ASK: list[Any] = [{"role": "user", "content": "Count from one to ten in words."}]
STORY: list[Any] = [{"role": "user", "content": "Tell me a long story about a dragon."}]


@pytest.fixture
async def client(endpoint: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=endpoint, api_key=KEY, max_retries=0, timeout=300) as client:
        yield client


@pytest.fixture
async def ask(client: openai.AsyncOpenAI) -> Any:
    """One greedy answer of at most 24 tokens, unless the test says otherwise."""

    async def ask(messages: list[Any] = ASK, **fields: Any) -> Any:
        defaults = {"model": "live", "max_tokens": 24, "temperature": 0}
        return await client.chat.completions.create(messages=messages, **{**defaults, **fields})

    return ask


async def collect(stream: Any) -> tuple[dict[int, str], dict[int, str], Any]:
    """Texts and reasons of the choices of a stream, and its usage."""
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    usage = None
    async for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    return texts, reasons, usage


async def test_an_answer(ask: Any) -> None:
    answer = await ask()
    assert answer.object == "chat.completion"
    assert answer.model == "r1"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id.startswith("req_")


async def test_a_stream_says_what_the_whole_answer_says(ask: Any) -> None:
    whole = await ask()
    texts, reasons, usage = await collect(await ask(stream=True, stream_options={"include_usage": True}))
    assert texts == {0: whole.choices[0].message.content}
    assert reasons == {0: whole.choices[0].finish_reason}
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


async def test_the_stream_tells_no_usage_unasked(ask: Any) -> None:
    assert (await collect(await ask(stream=True)))[2] is None


async def test_the_synchronous_client(endpoint: str) -> None:
    def talk() -> tuple[Any, str]:
        with openai.OpenAI(base_url=endpoint, api_key=KEY, max_retries=0) as client:
            fields: dict[str, Any] = {"model": "r1", "messages": ASK, "max_tokens": 8, "temperature": 0}
            whole = client.chat.completions.create(**fields)
            chunks = client.chat.completions.create(**fields, stream=True)
            return whole, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    whole, streamed = await asyncio.to_thread(talk)
    assert whole.choices[0].message.content == streamed != ""


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in await client.models.list()] == ["live", "r1"]


async def test_greedy_is_repeatable_and_temperature_is_each_requests_own(ask: Any) -> None:
    greedy, hot, again, warm = await asyncio.gather(
        ask(STORY), ask(STORY, temperature=1.9, seed=1), ask(STORY), ask(STORY, temperature=1.9, seed=2)
    )
    texts = [answer.choices[0].message.content for answer in (greedy, hot, again, warm)]
    assert texts[0] == texts[2]
    assert len(set(texts)) == 3


async def test_a_seed_repeats_a_draw(ask: Any) -> None:
    fields: dict[str, Any] = {"temperature": 1.0, "seed": 7, "max_tokens": 16}
    first, again = await ask(STORY, **fields), await ask(STORY, **fields)
    assert first.choices[0].message.content == again.choices[0].message.content


async def test_top_p_and_top_k_of_one_are_greedy(ask: Any) -> None:
    greedy = (await ask()).choices[0].message.content
    assert (await ask(temperature=2, top_p=1e-6)).choices[0].message.content == greedy
    assert (await ask(temperature=2, extra_body={"top_k": 1})).choices[0].message.content == greedy


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_cut_the_answer(ask: Any, stream: bool) -> None:
    whole = (await ask()).choices[0].message.content
    stop = whole[9:15]
    assert len(stop) == 6
    answer = await ask(stop=["never to be said", stop], stream=stream)
    if stream:
        texts, reasons, _ = await collect(answer)
        text, reason = texts[0], reasons[0]
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text == whole[: whole.index(stop)]
    assert reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
async def test_several_choices(ask: Any, stream: bool) -> None:
    answer = await ask(STORY, n=3, temperature=1.5, stream=stream, max_tokens=12)
    if stream:
        texts, reasons, _ = await collect(answer)
        assert sorted(reasons) == [0, 1, 2]
        said = list(texts.values())
    else:
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        said = [choice.message.content for choice in answer.choices]
    assert len(said) == len(set(said)) == 3


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
async def test_a_limit_of_tokens(client: openai.AsyncOpenAI, limit: str) -> None:
    fields: dict[str, Any] = {"model": "live", "messages": STORY, "temperature": 0, limit: 5}
    answer = await client.chat.completions.create(**fields)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "length"


async def test_an_answer_goes_on_past_the_end_of_turn_if_asked(ask: Any) -> None:
    hi: list[Any] = [{"role": "user", "content": "Hi"}]
    short = await ask(hi)
    assert short.choices[0].finish_reason == "stop"
    longer = await ask(hi, extra_body={"ignore_eos": True})
    assert (longer.choices[0].finish_reason, longer.usage.completion_tokens) == ("length", 24)
    assert longer.choices[0].message.content.startswith(short.choices[0].message.content)
    assert "<|im_" not in longer.choices[0].message.content


async def test_what_is_not_ascii(ask: Any) -> None:
    answer = await ask([{"role": "user", "content": "Repeat exactly: 日本 👩‍👩‍👧 naïve"}], stream=True, max_tokens=40)
    texts, _, _ = await collect(answer)
    assert "\N{REPLACEMENT CHARACTER}" not in texts[0]


async def test_wrong_keys(endpoint: str) -> None:
    async with openai.AsyncOpenAI(base_url=endpoint, api_key="sk-bad", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await client.chat.completions.create(model="live", messages=ASK)
    assert caught.value.code == "invalid_api_key"


async def test_a_model_that_is_not_there(ask: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await ask(model="gpt-4")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_beyond_the_context(ask: Any, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ask([{"role": "user", "content": "word " * 600}], stream=stream)
    assert caught.value.code == "context_length_exceeded"
    assert "512" in caught.value.message


async def test_an_answer_longer_than_the_context(ask: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(max_tokens=513)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "max_tokens")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
    ],
)
async def test_what_is_refused(ask: Any, served: Served, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(**fields)
    if param == "tools" and param in served.kind.honours:  # by the engine itself: this model's template knows no tools
        assert "tool" in caught.value.message
    else:
        assert caught.value.param == param


EXTRA: dict[str, Any] = {
    "logprobs": True,
    "presence_penalty": 1.5,
    "frequency_penalty": 1.5,
    "logit_bias": {"5": 1},
    "response_format": {"type": "json_object"},
    "min_tokens": 20,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
}


@pytest.mark.parametrize("name", EXTRA)
async def test_a_field_that_this_engine_does_not_honour_is_refused(ask: Any, served: Served, name: str) -> None:
    if name in served.kind.honours:
        pytest.skip(f"{served.kind.name} honours it")
    with pytest.raises(openai.BadRequestError) as caught:
        await ask(extra_body={name: EXTRA[name]})
    assert caught.value.param == name


async def test_fields_of_vllm_alone_are_obeyed(ask: Any, served: Served) -> None:
    if served.kind.name != "vllm":
        pytest.skip("the embedded engine refuses them")
    plain = (await ask()).choices[0].message.content
    told = await ask(logprobs=True, top_logprobs=2)
    assert len(told.choices[0].logprobs.content[0].top_logprobs) == 2
    assert (await ask(logit_bias={"9690": 100})).choices[0].message.content.startswith("systemsystem")
    structured = await ask(response_format={"type": "json_object"}, max_tokens=100)
    if structured.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(structured.choices[0].message.content), dict)
    assert structured.choices[0].message.content.lstrip().startswith("{")
    for penalty in ("presence_penalty", "frequency_penalty"):
        assert (await ask(STORY, max_tokens=60, **{penalty: 2})).choices[0].message.content != (
            await ask(STORY, max_tokens=60)
        ).choices[0].message.content
    assert (await ask(extra_body={"repetition_penalty": 1.8})).choices[0].message.content != plain
    hi: list[Any] = [{"role": "user", "content": "Hi"}]
    assert (await ask(hi, max_tokens=40, extra_body={"min_tokens": 35})).usage.completion_tokens >= 35
    assert (await ask(temperature=2, extra_body={"min_p": 1})).choices[0].message.content == plain


async def test_a_client_that_leaves_frees_its_place(client: openai.AsyncOpenAI, served: Served) -> None:
    """Measured by vLLM's own gauge; the embedded engine's place is counted in its own tests."""
    if served.kind.name != "vllm":
        pytest.skip("the embedded engine has no gauge")
    stream = await client.chat.completions.create(
        model="live", messages=STORY, stream=True, max_tokens=450, extra_body={"ignore_eos": True}
    )
    await anext(aiter(stream))
    assert await _running(served) == 1
    await stream.close()
    for _ in range(100):
        if await _running(served) == 0:
            break
        await asyncio.sleep(0.05)
    assert await _running(served) == 0


async def _running(served: Served) -> float:
    async with (
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(served.socket))) as engine,
        engine.get("http://engine/metrics") as response,
    ):
        lines = (await response.text()).splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))


async def test_an_engine_that_is_killed_in_a_stream(mortal: Served, tmp_path: Path) -> None:
    gateway = Gateway({KEY: "k1"}.get, Ledger(Traffic(tmp_path / "traffic.db")), mortal.kind)
    gateway.route(Route(mortal.address, mortal.name))
    async with listening(gateway) as url, openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0) as client:
        fields: dict[str, Any] = {"model": "live", "messages": STORY, "extra_body": {"ignore_eos": True}}
        stream = await client.chat.completions.create(**fields, stream=True)
        await anext(aiter(stream))
        mortal.process.kill()
        with pytest.raises(openai.APIError, match="broke off"):
            async for _ in stream:
                pass
        await asyncio.to_thread(mortal.process.wait)
        with pytest.raises(openai.InternalServerError) as caught:
            await client.chat.completions.create(**fields)
        assert caught.value.status_code == 503
