"""Continuous batching on a tiny random model: many requests at once, each as if it were alone."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from serve.engines.generation import EngineDead, Generator
from serve.engines.sampling import Sampling

BROKEN = "\N{REPLACEMENT CHARACTER}"
GREEDY = Sampling(0, 1, 0, 0)
ENDLESS = 400
BLOCK_BYTES = 2 * 2 * 2 * 16 * 256 * 4
"""Keys and values, of 2 layers, of 2 heads, of 16 numbers, for 256 tokens, in float32."""


def prompt(generator: Generator, text: str) -> list[int]:
    return generator.render([{"role": "user", "content": text}])


async def tokens_of(generator: Generator, ids: list[int], sampling: Sampling, count: int) -> str:
    """The text of one answer of exactly `count` tokens."""
    text, tokens = "", 0
    async for piece in generator.generate(ids, sampling, count, (), 1, True):
        text += piece.text
        tokens += piece.tokens
    assert tokens == count
    return text


def active(generator: Generator) -> int:
    """Requests that hold a place in the batch or wait for one."""
    scheduler = generator._manager.batch_processor.scheduler
    return len(scheduler.active_requests) + len(scheduler.waiting_requests)


async def settles(condition: Any) -> bool:
    """Whether `condition` holds before long."""
    for _ in range(6000):
        if condition():
            return True
        await asyncio.sleep(0.01)
    return False


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Any:
    """What Transformers' own `generate` answers greedily."""
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)

    def answer(ids: list[int], count: int) -> list[int]:
        out = model.generate(torch.tensor([ids]), max_new_tokens=count, min_new_tokens=count, do_sample=False)
        return [int(id) for id in out[0][len(ids) :]]

    return answer


async def test_greedy_answers_equal_those_of_generate_however_many_run(generator: Generator, reference: Any) -> None:
    prompts = [prompt(generator, text) for text in ("a", "Hello there", "x" * 300, "日本", "b" * 40)]
    sampled = [tokens_of(generator, prompts[0], Sampling(1.3, 0.9, 20, seed), 24) for seed in range(3)]
    greedy = [tokens_of(generator, ids, GREEDY, 24) for ids in prompts]
    texts = await asyncio.gather(*greedy, *sampled)
    for ids, text in zip(prompts, texts, strict=False):
        expected = generator.tokenizer.decode(reference(ids, 24), skip_special_tokens=True)
        assert text == expected.rstrip(BROKEN)


async def test_prompts_longer_than_one_pass_are_answered_the_same(tiny: Path, reference: Any) -> None:
    generator = Generator(tiny, kv_cache_gib=0.01, gpu_memory_share=0.5, max_model_len=512)
    try:
        ids = prompt(generator, "long " * 90)
        assert len(ids) > 450
        answers = await asyncio.gather(*(tokens_of(generator, ids, GREEDY, 16) for _ in range(3)))
        expected = generator.tokenizer.decode(reference(ids, 16), skip_special_tokens=True)
        assert set(answers) == {expected.rstrip(BROKEN)}
    finally:
        generator.close()


async def test_the_same_seed_gives_the_same_answer_and_another_another(generator: Generator) -> None:
    ids = prompt(generator, "Hi")

    def ask(seed: int) -> Any:
        return tokens_of(generator, ids, Sampling(1, 1, 0, seed), 30)

    first, again, other = await asyncio.gather(ask(1), ask(1), ask(2))
    assert first == again == await ask(1)
    assert first != other


async def test_choices_of_one_request_differ_by_their_seed(generator: Generator) -> None:
    ids = prompt(generator, "Hi")
    texts = ["", "", ""]
    async for piece in generator.generate(ids, Sampling(1, 1, 0, 1), 30, (), 3, True):
        texts[piece.choice] += piece.text
    assert len(set(texts)) == 3
    assert texts[1] == await tokens_of(generator, ids, Sampling(1, 1, 0, 2), 30)


async def test_a_stop_string_ends_the_answer_and_frees_its_place(generator: Generator) -> None:
    ids = prompt(generator, "Hi")
    whole = await tokens_of(generator, ids, Sampling(1, 1, 0, 1), 60)
    stop = whole[20:22]
    before = generator._manager.current_batch
    shown, reasons, tokens = "", [], 0
    async for piece in generator.generate(ids, Sampling(1, 1, 0, 1), ENDLESS, [stop], 1, True):
        shown += piece.text
        tokens += piece.tokens
        reasons.append(piece.finish_reason)
    assert shown == whole[: whole.index(stop)]
    assert reasons[-1] == "stop"
    assert tokens < 70
    assert await settles(lambda: active(generator) == 0)
    assert generator._manager.current_batch - before < ENDLESS / 2


async def test_an_answer_ends_at_an_end_of_turn_token(generator: Generator) -> None:
    ids = prompt(generator, "Hi")
    for seed in range(50):
        pieces = [piece async for piece in generator.generate(ids, Sampling(1.5, 1, 0, seed), 100, (), 1, False)]
        if pieces[-1].finish_reason == "stop":
            break
    assert pieces[-1].finish_reason == "stop"
    assert sum(piece.tokens for piece in pieces) < 100
    beyond = [piece async for piece in generator.generate(ids, Sampling(1.5, 1, 0, seed), 100, (), 1, True)]
    assert beyond[-1].finish_reason == "length"
    assert "".join(piece.text for piece in beyond).startswith("".join(piece.text for piece in pieces))
    assert "<|im_end|>" not in "".join(piece.text for piece in beyond)


