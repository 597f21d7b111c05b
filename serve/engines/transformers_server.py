"""The embedded engine's process: an OpenAI-style server on a private unix socket.

python -m serve.engines.transformers_server --model DIR --name NAME --socket PATH ...
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import Receive, Scope, Send
from transformers.utils.logging import disable_progress_bar

from appliance.data.tokenizer import TemplateSettings, set_template, thinking_switches, variables
from appliance.errors import InvalidInput
from serve.engines.answer import Answer
from serve.engines.generation import EngineDead, Generator
from serve.engines.transformers import HONOURS
from serve.wire.asgi import ClientGone, Reply, read_json, until_gone
from serve.wire.errors import ChatError, no_engine
from serve.wire.fields import admit

log = logging.getLogger("engine")

_BODY_LIMIT = 8 << 20
_TO_PROBES = frozenset({"tools"})
"""What the supervisor's own probes may ask beyond HONOURS: calls are not made out in an answer."""
_RENDERED_AT_ONCE = 2
"""Prompts that are tokenised at a time: each takes a processor, and memory many times its size."""
_LAST_WORDS_SECONDS = 5
"""How long a dead engine still says that it is dead before its process ends."""


class Server:
    """The ASGI app: one model under one name."""

    def __init__(self, generator: Generator, name: str) -> None:
        self._generator = generator
        self._name = name
        self._rendering = asyncio.Semaphore(_RENDERED_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reply = Reply(send, {})
        try:
            match scope["method"], scope["path"]:
                case "GET", "/health":
                    self._require_life()
                    await reply.json(200, {"status": "ok"})
                case "POST", "/tokenize":
                    await self._tokenize(await read_json(receive, _BODY_LIMIT), reply)
                case "POST", "/v1/chat/completions":
                    request = await read_json(receive, _BODY_LIMIT)
                    await until_gone(receive, self._complete(request, reply))
                case _:
                    raise ChatError(404, f"there is nothing at {scope['path']}", code="unknown_url")
        except ChatError as error:
            await reply.error(error)
        except EngineDead as error:
            log.error("generation has ended: %s", error)
            await reply.error(no_engine("the model has failed and is being restarted"))
        except ClientGone:
            pass

    async def _tokenize(self, request: dict[str, Any], reply: Reply) -> None:
        said = {name: request.get(name) for name in ("messages", "tools")}
        tokens = await self._render(admit(said, {"messages", "tools"}))
        await reply.json(200, {"count": len(tokens), "max_model_len": self._generator.max_model_len, "tokens": tokens})

    async def _complete(self, request: dict[str, Any], reply: Reply) -> None:
        self._require_life()
        admitted = admit(request, HONOURS | _TO_PROBES)
        if admitted.get("model", self._name) != self._name:
            raise ChatError(404, f"the model here is '{self._name}'", code="model_not_found", param="model")
        prompt = await self._render(admitted)
        stop = admitted.get("stop", [])
        pieces = self._generator.generate(
            prompt,
            self._generator.sampling(admitted),
            self._longest_answer(admitted, len(prompt)),
            [stop] if isinstance(stop, str) else stop,
            admitted.get("n", 1),
            admitted.get("ignore_eos", False),
        )
        usage = admitted.get("stream_options", {}).get("include_usage", False)
        answer = Answer(self._name, len(prompt), admitted.get("n", 1), usage)
        async with contextlib.aclosing(pieces):
            if admitted.get("stream"):
                async for piece in pieces:
                    if events := answer.chunks(piece):
                        await reply.events(events)
                await reply.events(answer.last_chunks())
                await reply.end_events()
            else:
                async for piece in pieces:
                    answer.add(piece)
                await reply.json(200, answer.whole())

    async def _render(self, admitted: dict[str, Any]) -> list[int]:
        size = sum(len(message.get("content", "")) for message in admitted["messages"])
        if size > self._generator.longest_prompt:
            raise self._too_long(f"no prompt of so many tokens has the {size} characters of the messages")
        try:
            told = self._told(admitted)
            async with self._rendering:
                return await asyncio.to_thread(
                    partial(self._generator.render, admitted["messages"], admitted.get("tools"), **told)
                )
        except InvalidInput as error:
            raise ChatError(400, error.message, code="invalid_value", param="messages") from None

    def _told(self, admitted: dict[str, Any]) -> dict[str, Any]:
        """What the client would have the chat template told, as far as that asks for it."""
        template = str(self._generator.tokenizer.chat_template)
        told = dict(admitted.get("chat_template_kwargs", {}))
        if effort := admitted.get("reasoning_effort"):
            told = {"reasoning_effort": effort, **dict.fromkeys(thinking_switches(template), effort != "none"), **told}
        return {name: value for name, value in told.items() if name in variables(template)}

    def _longest_answer(self, admitted: dict[str, Any], prompt: int) -> int:
        """Tokens that may come. Raises ChatError where none can."""
        context = self._generator.max_model_len
        if prompt >= context:
            raise self._too_long(f"the messages are {prompt} tokens long")
        name = "max_completion_tokens" if "max_completion_tokens" in admitted else "max_tokens"
        asked = admitted.get(name, context - prompt)
        if asked > context:
            raise self._too_long(f"'{name}' asks for {asked}", name)
        return int(min(asked, context - prompt))

    def _too_long(self, why: str, param: str = "messages") -> ChatError:
        context = self._generator.max_model_len
        message = f"this model's maximum context length is {context} tokens, and {why}"
        return ChatError(400, message, code="context_length_exceeded", param=param)

    def _require_life(self) -> None:
        if not self._generator.alive:
            raise EngineDead("the generation thread has ended")


def main() -> None:
    """Load the model, then listen; a socket that answers is a model that is ready."""
    parser = argparse.ArgumentParser(prog="transformers_server")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--socket", type=Path, required=True)
    parser.add_argument("--kv-cache-gib", type=float, required=True)
    parser.add_argument("--gpu-memory-share", type=float, required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--template", type=TemplateSettings.model_validate_json)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    disable_progress_bar()
    generator = Generator(options.model, options.kv_cache_gib, options.gpu_memory_share, options.max_model_len)
    if options.template:
        set_template(generator.tokenizer, options.template)
    if generator.max_model_len < options.max_model_len:
        log.warning("the KV cache holds %d tokens; longer contexts are refused", generator.max_model_len)
    try:
        asyncio.run(_serve(generator, options.name, options.socket))
    finally:
        generator.close()
    sys.exit("generation has ended")


async def _serve(generator: Generator, name: str, path: Path) -> None:
    await _warm_up(generator)
    config = uvicorn.Config(
        Server(generator, name), lifespan="off", access_log=False, log_level="warning", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    watch = asyncio.create_task(_end_when_dead(generator, server))
    await server.serve(sockets=[_listen(path)])
    watch.cancel()


async def _warm_up(generator: Generator) -> None:
    """Answer once: the first forward passes are slow, and a model that cannot generate must not become ready."""
    prompt = generator.render([{"role": "user", "content": "Hello"}])
    async for _ in generator.generate(prompt, generator.sampling({"temperature": 0}), 2, (), 1, True):
        pass


async def _end_when_dead(generator: Generator, server: uvicorn.Server) -> None:
    while generator.alive:
        await asyncio.sleep(0.5)
    await asyncio.sleep(_LAST_WORDS_SECONDS)
    server.should_exit = True


def _listen(path: Path) -> socket.socket:
    """A socket that only this user can connect to, in place of one that a dead process left."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    return listener


if __name__ == "__main__":
    main()
