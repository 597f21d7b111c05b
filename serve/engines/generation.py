"""Generation by Transformers' continuous batching: many requests in one batch, each with its own sampling."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import queue
import secrets
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
)

from appliance.data.render import render_prompt
from appliance.data.thoughts import CLOSE, OPEN
from serve.engines.answer import Piece
from serve.engines.sampling import Sampling, processors
from serve.engines.text import TextStream, Thoughts
from serve.engines.transformers import BATCH_REQUESTS

log = logging.getLogger(__name__)

_PAGE = 256
"""Tokens in a block of the KV cache."""
_BATCH_TOKENS = 512
"""Tokens in one forward pass; a longer prompt takes several, between which others go on."""
_MARK_TOKENS = 8
"""Tokens at the end of a prompt that may open a thought."""
_UNHEEDED = ("repetition_penalty", "min_p", "typical_p", "no_repeat_ngram_size")


class EngineDead(Exception):
    """The generation thread has ended, and answers no more."""


class Generator:
    """A model that is loaded and generates.

    The KV cache takes `kv_cache_gib` on a CPU, and on a GPU the share `gpu_memory_share` of the memory that is free.
    """

    def __init__(self, model: Path, kv_cache_gib: float, gpu_memory_share: float, max_model_len: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        on_gpu = torch.cuda.is_available()
        network = AutoModelForCausalLM.from_pretrained(
            model, dtype="auto" if on_gpu else torch.float32, use_safetensors=True
        ).to("cuda" if on_gpu else "cpu")
        self.stop_ids = _stop_ids(network.generation_config, self.tokenizer)
        self._defaults = network.generation_config
        for name in _UNHEEDED:
            if getattr(self._defaults, name, None) not in (None, 0, 1):
                log.warning("this engine does not heed %s in generation_config.json", name)
        self._manager = network.init_continuous_batching(
            # The processors are ours: this configuration adds none, and takes the token of the highest score.
            GenerationConfig(do_sample=False, eos_token_id=sorted(self.stop_ids) or None),
            ContinuousBatchingConfig(
                page_size=_PAGE,
                num_blocks=None if on_gpu else max(1, int(kv_cache_gib * 2**30 / _block_bytes(network))),
                max_memory_percent=gpu_memory_share if on_gpu else None,
                max_batch_tokens=_BATCH_TOKENS,
                max_requests_per_batch=BATCH_REQUESTS,
                use_cuda_graph=False,
                use_async_batching=False,
                auto_switch_to_flash=False,
            ),
        )
        self._manager.logit_processor = processors()
        self._manager.warmup()
        # One request must always fit into the cache alone.
        self.max_model_len = min(max_model_len, self._manager.continuous_batching_config.num_blocks * _PAGE)
        self.longest_prompt = self.max_model_len * max(map(len, self.tokenizer.get_vocab()))
        """Characters that the longest prompt can have: a text of more is too long whatever it says."""
        self._manager.start()

    @property
    def alive(self) -> bool:
        """Whether the generation thread runs."""
        return bool(self._manager.is_running())

    def close(self) -> None:
        """End the generation thread; what runs is cut off."""
        self._manager.stop(hard_stop=True, timeout=5)

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None, **told: Any
    ) -> list[int]:
        """Token ids of `messages` with a generation prompt, of which the template is `told` more by names.

        Raises InvalidInput where the template refuses them.
        """
        return render_prompt(self.tokenizer, messages, tools, **told)

    def _thoughts(self, prompt: list[int]) -> Thoughts:
        """What tells the thought in an answer to `prompt` from its text, where the template knows thoughts."""
        if CLOSE not in str(self.tokenizer.chat_template):
            return Thoughts(begun=None)
        return Thoughts(begun=self.tokenizer.decode(prompt[-_MARK_TOKENS:]).rstrip().endswith(OPEN))

    def sampling(self, request: dict[str, Any]) -> Sampling:
        """The sampling that a request asks for; what it leaves open is as the model's generation_config says."""
        defaults = self._defaults

        def chosen(name: str, otherwise: float) -> Any:
            own = getattr(defaults, name, None)
            return request.get(name, otherwise if own is None else own)

        return Sampling(
            temperature=chosen("temperature", 1.0),
            top_p=chosen("top_p", 1.0),
            top_k=chosen("top_k", 0),
            seed=request.get("seed", secrets.randbits(63)),
        )

    async def generate(
        self,
        prompt: list[int],
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str],
        choices: int,
        ignore_eos: bool,
    ) -> AsyncGenerator[Piece, None]:
        """The choices of one request, piece by piece as they come; close it to cancel them. Raises EngineDead."""
        outputs: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        texts = [TextStream(self.tokenizer, stop) for _ in range(choices)]
        thoughts = [self._thoughts(prompt) for _ in range(choices)]
        tokens = [0] * choices
        running: dict[int, str] = {}
        try:
            for choice in range(choices):
                running[choice] = self._submit(
                    prompt,
                    replace(sampling, seed=sampling.seed + choice),
                    max_tokens,
                    ignore_eos,
                    functools.partial(_deliver, outputs, choice),
                )
            while running:
                choice, output = await outputs.get()
                if choice not in running:
                    continue
                if output.error is not None:
                    raise EngineDead(output.error)
                new = output.generated_tokens[tokens[choice] :]
                tokens[choice] += len(new)
                ended = bool(new) and new[-1] in self.stop_ids and not ignore_eos
                text = texts[choice].push(new[:-1] if ended else new)
                finish_reason = None
                if output.is_finished():
                    del running[choice]
                    text += texts[choice].finish()
                    finish_reason = "stop" if ended or texts[choice].stopped else "length"
                elif texts[choice].stopped:
                    self._cancel(running.pop(choice))
                    finish_reason = "stop"
                thought, said = thoughts[choice].push(text, last=finish_reason is not None)
                yield Piece(choice, said, len(new), finish_reason, thought)
        finally:
            for request in running.values():
                self._cancel(request)

    def _submit(self, prompt: list[int], sampling: Sampling, max_tokens: int, ignore_eos: bool, deliver: Any) -> str:
        request = uuid.uuid4().hex
        self._manager.register_result_handler(request, deliver)
        accepted = self._manager.add_request(
            prompt,
            request_id=request,
            max_new_tokens=max_tokens,
            streaming=True,
            eos_token_id=-1 if ignore_eos else None,
            **sampling.parameters(),
        )
        if accepted is None:
            self._forget(request)
            raise EngineDead("the generation thread has ended")
        return request

    def _cancel(self, request: str) -> None:
        self._manager.cancel_request(request)
        self._forget(request)

    def _forget(self, request: str) -> None:
        """Drop the handler of a request that will not finish, and what such requests left in the shared queue."""
        router = self._manager.output_router
        router.result_handlers.pop(request, None)
        with contextlib.suppress(queue.Empty):
            while True:
                router.output_queue.get_nowait()


def _deliver(outputs: asyncio.Queue[tuple[int, Any]], choice: int, output: Any) -> None:
    outputs.put_nowait((choice, output))


def _stop_ids(config: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end a turn: those of the generation configuration, and the tokenizer's own."""
    ids = config.eos_token_id
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(id for id in (*listed, tokenizer.eos_token_id) if id is not None)


def _block_bytes(network: Any) -> int:
    """Bytes that the keys and values of one page of tokens take in all layers."""
    config = network.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * width * _PAGE * network.dtype.itemsize)
