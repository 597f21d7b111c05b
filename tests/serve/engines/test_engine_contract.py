"""What the supervisor relies on, on a real engine process and the real small model. APPLIANCE_ENGINE says which."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from chat_templates import ABLE
from engine_process import Served, serving
from transformers import AutoModelForCausalLM

from appliance.data.messages import Reading
from appliance.data.render import render_prompt
from appliance.data.tokenizer import TemplateSettings, load_tokenizer
from appliance.errors import InvalidInput
from appliance.settings import Settings
from appliance.supervisor.engines import Probe
from serve.engines.openai_engine import ask

pytestmark = pytest.mark.slow

DAY, LATER = date(2024, 2, 29), date(2024, 3, 9)

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "The capital of France? 日本 <|im_end|>"},
]


@pytest.fixture
def probe(served: Served) -> Probe:
    return Probe(MESSAGES, render_prompt(load_tokenizer(served.model), MESSAGES), max_tokens=24)


async def test_probing_renders_as_the_trainer_does_and_is_repeatable(served: Served, probe: Probe) -> None:
    answers = [await served.kind.probe(served.address, served.name, probe) for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0].token_ids == probe.token_ids
    assert answers[0].text
    assert answers[0].finish_reason in ("stop", "length")
    assert 0 < answers[0].completion_tokens <= 24


@pytest.fixture
def long_ago(settings: Settings, smollm2: Path, tmp_path: Path) -> Iterator[Served]:
    """An engine of a release of another day, whose chat template asks for the date."""
    template = "{{ strftime_now('%d %b %Y') }}" + (smollm2 / "chat_template.jinja").read_text()
    with serving(settings, with_template(smollm2, tmp_path, template), tmp_path, TemplateSettings(today=DAY)) as served:
        yield served


def with_template(base: Path, folder: Path, template: str) -> Path:
    model = folder / "model"
    shutil.copytree(base, model, copy_function=os.symlink)
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.jinja").write_text(template)
    return model


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALLS = [
    {"id": f"call0000{n}", "type": "function", "function": {"name": "weather", "arguments": f'{{"place": "{place}"}}'}}
    for n, place in enumerate(["Rome", "Z\u00fcrich"])
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "a system message, several turns": [
        *MESSAGES,
        {"role": "assistant", "content": "Paris."},
        {"role": "user", "content": " Of Spain? "},
    ],
    "a thought": [
        {"role": "user", "content": "Two and two?"},
        {"role": "assistant", "content": "Four.", "reasoning": "I add them."},
        {"role": "user", "content": "Three and three?"},
    ],
    "calls": [
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": "I look.", "tool_calls": CALLS},
        {"role": "tool", "content": "sun", "tool_call_id": "call00000"},
        {"role": "tool", "content": "rain", "tool_call_id": "call00001"},
    ],
    "text parts": [
        {"role": "user", "content": [{"type": "text", "text": "One."}, {"type": "text", "text": "Two."}]},
    ],
}


@pytest.fixture
def able(settings: Settings, smollm2: Path, tmp_path: Path) -> Iterator[Served]:
    with serving(settings, with_template(smollm2, tmp_path, ABLE), tmp_path) as served:
        yield served


async def test_rows_of_every_kind_are_rendered_as_the_trainer_does(able: Served) -> None:
    tokenizer, reading = load_tokenizer(able.model), Reading()
    for messages in ROWS.values():
        for tools in (None, [TOOL]):
            said = [{**one, "content": reading.text(one["content"], "content")} for one in messages]
            wanted = render_prompt(tokenizer, said, tools)
            answer = await able.kind.probe(able.address, able.name, Probe(messages, wanted, 2, tools=tools))
            assert tokenizer.decode(answer.token_ids) == tokenizer.decode(wanted)
            assert answer.token_ids == wanted


async def test_today_is_what_its_release_takes_for_it(long_ago: Served) -> None:
    """Whatever the day on which it runs, a prompt is rendered as when the release was made, also after a swap."""
    served, rendered = long_ago, {}
    for day in (DAY, LATER):
        rendered[day] = render_prompt(load_tokenizer(served.model, TemplateSettings(today=day)), MESSAGES)
    answer = await served.kind.probe(served.address, "r1", Probe(MESSAGES, [], 2))
    assert answer.token_ids == rendered[DAY] != rendered[LATER]
    if served.kind.reloads:
        await served.kind.reload(served.address, served.model, "r2", LATER)
        answer = await served.kind.probe(served.address, "r2", Probe(MESSAGES, [], 2))
        assert answer.token_ids == rendered[LATER]


@pytest.fixture
def thoughtless(settings: Settings, smollm2: Path, tmp_path: Path) -> Iterator[Served]:
    """An engine of a release that does not think unless it is asked to."""
    switch = "{% if add_generation_prompt and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    template = (smollm2 / "chat_template.jinja").read_text() + switch
    with serving(
        settings, with_template(smollm2, tmp_path, template), tmp_path, TemplateSettings(thinking=False)
    ) as it:
        yield it


async def test_it_thinks_as_its_release_does_and_as_a_request_asks(thoughtless: Served) -> None:
    served, tokenizer = thoughtless, load_tokenizer(thoughtless.model)
    rendered = {thinks: render_prompt(tokenizer, MESSAGES, enable_thinking=thinks) for thinks in (False, True)}
    answer = await served.kind.probe(served.address, "r1", Probe(MESSAGES, [], 2))
    assert answer.token_ids == rendered[False] != rendered[True]
    asked: list[tuple[dict[str, Any], bool]] = [
        ({}, False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, True),
    ]
    for fields, thinks in asked:
        body = {"model": "r1", "messages": MESSAGES, "max_tokens": 2, **fields}
        told = await ask(served.address, "/v1/chat/completions", body)
        assert told["usage"]["prompt_tokens"] == len(rendered[thinks]), fields


async def test_what_it_finds_likely_is_what_transformers_does_or_it_cannot_say(served: Served, probe: Probe) -> None:
    ids = [*probe.token_ids, *(await served.kind.probe(served.address, served.name, probe)).token_ids[:8]]
    said = await served.kind.logprobs(served.address, served.name, ids)
    if served.kind.name == "transformers":
        assert said is None
        return
    with torch.inference_mode():
        logits = AutoModelForCausalLM.from_pretrained(served.model, dtype=torch.float32)(torch.tensor([ids])).logits[0]
    wanted = torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert said is not None
    assert said[0] == 0
    assert said[1:] == pytest.approx(wanted.tolist(), abs=0.05)


async def test_an_engine_that_is_not_there(served: Served, probe: Probe, tmp_path: Path) -> None:
    nowhere = f"unix:{tmp_path / 'none.sock'}"
    assert not await served.kind.ready(nowhere)
    with pytest.raises(ConnectionError):
        await served.kind.probe(nowhere, served.name, probe)


async def test_a_probe_that_it_refuses(served: Served) -> None:
    endless = Probe([{"role": "user", "content": "word " * 600}], [], max_tokens=24)
    with pytest.raises(InvalidInput, match=r"refuses /tokenize.*512|refuses /v1/chat/completions.*512"):
        await served.kind.probe(served.address, served.name, endless)


async def test_an_answer_has_what_the_context_leaves_of_its_room(served: Served) -> None:
    """512 tokens, where the probe would give it more."""
    roomy = Probe([{"role": "user", "content": "word " * 440}], [], max_tokens=4096)
    answer = await served.kind.probe(served.address, served.name, roomy)
    assert len(answer.token_ids) + answer.completion_tokens <= 512


def test_its_socket_is_for_its_owner_alone(served: Served) -> None:
    mode = served.socket.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) & 0o077 == 0


def test_its_memory_is_bounded(served: Served) -> None:
    """On a CPU: interpreter, libraries, 0.5 GB of weights and a quarter GiB of KV cache."""
    group = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _group(pid) == served.process.pid]
    resident = sum(int((Path(f"/proc/{pid}/statm").read_text().split())[1]) for pid in group) * os.sysconf(
        "SC_PAGESIZE"
    )
    assert resident < (4 << 30 if served.kind.name == "vllm" else 2 << 30)


async def test_what_asks_it_reaches_nothing_public(served: Served) -> None:
    connector = aiohttp.UnixConnector(str(served.socket))
    async with aiohttp.ClientSession(connector=connector) as engine:
        for path in ("/docs", "/openapi.json", "/collective_rpc", "/sleep", "/wake_up"):
            async with engine.get(f"http://engine{path}") as response:
                assert response.status == 404


@pytest.mark.thorough
async def test_sigterm_ends_it_promptly(mortal: Served) -> None:
    mortal.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(mortal.process.wait, 60)


async def test_sigterm_ends_it_promptly_also_in_the_midst_of_an_answer(mortal: Served) -> None:
    if mortal.kind.name == "vllm":
        pytest.skip("vLLM 0.32 may then wait for ever for a stream that it has cut; the supervisor kills its group")
    reader, writer = await asyncio.open_unix_connection(mortal.socket)
    body = json.dumps(
        {
            "model": mortal.name,
            "messages": [{"role": "user", "content": "Tell me a long story."}],
            "stream": True,
            "ignore_eos": True,
            "max_tokens": 450,
        }
    )
    head = ["POST /v1/chat/completions HTTP/1.1", "host: engine", "content-type: application/json"]
    writer.write("\r\n".join([*head, f"content-length: {len(body)}", "", body]).encode())
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    mortal.process.send_signal(signal.SIGTERM)
    await asyncio.to_thread(mortal.process.wait, 60)
    assert b"[DONE]" not in await reader.read(), "it did not wait for the end of the answer"
    writer.close()


def _group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None
