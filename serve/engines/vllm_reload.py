"""What a release brings to a running vLLM server, as ASGI middleware: its weights, its name, and its today."""

from __future__ import annotations

import logging
import os
from datetime import date
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from appliance.data.template_input import take_as_text
from appliance.data.tokenizer import TemplateSettings, set_template
from serve.engines.openai_engine import RELOAD
from serve.gateway.asgi import ClientGone, Reply, read_body, read_json
from serve.gateway.errors import ChatError

log = logging.getLogger("vllm.reload")

CLOCK = "APPLIANCE_CLOCK"
"""Environment variable of the server: the day that the chat template of the release it starts with takes for today."""

_BODY_LIMIT = 1 << 16


class Reload:
    """Adds `POST /reload` {"name", "weights", "clock"} to the server of vLLM 0.32.

    Requests that have not ended are aborted, and adapters on the old weights forgotten. Where it fails, the weights are
    neither the old nor the new.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._prepared = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._prepared:
            # Only now is the server's state there for certain.
            take_as_text(_tokenizer(scope["app"].state))
            if clock := os.environ.get(CLOCK):
                set_template(_tokenizer(scope["app"].state), TemplateSettings(today=date.fromisoformat(clock)))
            self._prepared = True
        if scope["type"] != "http" or scope["path"] != RELOAD:
            await self._app(scope, receive, send)
            return
        reply = Reply(send, {})
        try:
            asked = read_json(await read_body(receive, _BODY_LIMIT))
            await _reload(scope["app"].state, asked["weights"], asked["name"], asked.get("clock"))
            await reply.json(200, {"model": asked["name"]})
        except ChatError as error:
            await reply.error(error)
        except ClientGone:
            pass
        except Exception as error:
            log.exception("the weights could not be loaded")
            await reply.error(ChatError(500, f"{type(error).__name__}: {error}", code="reload_failed"))


async def _reload(state: Any, weights: str, name: str, clock: str | None) -> None:
    """`state` is that of vLLM's app. No request is scheduled before the cache of the old weights is gone."""
    engine = state.engine_client
    await engine.pause_generation(mode="abort", clear_cache=True)
    try:
        await engine.collective_rpc("reload_weights", kwargs={"weights_path": weights})
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
