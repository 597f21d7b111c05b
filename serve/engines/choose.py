"""Which engine serves the releases."""

from __future__ import annotations

import importlib.util

from appliance.errors import InvalidInput
from appliance.hardware import has_gpu
from appliance.settings import Settings
from appliance.supervisor.engines import EngineKind
from serve.engines.transformers import TransformersEngine
from serve.engines.vllm import VllmEngine


def choose_engine(settings: Settings) -> EngineKind:
    """The engine that serves releases. Raises InvalidInput where the setting names one that is not installed."""
    installed = importlib.util.find_spec("vllm") is not None
    if settings.engine == "vllm" and not installed:
        raise InvalidInput(
            "no_vllm",
            "vLLM is to serve the releases, and it is not installed",
            "install the extra `vllm`, or set APPLIANCE_ENGINE=transformers",
        )
    if settings.engine == "transformers" or not installed:
        return TransformersEngine(settings)
    return VllmEngine(settings, has_gpu())
