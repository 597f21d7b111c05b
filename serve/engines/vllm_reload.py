"""What a release brings to a running vLLM server, as ASGI middleware: its weights, its name, its today; and sleep."""

from __future__ import annotations

import logging
import os
from datetime import date
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from appliance.data.template_input import take_as_text
from appliance.data.tokenizer import TemplateSettings, set_template
from serve.engines.openai_engine import ASLEEP, RELOAD, SLEEP
from serve.wire.asgi import ClientGone, Reply, read_json
from serve.wire.errors import ChatError

log = logging.getLogger("vllm.reload")

CLOCK = "APPLIANCE_CLOCK"
"""Environment variable of the server: the day that the chat template of the release it starts with takes for today."""

_BODY_LIMIT = 1 << 16


class Reload:
    """Adds `POST /reload` {"name", "weights", "clock"} and `POST /sleep` to the server of vLLM 0.32.

    Requests that have not ended are aborted by both. Adapters on the old weights are forgotten. Where a reload fails,
    the weights are neither the old nor the new. From when it is to sleep until a reload has woken it, the server
    answers nothing else, and says that it is not healthy. vLLM's own routes for this come only with its development
    mode, which opens many more: one calls any method of the workers by name.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._prepared = False
        self._asleep = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._prepared:
            # Only now is the server's state there for certain.
            take_as_text(_tokenizer(scope["app"].state))
            if clock := os.environ.get(CLOCK):
                set_template(_tokenizer(scope["app"].state), TemplateSettings(today=date.fromisoformat(clock)))
            self._prepared = True
        posted = scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in (RELOAD, SLEEP)
        if posted or (scope["type"] == "http" and self._asleep):
            await self._answer(scope, receive, Reply(send, {}))
        else:
            await self._app(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, reply: Reply) -> None:
        state = scope["app"].state
        try:
            if scope["path"] == RELOAD:
                asked = await read_json(receive, _BODY_LIMIT)
                await _reload(state, asked["weights"], asked["name"], asked.get("clock"), self._asleep)
                self._asleep = False
                await reply.json(200, {"model": asked["name"]})
            elif scope["path"] == SLEEP:
                self._asleep = True
                await _sleep(state.engine_client)
                await reply.json(200, ASLEEP)
            else:
                raise ChatError(503, "the engine sleeps", code="asleep")
        except ChatError as error:
            await reply.error(error)
        except ClientGone:
            pass
        except Exception as error:
            log.exception("%s has failed", scope["path"])
            code = "sleep_failed" if scope["path"] == SLEEP else "reload_failed"
            await reply.error(ChatError(500, f"{type(error).__name__}: {error}", code=code))


async def _sleep(engine: Any) -> None:
    """Give back the memory of weights and cache, whose content is lost."""
    await engine.sleep(level=2, mode="abort")
    if not await engine.is_sleeping():
        raise RuntimeError("vLLM was to sleep, and says that it does not")


async def _reload(state: Any, weights: str, name: str, clock: str | None, asleep: bool) -> None:
    """`state` is that of vLLM's app. No request is scheduled before the cache of the old weights is gone.

    Where it is `asleep`, and so paused, the weights get memory first and the cache last, as vLLM documents it.
    """
    engine = state.engine_client
    if asleep:
        await engine.wake_up(tags=["weights"])
    else:
        await engine.pause_generation(mode="abort", clear_cache=True)
    try:
        await engine.collective_rpc("reload_weights", kwargs={"weights_path": weights})
        if asleep and not await engine.wake_up(tags=["kv_cache"]):
            raise RuntimeError("vLLM was to wake, and says that it has only in part")
        if not await engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache of the old weights is still in use")
        models = state.openai_serving_models
        models.lora_requests.clear()
        models.base_model_paths[0].name = name
        if clock:
            set_template(_tokenizer(state), TemplateSettings(today=date.fromisoformat(clock)))
    finally:
        await engine.resume_generation()


def _tokenizer(state: Any) -> Any:
    """That by which every request is rendered."""
    return state.engine_client.renderer.get_tokenizer()
