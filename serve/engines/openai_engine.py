"""What both engines have in common: an OpenAI-style server on a unix socket that also tells how it tokenises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import aiohttp

from appliance.errors import InvalidInput
from appliance.supervisor.engines import Probe, ProbeAnswer

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""Environment of a process that must not reach for the network."""

_LONGEST_DEFAULT_CONTEXT = 8192
_READY_TIMEOUT = aiohttp.ClientTimeout(total=2)
_PROBE_TIMEOUT = aiohttp.ClientTimeout(total=300)


class OpenAIEngine:
    """Asks an engine process whether it is ready, and probes it."""

    async def ready(self, address: str) -> bool:
        """Whether the engine has loaded and answers."""
        try:
            async with _connect(address, _READY_TIMEOUT) as engine, engine.get("http://engine/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def probe(self, address: str, name: str, probe: Probe) -> ProbeAnswer:
        """Render and answer one probe greedily.

        Raises ConnectionError where the engine does not answer, and InvalidInput where it refuses the probe.
        """
        prompt = {"model": name, "messages": probe.messages}
        try:
            async with _connect(address, _PROBE_TIMEOUT) as engine:
                rendered = await _post(engine, "/tokenize", {**prompt, "add_generation_prompt": True})
                answer = await _post(
                    engine, "/v1/chat/completions", {**prompt, "max_tokens": probe.max_tokens, "temperature": 0}
                )
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ConnectionError(f"the engine at {address} does not answer: {error}") from error
        choice = answer["choices"][0]
        return ProbeAnswer(
            token_ids=rendered["tokens"],
            text=choice["message"]["content"] or "",
            finish_reason=choice["finish_reason"],
            completion_tokens=answer["usage"]["completion_tokens"],
        )


def context_length(release: Path, setting: int) -> int:
    """Longest context to serve, in tokens: what the model was made for, at most `setting` (0: at most 8192).

    Raises InvalidInput where config.json cannot be read.
    """
    try:
        config = json.loads((release / "config.json").read_bytes())
        own = config.get("text_config", config).get("max_position_embeddings")
    except (OSError, ValueError, AttributeError) as error:
        raise InvalidInput(
            "bad_model", f"cannot read {release / 'config.json'}: {error}", "pull or train the model again"
        ) from None
    limit = setting or _LONGEST_DEFAULT_CONTEXT
    return min(own, limit) if isinstance(own, int) else limit


def _connect(address: str, timeout: aiohttp.ClientTimeout) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.UnixConnector(address.removeprefix("unix:")), timeout=timeout)


async def _post(engine: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with engine.post(f"http://engine{path}", json=body) as response:
        if 400 <= response.status < 500:
            raise InvalidInput(
                "probe_refused",
                f"the engine refuses a probe: {_reason(await response.text())}",
                "a prompt of the probes may be longer than APPLIANCE_MAX_MODEL_LEN allows",
            )
        response.raise_for_status()
        answer: dict[str, Any] = await response.json()
        return answer


def _reason(refusal: str) -> str:
    try:
        return str(json.loads(refusal)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return refusal[:200]
