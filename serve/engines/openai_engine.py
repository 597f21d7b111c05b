"""What both engines have in common: an OpenAI-style server on a unix socket that also tells how it tokenises."""

from __future__ import annotations

import contextlib
import errno
import json
from datetime import date
from pathlib import Path
from typing import Any

import aiohttp

from appliance.errors import InvalidInput
from appliance.models import count_linear, count_parameters
from appliance.supervisor.engines import Probe, ProbeAnswer

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
"""Environment of a process that must not reach for the network."""

RELOAD = "/reload"
"""Route of an engine that can go on with other weights."""

SLEEP = "/sleep"
"""Route of an engine that can give the GPU's memory back until then, and what it answers once it has."""
ASLEEP = {"asleep": True}

OVERHEAD = 3 << 29
"""Bytes that a process takes for its libraries, as measured with both engines and SmolLM2 on a CPU."""

_RELOAD_TIMEOUT = aiohttp.ClientTimeout(total=110)
"""Requests are held for two minutes."""
_SLEEP_TIMEOUT = aiohttp.ClientTimeout(total=60)
LONGEST_DEFAULT_CONTEXT = 8192
_READY_TIMEOUT = aiohttp.ClientTimeout(total=2)
_OUR_OWN_WANT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Why a connection may fail that say nothing about the other side."""
_PROBE_SECONDS = 300
SLOWEST_TOKEN_SECONDS = 2.0
"""Per token of an answer: a large model on a CPU. An engine that hangs is found by its health much sooner."""
TOKEN_SECONDS_ON_GPU = 0.25


class OpenAIEngine:
    """Asks an engine process whether it is ready, gives it other weights, and probes it."""

    reloads = False
    measures = False
    sleeps = False
    adapter_rank = 0
    at_once = 64
    longest_answer = LONGEST_DEFAULT_CONTEXT
    token_seconds = SLOWEST_TOKEN_SECONDS

    async def ready(self, address: str) -> bool:
        """Whether the engine has loaded and answers. Raises OSError where this process lacks what it takes to ask."""
        try:
            async with _connect(address, _READY_TIMEOUT) as engine, engine.get("http://engine/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError) as error:
            if isinstance(error, OSError) and error.errno in _OUR_OWN_WANT:
                raise OSError(error.errno, error.strerror) from error
            return False

    async def reload(self, address: str, release: Path, name: str, clock: date | None = None) -> None:
        """Load the weights in `release` in place of those that are served, and answer as model `name`.

        One that sleeps wakes. The chat template takes `clock` for today (None: what it took before). Raises
        ConnectionError where the engine does not answer or fails, and InvalidInput where it refuses.
        """
        try:
            async with _connect(address, _RELOAD_TIMEOUT) as engine:
                await _post(engine, RELOAD, {"weights": str(release), "name": name, "clock": clock and str(clock)})
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ConnectionError(f"the engine could not load other weights: {error}") from error

    async def sleep(self, address: str) -> None:
        """Give back the GPU's memory but what the process itself takes; nothing is answered until `reload`.

        Raises ConnectionError where the engine does not answer, fails or says anything else than that it sleeps, and
        InvalidInput where it refuses.
        """
        try:
            async with _connect(address, _SLEEP_TIMEOUT) as engine:
                said = await _post(engine, SLEEP, {})
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ConnectionError(f"the engine could not be put to sleep: {error}") from error
        with contextlib.suppress(ValueError):
            if json.loads(said) == ASLEEP:
                return
        raise ConnectionError(f"the engine was to sleep, and says {said[:200]!r}")

    async def load_adapter(self, address: str, adapter: Path, name: str) -> None:
        """Answer as model `name` with the adapter in directory `adapter` on the weights that are served.

        Raises ConnectionError where the engine does not answer or fails, and InvalidInput where it refuses.
        """
        # Its `load_inplace` would read the files again with every request.
        try:
            async with _connect(address, _RELOAD_TIMEOUT) as engine:
                async with engine.get("http://engine/v1/models") as response:
                    response.raise_for_status()
                    served = [model["id"] for model in (await response.json())["data"]]
                if name not in served:
                    await _post(engine, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(adapter)})
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ConnectionError(f"the engine could not load the adapter: {error}") from error

    async def logprobs(self, address: str, name: str, token_ids: list[int]) -> list[float] | None:
        """None: this engine does not say log-probabilities of a prompt."""
        return None

    async def probe(self, address: str, name: str, probe: Probe) -> ProbeAnswer:
        """Render and answer one probe greedily, as far as the context goes.

        Raises ConnectionError where the engine does not answer, and InvalidInput where it refuses the probe.
        """
        prompt: dict[str, Any] = {"model": name, "messages": probe.messages}
        if probe.tools:
            prompt["tools"] = probe.tools
        timeout = aiohttp.ClientTimeout(total=_PROBE_SECONDS + probe.max_tokens * SLOWEST_TOKEN_SECONDS)
        try:
            async with _connect(address, timeout) as engine:
                rendered = json.loads(await _post(engine, "/tokenize", {**prompt, "add_generation_prompt": True}))
                left = max(1, rendered["max_model_len"] - len(rendered["tokens"]))
                asked = {**prompt, "max_tokens": min(probe.max_tokens, left), "temperature": 0}
                if probe.tools:
                    asked["tool_choice"] = "none"  # they are told to the model, and its answer stays a text
                answer = json.loads(await _post(engine, "/v1/chat/completions", asked))
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ConnectionError(f"the engine at {address} does not answer: {error}") from error
        choice = answer["choices"][0]
        said = choice["message"]
        thought = said.get("reasoning") or said.get("reasoning_content") or ""
        return ProbeAnswer(
            token_ids=rendered["tokens"],
            text=thought + (said["content"] or ""),
            finish_reason=choice["finish_reason"],
            completion_tokens=answer["usage"]["completion_tokens"],
        )


async def ask(address: str, path: str, body: dict[str, Any]) -> Any:
    """The engine's answer to one request, read from JSON.

    Raises ConnectionError where the engine does not answer, and InvalidInput where it refuses.
    """
    try:
        async with _connect(address, aiohttp.ClientTimeout(total=_PROBE_SECONDS)) as engine:
            return json.loads(await _post(engine, path, body))
    except (aiohttp.ClientError, TimeoutError) as error:
        raise ConnectionError(f"the engine at {address} does not answer: {error}") from error


def weights_in_float32(release: Path) -> int:
    """Bytes of the model's weights in 32 bits each, from the sizes of its files and their type."""
    stored = sum(file.stat().st_size for file in release.glob("*.safetensors"))
    with contextlib.suppress(OSError, ValueError, AttributeError):
        config = json.loads((release / "config.json").read_bytes())
        if config.get("dtype", config.get("torch_dtype")) == "float32":
            return stored
    return 2 * stored


