"""vLLM's own parser takes every command line that we can make."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from chat_templates import PUBLISHED

from appliance.data.tokenizer import TemplateSettings
from appliance.settings import load_settings
from serve.engines import vllm_start
from serve.engines.vllm import VllmEngine

MODELS = {
    "llama": "llama3_1",
    "qwen3": "qwen3",
    "qwen3_5": "qwen3_5_nothink",
    "glm4_moe": "glm4moe",
    "gpt_oss": "gptoss",
    "gemma4": "gemma4_v5",
    "gemma3n": "gemma3",
    "nemotron_h": "nemotron_3_nano",
}
"""Types of models with the chat template of their kind: what a command line follows from."""


def server_arguments(argv: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What vLLM's server is told in the end by an engine's command."""
    told: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", argv[2:])
    monkeypatch.setattr("os.execv", lambda program, arguments: told.append(arguments))
    vllm_start.main()
    return told[0][3:]


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "cpu"])
@pytest.mark.parametrize("rank", [0, 16], ids=["merged", "with-adapters"])
def test_vllms_parser_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, gpu: bool, rank: int
) -> None:
    cli_args: Any = pytest.importorskip("vllm.entrypoints.launchers.cli_args")
    from vllm.engine.arg_utils import AsyncEngineArgs  # type: ignore[import-not-found]
    from vllm.reasoning import ReasoningParserManager  # type: ignore[import-not-found]
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # type: ignore[import-not-found]

    release = tmp_path / "r1"
    release.mkdir()
    monkeypatch.chdir(tmp_path)
    (release / "config.json").write_text(json.dumps({"model_type": model_type, "max_position_embeddings": 2048}))
    (release / "chat_template.jinja").write_text((PUBLISHED / f"{MODELS[model_type]}.jinja").read_text())
    engine = VllmEngine(load_settings({}, adapter_rank=rank), gpu)
    for template in (None, TemplateSettings(thinking=True)):
        argv = engine.command(release, "r1", tmp_path / "e.sock", template).argv
        arguments = cli_args.make_arg_parser(FlexibleArgumentParser()).parse_args(server_arguments(argv, monkeypatch))
        cli_args.validate_parsed_serve_args(arguments)
        assert (arguments.model, arguments.uds) == ("model", str(tmp_path / "e.sock"))
        assert arguments.max_lora_rank == 16 or not rank
        made = AsyncEngineArgs.from_cli_args(arguments)
        assert made.language_model_only is (model_type != "gemma3n")
        if arguments.reasoning_parser:
            assert arguments.reasoning_parser in ReasoningParserManager.list_registered()
