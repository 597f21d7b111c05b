"""llama.cpp itself, in this process, on a GGUF file."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


class LlamaCpp:
    """A loaded file."""

    def __init__(self, file: Path, context: int = 256) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx = context
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = 1
        parameters.warmup = False
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(parameters)

    def greedy(self, prompt: list[int], tokens: int) -> list[tuple[int, float]]:
        """So many most likely tokens in a row with their log-probabilities, but those that are a part of a letter."""
        asked: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "logprobs": 1}
        answer = self._server.handle_completions(asked | {"cache_prompt": False, "ignore_eos": True})
        said = answer["choices"][0]["logprobs"] or {"content": []}
        return [(one["id"], one["logprob"]) for one in said["content"]]

    def tokens(self, text: str) -> list[int]:
        """The ids of a text, special tokens read as such and none added."""
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        request = urllib.request.Request(f"{self._server.listening_address}/tokenize", body)
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: list[int] = json.load(answer)["tokens"]
        return found