def weights_in_16_bits(model: Path) -> int:
    """Bytes of the model's weights in 16 bits each, or as they are stored where that is less."""
    stored = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    return min(2 * count_parameters(model), stored)


def weights_in_fp8(model: Path) -> int:
    """Bytes of the model's weights with those of linear layers and experts in 8 bits each, the others in 16."""
    return 2 * count_parameters(model) - count_linear(model)


def cache_bytes(model: Path, tokens: int) -> int:
    """Bytes that keys and values of so many tokens take in 16 bits.

    0 where config.json does not say their shape, or says that not every layer keeps all of them.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
        config = json.loads((model / "config.json").read_bytes())
        config = config.get("text_config", config)
        if not _keeps_all(config):
            return 0
        heads = config["num_attention_heads"]
        width = config.get("head_dim") or config["hidden_size"] // heads
        return int(4 * tokens * config["num_hidden_layers"] * config.get("num_key_value_heads", heads) * width)
    return 0


def _keeps_all(config: dict[str, Any]) -> bool:
    """Whether each layer of a model keeps keys and values of all heads and tokens, as far as its config says."""
    slides = config.get("sliding_window") and config.get("use_sliding_window", True)
    others = set(config.get("layer_types") or ()) - {"full_attention"}
    less = ("kv_lora_rank", "full_attention_interval", "layers_block_type", "attn_type_list")
    return not (slides or others or any(config.get(key) for key in less))


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
    limit = setting or LONGEST_DEFAULT_CONTEXT
    return min(own, limit) if isinstance(own, int) else limit


def _connect(address: str, timeout: aiohttp.ClientTimeout) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.UnixConnector(address.removeprefix("unix:")), timeout=timeout)


async def _post(engine: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> bytes:
    async with engine.post(f"http://engine{path}", json=body) as response:
        if 400 <= response.status < 500:
            raise InvalidInput(
                "engine_refused",
                f"the engine refuses {path}: {_reason(await response.text())}",
                "see the engine's log; a prompt of the probes may be longer than APPLIANCE_MAX_MODEL_LEN allows",
            )
        response.raise_for_status()
        return await response.read()


def _reason(refusal: str) -> str:
    try:
        return str(json.loads(refusal)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return refusal[:200]
