"""The embedded engine: Transformers' continuous batching behind a small server of our own."""

from __future__ import annotations

import sys
from pathlib import Path

from appliance.api import Precision
from appliance.data.tokenizer import TemplateSettings
from appliance.hardware import has_gpu, total_memory
from appliance.settings import Settings
from appliance.supervisor.engines import EngineCommand, Room
from serve.engines.openai_engine import (
    LONGEST_DEFAULT_CONTEXT,
    OFFLINE,
    OVERHEAD,
    SLOWEST_TOKEN_SECONDS,
    TOKEN_SECONDS_ON_GPU,
    OpenAIEngine,
    cache_bytes,
    context_length,
    weights_in_16_bits,
    weights_in_float32,
)

BATCH_REQUESTS = 64
"""Answers in one forward pass."""

HONOURS = frozenset(
    {
        "model",
        "messages",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "n",
        "stop",
        "ignore_eos",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "chat_template_kwargs",
        "reasoning_effort",
    }
)
"""The chat completion fields that transformers_server.py obeys."""


class TransformersEngine(OpenAIEngine):
    """Starts `serve.engines.transformers_server`."""

    name = "transformers"
    honours = HONOURS
    ready_seconds = 300.0

    at_once = BATCH_REQUESTS

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.longest_answer = settings.max_model_len or LONGEST_DEFAULT_CONTEXT
        self.token_seconds = TOKEN_SECONDS_ON_GPU if has_gpu() else SLOWEST_TOKEN_SECONDS

    def memory(self, release: Path) -> int:
        """Bytes of memory that a process for the model files in `release` will take."""
        return weights_in_float32(release) + int(self._settings.kv_cache_gib * (1 << 30)) + OVERHEAD

    def room(self, model: Path, *, beside: bool = False) -> Room:
        """What serving the model in `model` takes at least, what this box could give it, and in which precision.

        `beside` another engine like it, each with half of the memory.
        """
        available = total_memory()
        if available and beside:
            available //= 2
        if not has_gpu():
            return Room(self.memory(model), available, "32-bit")
        one_request = cache_bytes(model, context_length(model, self._settings.max_model_len))
        return Room(weights_in_16_bits(model) + one_request + OVERHEAD, available)

    def command(
        self,
        release: Path,
        name: str,
        socket: Path,
        template: TemplateSettings | None = None,
        precision: Precision | None = None,
    ) -> EngineCommand:
        """The command that serves the model files in `release` as model `name` on the unix socket `socket`.

        Its chat template is told the settings of `template`. It has one `precision` for all on a machine.
        """
        options = {
            "--model": release,
            "--name": name,
            "--socket": socket,
            "--kv-cache-gib": self._settings.kv_cache_gib,
            "--gpu-memory-share": self._settings.gpu_memory_share,
            "--max-model-len": context_length(release, self._settings.max_model_len),
        }
        argv = [sys.executable, "-m", "serve.engines.transformers_server"]
        argv += [str(part) for option in options.items() for part in option]
        argv += ["--template", template.model_dump_json()] if template else []
        return EngineCommand(argv, dict(OFFLINE), f"unix:{socket}")