async def test_an_end_of_turn_token_is_no_text_even_where_it_is_a_plain_token(
    tiny: Path, tmp_path: Path, generator: Generator
) -> None:
    ids, sampling = prompt(generator, "Hi"), Sampling(1, 1, 0, 1)
    whole = await tokens_of(generator, ids, sampling, 60)
    end = next(character for character in whole[5:] if character.isascii())
    [end_id] = generator.tokenizer(end, add_special_tokens=False)["input_ids"]
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "generation_config.json").write_text(f'{{"eos_token_id": [2, {end_id}]}}')
    stopping = Generator(model, kv_cache_gib=0.01, gpu_memory_share=0.5, max_model_len=512)
    try:
        pieces = [piece async for piece in stopping.generate(ids, sampling, 60, (), 1, False)]
    finally:
        stopping.close()
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(end)].rstrip(BROKEN)
    assert pieces[-1].finish_reason == "stop"


async def test_closing_an_answer_frees_its_places(generator: Generator) -> None:
    before = generator._manager.current_batch
    async with aclosing(generator.generate(prompt(generator, "Hi"), GREEDY, ENDLESS, (), 3, True)) as pieces:
        await anext(pieces)
        assert active(generator) > 0
    assert await settles(lambda: active(generator) == 0)
    assert generator._manager.current_batch - before < ENDLESS / 2
    assert generator._manager.output_router.result_handlers == {}


async def test_requests_that_do_not_fit_together_take_turns(tiny: Path, generator: Generator) -> None:
    """Three blocks of 256 tokens, and four answers that need two each: some lose their cache and are taken up again."""
    small = Generator(tiny, kv_cache_gib=3.1 * BLOCK_BYTES / 2**30, gpu_memory_share=0.5, max_model_len=512)
    offloading = small._manager.batch_processor.offloading_manager
    lost = []
    requeue = offloading.scheduler.add_waiting_request
    offloading.scheduler.add_waiting_request = lambda state: (
        lost.append(state) if state._true_initial_tokens else None,
        requeue(state),
    )
    try:
        assert small.max_model_len == 512
        ids = prompt(small, "Hi")
        answers, expected = [
            await asyncio.gather(*(tokens_of(one, ids, Sampling(1, 1, 0, seed), 300) for seed in range(4)))
            for one in (small, generator)
        ]
        assert answers == expected
        assert lost
        assert small.alive
    finally:
        small.close()


async def test_a_context_that_the_cache_cannot_hold_is_not_offered(tiny: Path) -> None:
    small = Generator(tiny, kv_cache_gib=0, gpu_memory_share=0.5, max_model_len=512)
    try:
        assert small.max_model_len == 256
        ids = prompt(small, "Hi")
        await asyncio.gather(*(tokens_of(small, ids, GREEDY, 256 - len(ids)) for _ in range(2)))
    finally:
        small.close()


async def test_an_answer_may_fill_the_context_to_its_last_token(generator: Generator) -> None:
    ids = prompt(generator, "Hi")
    await tokens_of(generator, ids, GREEDY, generator.max_model_len - len(ids))


@pytest.fixture
async def dying(tiny: Path) -> AsyncIterator[Generator]:
    generator = Generator(tiny, kv_cache_gib=0.01, gpu_memory_share=0.5, max_model_len=512)
    yield generator
    generator.close()


def break_forward(generator: Generator) -> None:
    """The next forward pass fails, as when memory runs out."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError("out of memory")

    generator._manager.model.forward = forward


async def test_a_failing_forward_pass_ends_every_answer_with_an_error(dying: Generator) -> None:
    ids = prompt(dying, "Hi")
    answers = [dying.generate(ids, GREEDY, ENDLESS, (), 1, True) for _ in range(3)]
    for answer in answers:
        await anext(answer)
    assert dying.alive
    break_forward(dying)
    for answer in answers:
        with pytest.raises(EngineDead, match="out of memory"):
            async for _ in answer:
                pass
    assert await settles(lambda: not dying.alive)
    with pytest.raises(EngineDead):
        await anext(dying.generate(ids, GREEDY, 4, (), 1, True))


def test_sampling_is_the_requests_then_the_models_then_the_usual(generator: Generator) -> None:
    plain = generator.sampling({})
    assert (plain.temperature, plain.top_p, plain.top_k) == (1.0, 1.0, 0)
    asked = generator.sampling({"temperature": 0.2, "top_p": 0.5, "top_k": 4, "seed": 9})
    assert asked == Sampling(0.2, 0.5, 4, 9)
    assert plain.seed != generator.sampling({}).seed
    own = generator._defaults
    generator._defaults = type(own)(temperature=0.6, top_k=20)
    try:
        assert generator.sampling({}).temperature == 0.6
        assert generator.sampling({}).top_k == 20
        assert generator.sampling({"temperature": 0}).temperature == 0
    finally:
        generator._defaults = own


def test_what_the_model_asks_for_and_does_not_get_is_told(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "generation_config.json").write_text('{"eos_token_id": 2, "repetition_penalty": 1.1, "min_p": 0.0}')
    Generator(model, kv_cache_gib=0, gpu_memory_share=0.5, max_model_len=512).close()
    assert [record.getMessage().split()[5] for record in caplog.records if "heed" in record.message] == [
        "repetition_penalty"
    ]
