"""vLLM as the engine."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from appliance.api import Precision
from appliance.data.tokenizer import TemplateSettings, thinking_switches, thinks_unasked
from appliance.errors import InvalidInput
from appliance.gpu import chosen
from appliance.hardware import total_memory
from appliance.models import is_quantised, template_and_end
from appliance.settings import Settings
from appliance.supervisor.engines import SIDE_BY_SIDE, EngineCommand, Room
from serve.engines import vllm_start
from serve.engines.openai_engine import (
    LONGEST_DEFAULT_CONTEXT,
    OFFLINE,
    OVERHEAD,
    SLOWEST_TOKEN_SECONDS,
    TOKEN_SECONDS_ON_GPU,
    OpenAIEngine,
    ask,
    cache_bytes,
    context_length,
    weights_in_16_bits,
    weights_in_float32,
    weights_in_fp8,
)
from serve.engines.parsers import reasoning_parser, tool_parser
from serve.engines.transformers import HONOURS as COMMON
from serve.engines.vllm_reload import CLOCK, Reload

_OVERHEAD_ON_GPU = 3 << 29
"""Bytes beside weights and cache: CUDA's context, graphs, and the passes that vLLM makes room for. Estimated."""
WITH_ITS_TOWERS = ("gemma3n",)
"""Types of models that vLLM 0.32 cannot serve for texts alone: it gives them no embeddings then."""
LEAST_IMAGES = {"image": 1, "audio": 0}
"""What vLLM makes room for in a request to such models, which nobody sends images."""
IN_FP8 = (
    "--quantization",
    "fp8_per_tensor",
    "--quantization-config",
    json.dumps({"ignore": ["*.gate", "*.router"]}),
)
"""vLLM 0.32 rounds the 16-bit files as it loads them, a layer at a time; its routers are told to stay as they are."""
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can make room for."""

_ENVIRONMENT = {
    **OFFLINE,
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    # It would be compiled at the first start, by an nvcc that a box with a driver alone has not.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}


class VllmEngine(OpenAIEngine):
    """Starts vLLM's API server, on a GPU or, slowly, on a machine without one."""

    name = "vllm"
    honours = COMMON | {
        "min_tokens",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "logit_bias",
        "logprobs",
        "top_logprobs",
        "response_format",
        "tools",
        "tool_choice",
    }
    at_once = 256
    """What vLLM takes into a batch by itself on most cards; on the largest it takes more."""
    ready_seconds = 900.0
    reloads = True

    def __init__(self, settings: Settings, gpu: bool) -> None:
        self._settings = settings
        self._gpu = gpu
        self.longest_answer = settings.max_model_len or LONGEST_DEFAULT_CONTEXT
        self.token_seconds = TOKEN_SECONDS_ON_GPU if gpu else SLOWEST_TOKEN_SECONDS
        self.adapter_rank = _room_for_rank(settings.adapter_rank)
        self.measures = gpu
        # What vLLM would make of adapters' memory after a sleep has not been looked at.
        self.sleeps = gpu and settings.lease != "share" and settings.sleep == "auto" and not self.adapter_rank

    async def logprobs(self, address: str, name: str, token_ids: list[int]) -> list[float] | None:
        """Of each token the log-probability after those before it, 0 for the first.

        Raises ConnectionError where the engine does not answer, and InvalidInput where it refuses.
        """
        asked = {"model": name, "prompt": token_ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        answer = await ask(address, "/v1/completions", asked)
        said = answer["choices"][0]["prompt_logprobs"][1:]
        return [0.0, *(of[str(id)]["logprob"] for of, id in zip(said, token_ids[1:], strict=True))]

    @property
    def _cache_gib(self) -> int:
        """Key-value cache of a server without a GPU."""
        return max(1, math.ceil(self._settings.kv_cache_gib))

    def memory(self, release: Path) -> int:
        """Bytes of memory that a process for the model files in `release` will take: on a GPU its share of all."""
        if self._gpu:
            return int(self._settings.gpu_memory_share * (total_memory() or 0))
        return weights_in_float32(release) + (self._cache_gib << 30) + OVERHEAD

    def room(self, model: Path, *, beside: bool = False) -> Room:
        """What serving the model in `model` takes at least, what this box could give it, and in which precision.

        `beside` another engine like it, each with SIDE_BY_SIDE of the memory.
        """
        total = total_memory()
        if not self._gpu:
            return Room(self.memory(model), total and total // (2 if beside else 1), "32-bit")
        share = SIDE_BY_SIDE if beside else self._settings.gpu_memory_share
        available = None if total is None else int(share * total)
        one_request = cache_bytes(model, context_length(model, self._settings.max_model_len))
        with_weights = one_request + _OVERHEAD_ON_GPU
        in_16_bits, in_fp8 = weights_in_16_bits(model), None
        if (card := chosen()) and card.holds_fp8 and not is_quantised(model):
            in_fp8 = weights_in_fp8(model)
        return choose_room(in_16_bits + with_weights, None if in_fp8 is None else in_fp8 + with_weights, available)

    def command(
        self,
        release: Path,
        name: str,
        socket: Path,
        template: TemplateSettings | None = None,
        precision: Precision | None = None,
    ) -> EngineCommand:
        """The command that serves the model files in `release` as model `name` on the unix socket `socket`.

        Its chat template is told the settings of `template`. `precision` is that in which it was proven; None: it is
        served as there is room for it.
        """
        # Without a GPU the share is one of the machine's memory.
        share = self._settings.gpu_memory_share if self._gpu else 0.3
        argv = [
            sys.executable,
            "-m",
            vllm_start.__name__,
            str(release),
            str(socket.with_suffix("")),
            str(socket),
            str(share),
        ]
        options = {
            "--served-model-name": name,
            "--max-model-len": context_length(release, self._settings.max_model_len),
            "--dtype": "auto" if self._gpu else "float32",
        }
        argv += [str(part) for option in options.items() for part in option]
        argv += ["--middleware", f"{Reload.__module__}.{Reload.__qualname__}"]
        argv += ["--disable-fastapi-docs", "--disable-uvicorn-access-log"]
        argv += ["--enable-sleep-mode"] if self.sleeps else []
        # The gateway takes texts: what a model has for images or sound is neither loaded nor given memory.
        if _has_type(release, WITH_ITS_TOWERS):
            argv += ["--limit-mm-per-prompt", json.dumps(LEAST_IMAGES)]
        else:
            argv += ["--language-model-only"]
        environment = dict(_ENVIRONMENT)
        if self.adapter_rank:
            # One adapter answers; the one before it may still finish, so that both stay in the machine's memory.
            argv += ["--enable-lora", "--max-loras", "1", "--max-cpu-loras", "2"]
            argv += ["--max-lora-rank", str(self.adapter_rank)]
            environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if template and template.today:
            environment[CLOCK] = str(template.today)
        chat_template, _ = template_and_end(release)
        if parser := reasoning_parser(release, chat_template):
            argv += ["--reasoning-parser", parser]
        if parser := tool_parser(chat_template):
            argv += ["--enable-auto-tool-choice", "--tool-call-parser", parser]
        if switches := thinking_switches(chat_template):
            # Not by the tokenizer, as the day, and where it is not asked for too: what tells a thought from an answer
            # takes every model for one that thinks unless it is told.
            asked = template.thinking if template else None
            thinks = thinks_unasked(chat_template) if asked is None else asked
            argv += ["--default-chat-template-kwargs", json.dumps(dict.fromkeys(switches, thinks))]
        if (precision or self.room(release).precision) == "FP8":
            argv += IN_FP8
        if not self._gpu:
            environment |= {
                "VLLM_CPU_KVCACHE_SPACE": str(self._cache_gib),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_CPU_CI_ENV": "1",
            }
        return EngineCommand(argv, environment, f"unix:{socket}")


def choose_room(in_16_bits: int, in_fp8: int | None, available: int | None) -> Room:
    """In 16 bits where they fit, else in FP8, which may not fit either. `in_fp8` is None where it cannot be had.

    All are bytes; `available` is None where nobody knows.
    """
    full = Room(in_16_bits, available, "16-bit")
    return full if full.suffices or in_fp8 is None else Room(in_fp8, available, "FP8")


def _has_type(release: Path, begins: tuple[str, ...]) -> bool:
    """Whether the model's type begins with one of these; not where config.json cannot be read."""
    try:
        return str(json.loads((release / "config.json").read_bytes()).get("model_type")).startswith(begins)
    except (OSError, ValueError, AttributeError):
        return False


def _room_for_rank(wanted: int) -> int:
    """The least rank from `wanted` on that vLLM can make room for; 0 for 0. Raises InvalidInput above the largest."""
    if not 0 <= wanted <= _RANKS[-1]:
        raise InvalidInput(
            "bad_setting",
            f"APPLIANCE_ADAPTER_RANK={wanted} is not between 0 and {_RANKS[-1]}",
            "set it to the rank of the recipes' adapters, or twice that",
        )
    return next(rank for rank in (0, *_RANKS) if rank >= wanted)
