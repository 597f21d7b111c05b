"""Which engine serves, and how it is started. Nothing is started here."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from appliance.api import Precision
from appliance.data.tokenizer import TemplateSettings
from appliance.errors import Conflict, InvalidInput
from appliance.gpu import Card
from appliance.hardware import total_memory
from appliance.settings import load_settings
from appliance.supervisor.engines import Room, advice_on_two
from serve.engines.choose import choose_engine
from serve.engines.openai_engine import (
    OVERHEAD,
    cache_bytes,
    context_length,
    weights_in_16_bits,
    weights_in_fp8,
)
from serve.engines.transformers import TransformersEngine
from serve.engines.vllm import VllmEngine, choose_room


def options(argv: list[str]) -> dict[str, str]:
    """The flags of a command with their values."""
    return {
        flag: value for flag, value in zip(argv, [*argv[1:], ""], strict=True) if flag.startswith("--") and flag != "--"
    }


@pytest.fixture
def release(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    return tmp_path


@pytest.mark.parametrize(
    ("engine", "installed", "chosen"),
    [
        ("auto", True, "vllm"),
        ("auto", False, "transformers"),
        ("transformers", True, "transformers"),
        ("vllm", True, "vllm"),
    ],
)
def test_vllm_serves_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, engine: str, installed: bool, chosen: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    kind = choose_engine(load_settings({}, engine=engine))
    assert kind.name == chosen
    assert {"messages", "temperature", "stop", "n", "stream"} <= kind.honours


def test_a_forced_engine_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidInput) as caught:
        choose_engine(load_settings({}, engine="vllm"))
    assert "vllm" in caught.value.next


def test_choosing_imports_no_engine() -> None:
    code = (
        "from appliance.settings import load_settings\n"
        "from serve.engines.choose import choose_engine\n"
        "choose_engine(load_settings({}))\n"
        "import sys\n"
        "assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_embedded_engines_command(release: Path) -> None:
    settings = load_settings({}, kv_cache_gib=2.5)
    command = TransformersEngine(settings).command(release, "r1", Path("/run/e.sock"))
    assert command.argv[:3] == [sys.executable, "-m", "serve.engines.transformers_server"]
    assert options(command.argv) == {
        "--model": str(release),
        "--name": "r1",
        "--socket": "/run/e.sock",
        "--kv-cache-gib": "2.5",
        "--gpu-memory-share": "0.92",
        "--max-model-len": "2048",
    }
    assert command.address == "unix:/run/e.sock"
    assert command.environment["HF_HUB_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("gpu", "dtype", "share"),
    [(True, "auto", "0.5"), (False, "float32", "0.3")],
)
def test_vllms_command(release: Path, gpu: bool, dtype: str, share: str) -> None:
    settings = load_settings({}, kv_cache_gib=1.5, gpu_memory_share=0.5)
    command = VllmEngine(settings, gpu).command(release, "r1", Path("/run/e.sock"))
    given = options(command.argv)
    assert command.argv[2:7] == ["serve.engines.vllm_start", str(release), "/run/e", "/run/e.sock", share]
    assert given["--served-model-name"] == "r1"
    assert given["--max-model-len"] == "2048"
    assert given["--dtype"] == dtype
    assert "--trust-remote-code" not in given
    assert "--disable-fastapi-docs" in given
    assert command.environment["VLLM_USE_FLASHINFER_SAMPLER"] == "0", "which nvcc would have to compile"
    assert command.environment["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert command.environment["HF_HUB_OFFLINE"] == "1"
    assert command.environment.get("VLLM_CPU_KVCACHE_SPACE") == (None if gpu else "2")
    module, _, name = given["--middleware"].rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)


@pytest.mark.parametrize(
    ("gpu", "settings", "sleeps"),
    [
        (True, {}, True),
        (True, {"lease": "exclusive"}, True),
        (True, {"lease": "share"}, False),
        (True, {"sleep": "off"}, False),
        (True, {"adapter_rank": 16}, False),
        (False, {"lease": "exclusive"}, False),
    ],
)
def test_vllm_sleeps_where_a_worker_takes_its_gpu(
    release: Path, gpu: bool, settings: dict[str, Any], sleeps: bool
) -> None:
    vllm = VllmEngine(load_settings({}, **settings), gpu)
    command = vllm.command(release, "r1", release / "engine.sock")
    assert vllm.sleeps is sleeps
    assert ("--enable-sleep-mode" in command.argv) is sleeps
    assert "VLLM_SERVER_DEV_MODE" not in command.environment, "which opens far more than sleep"
    assert not TransformersEngine(load_settings({}, **settings)).sleeps


def test_vllms_own_parser_takes_the_command(release: Path) -> None:
    parsing: Any = pytest.importorskip("vllm.utils.argparse_utils")
    arguments: Any = pytest.importorskip("vllm.entrypoints.launchers.cli_args")
    parser = arguments.make_arg_parser(parsing.FlexibleArgumentParser())
    command = VllmEngine(load_settings({}), gpu=True).command(release, "r1", release / "engine.sock")
    assert parser.parse_args(command.argv[7:]).enable_sleep_mode


@pytest.mark.parametrize(("model_type", "alone"), [("gemma3", True), ("gemma3n", False), (None, True)])
def test_towers_are_left_out_where_vllm_can_do_without(release: Path, model_type: str | None, alone: bool) -> None:
    (release / "config.json").write_text(json.dumps({"model_type": model_type, "max_position_embeddings": 2048}))
    argv = VllmEngine(load_settings({}), gpu=True).command(release, "r1", release / "e.sock").argv
    assert ("--language-model-only" in argv) is alone
    assert ("--limit-mm-per-prompt" in argv) is not alone


def test_an_engine_is_told_what_its_release_takes_for_today(release: Path) -> None:
    day, socket = date(2024, 2, 29), release / "engine.sock"
    embedded, vllm = TransformersEngine(load_settings({})), VllmEngine(load_settings({}), gpu=True)
    template = TemplateSettings(today=day)
    told = options(embedded.command(release, "r1", socket, template).argv)["--template"]
    assert TemplateSettings.model_validate_json(told) == template
    assert vllm.command(release, "r1", socket, template).environment["APPLIANCE_CLOCK"] == "2024-02-29"
    assert "APPLIANCE_CLOCK" not in vllm.command(release, "r1", socket).environment


def test_vllm_is_told_whether_the_model_thinks_by_the_name_that_its_template_has_for_it(release: Path) -> None:
    template = "{{ messages }}{% if NAME %}<think></think>{% endif %}"
    vllm, socket = VllmEngine(load_settings({}), gpu=True), release / "engine.sock"
    for name, parser in (("enable_thinking", "qwen3"), ("thinking", "deepseek_v3")):
        (release / "chat_template.jinja").write_text(template.replace("NAME", name))
        for thinking, told in ((True, "true"), (False, "false"), (None, "false")):
            given = options(vllm.command(release, "r1", socket, TemplateSettings(thinking=thinking)).argv)
            assert given["--default-chat-template-kwargs"] == f'{{"{name}": {told}}}'
            assert given["--reasoning-parser"] == parser
    (release / "chat_template.jinja").write_text("{{ messages }}")
    given = options(vllm.command(release, "r1", socket, TemplateSettings(thinking=False)).argv)
    assert not {"--reasoning-parser", "--default-chat-template-kwargs"} & given.keys()


@pytest.mark.parametrize(("dtype", "expected"), [("float32", 6), ("bfloat16", 12), (None, 12)])
def test_the_memory_that_an_engine_takes(release: Path, dtype: str | None, expected: int) -> None:
    (release / "config.json").write_text(json.dumps({"dtype": dtype} if dtype else []))
    for part in "ab":
        (release / f"{part}.safetensors").write_bytes(b"abc")
    settings = load_settings({}, kv_cache_gib=1.5)
    embedded = TransformersEngine(settings).memory(release)
    assert embedded - OVERHEAD == expected + (3 << 29)
    assert VllmEngine(settings, gpu=False).memory(release) - OVERHEAD == expected + (2 << 30)
    assert VllmEngine(settings, gpu=True).memory(release) == int(settings.gpu_memory_share * total_memory())


LLAMA_8B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 131072,
}


@pytest.mark.parametrize(
    ("card", "parameters", "fits"), [(24, 8, True), (16, 8, False), (24, 14, False), (48, 14, True)]
)
def test_the_room_that_a_model_takes_on_a_card(
    release: Path, monkeypatch: pytest.MonkeyPatch, card: int, parameters: int, fits: bool
) -> None:
    """Weights in 16 bits, one request of the context's length, and what vLLM takes beside; of the share that it may."""
    (release / "config.json").write_text(json.dumps(LLAMA_8B))
    monkeypatch.setattr("serve.engines.vllm.total_memory", lambda: card << 30)
    monkeypatch.setattr("serve.engines.vllm.weights_in_16_bits", lambda model: parameters * 2 * 10**9)
    room = VllmEngine(load_settings({}), gpu=True).room(release)
    assert room.needed == parameters * 2 * 10**9 + (8192 * 128 << 10) + (3 << 29)
    assert room.available == int(0.92 * (card << 30))
    assert room.suffices is fits


@pytest.mark.parametrize(
    ("in_16_bits", "in_fp8", "available", "precision", "fits"),
    [
        (10, 6, 12, "16-bit", True),
        (10, 6, 10, "16-bit", True),
        (10, 6, 9, "FP8", True),
        (10, 6, 6, "FP8", True),
        (10, 6, 5, "FP8", False),
        (10, None, 9, "16-bit", False),
        (10, None, 12, "16-bit", True),
        (10, 6, None, "16-bit", True),
    ],
)
def test_fp8_is_for_what_does_not_fit_in_16_bits(
    in_16_bits: int, in_fp8: int | None, available: int | None, precision: Precision, fits: bool
) -> None:
    room = choose_room(in_16_bits, in_fp8, available)
    assert room == Room(in_fp8 or 0 if precision == "FP8" else in_16_bits, available, precision)
    assert room.suffices is fits


def on_card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    """A card of 24 GiB, and a model of 14 billion parameters, one and a half not in layers."""
    card = Card(0, "GPU-1", "a card", 24 << 30, 0, 0, capability)
    for name, value in {
        "total_memory": 24 << 30,
        "weights_in_16_bits": 28 * 10**9,
        "weights_in_fp8": 15 * 10**9 + 5 * 10**8,
        "chosen": card,
    }.items():
        monkeypatch.setattr(f"serve.engines.vllm.{name}", lambda *_, value=value: value)


@pytest.mark.parametrize(
    ("capability", "config", "precision"),
    [
        ((8, 0), {}, "FP8"),
        ((9, 0), {}, "FP8"),
        ((7, 5), {}, "16-bit"),
        (None, {}, "16-bit"),
        ((9, 0), {"quantization_config": {"quant_method": "mxfp4"}}, "16-bit"),
    ],
)
def test_forecast_and_command_agree_on_fp8(
    release: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] | None,
    config: dict[str, Any],
    precision: Precision,
) -> None:
    """Where the card can, and the model is in 16 bits yet."""
    (release / "config.json").write_text(json.dumps(LLAMA_8B | config))
    on_card(monkeypatch, capability)
    engine = VllmEngine(load_settings({}), gpu=True)
    room, given = engine.room(release), options(engine.command(release, "r1", release / "e.sock").argv)
    weights = 15 * 10**9 + 5 * 10**8 if precision == "FP8" else 28 * 10**9
    assert room == Room(weights + (8192 * 128 << 10) + (3 << 29), int(0.92 * (24 << 30)), precision)
    assert room.suffices == (given.get("--quantization") == "fp8_per_tensor") == (precision == "FP8")
    assert engine.memory(release) == room.available, "its share of the card, whatever it holds there"


@pytest.mark.parametrize(("proven", "fp8"), [("16-bit", False), ("FP8", True), ("32-bit", False)])
def test_what_was_proven_in_a_precision_is_started_in_it(
    release: Path, monkeypatch: pytest.MonkeyPatch, proven: Precision, fp8: bool
) -> None:
    room: list[Precision] = ["16-bit", "FP8"]
    for here in room:
        monkeypatch.setattr(VllmEngine, "room", lambda *_, here=here: Room(1, 1, here))
        argv = VllmEngine(load_settings({}), gpu=True).command(release, "r1", release / "s", None, proven).argv
        assert ("--quantization" in argv) is fp8


def test_neither_the_embedded_engine_nor_a_cpu_serves_in_fp8(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_card(monkeypatch, (9, 0))
    monkeypatch.setattr("serve.engines.transformers.has_gpu", lambda: True)
    monkeypatch.setattr("serve.engines.transformers.weights_in_16_bits", lambda model: 1 << 50)
    assert TransformersEngine(load_settings({})).room(release).precision == "16-bit"
    command = VllmEngine(load_settings({}), gpu=False).command(release, "r1", release / "e.sock")
    assert "--quantization" not in command.argv


def test_a_model_that_does_not_fit_in_fp8_either_is_refused_with_that_figure(
    release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_card(monkeypatch, (9, 0))
    (release / "config.json").write_text(json.dumps(LLAMA_8B))
    monkeypatch.setattr("serve.engines.vllm.total_memory", lambda: 16 << 30)
    room = VllmEngine(load_settings({}), gpu=True).room(release)
    with pytest.raises(
        Conflict, match=r"takes 16\.9 GiB to be verified and served in FP8, of which this box has 14\.7"
    ):
        room.require("tiny")


@pytest.mark.parametrize(
    ("gib", "said"),
    [
        (80, "APPLIANCE_LEASE=share and APPLIANCE_GPU_MEMORY_SHARE=0.45 make room for two engines"),
        (32, "this box cannot hold two engines for it: each takes 16.9 GiB"),
        (40, "APPLIANCE_LEASE=share and APPLIANCE_GPU_MEMORY_SHARE=0.45 make room for two engines in FP8"),
    ],
)
def test_whether_two_engines_fit_is_said_with_what_to_set(
    release: Path, monkeypatch: pytest.MonkeyPatch, gib: int, said: str
) -> None:
    on_card(monkeypatch, (9, 0))
    (release / "config.json").write_text(json.dumps(LLAMA_8B))
    monkeypatch.setattr("serve.engines.vllm.total_memory", lambda: gib << 30)
    room = VllmEngine(load_settings({}), gpu=True).room(release, beside=True)
    assert advice_on_two(room) == said


def test_weights_in_fp8_are_those_of_the_header(release: Path) -> None:
    tensors = {"model.embed_tokens.weight": (10, 8), "lm_head.weight": (10, 8), "model.norm.weight": (8,)}
    layers = {"model.layers.0.mlp.down_proj.weight": (8, 16), "model.layers.0.mlp.experts.gate_up_proj": (4, 8, 6)}
    bf16 = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in (tensors | layers).items()}
    save_file(bf16, release / "model.safetensors")
    others, linear = 2 * 80 + 8, 8 * 16 + 4 * 8 * 6
    assert weights_in_fp8(release) == 2 * others + linear
    assert weights_in_16_bits(release) == 2 * (others + linear)


def test_vllms_own_parser_takes_the_command_and_means_fp8(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsing: Any = pytest.importorskip("vllm.entrypoints.launchers.cli_args")
    quantization: Any = importlib.import_module("vllm.config.quantization")
    parser_class: Any = importlib.import_module("vllm.utils.argparse_utils").FlexibleArgumentParser
    fp8: Any = importlib.import_module("vllm.model_executor.layers.quantization.online.fp8")
    base: Any = importlib.import_module("vllm.model_executor.layers.quantization.online.base")
    linear: Any = importlib.import_module("vllm.model_executor.layers.linear").LinearBase
    on_card(monkeypatch, (9, 0))
    argv = VllmEngine(load_settings({}, adapter_rank=16), gpu=True).command(release, "r1", release / "e.sock").argv
    asked = parsing.make_arg_parser(parser_class()).parse_args(["--model", str(release), *argv[7:]])
    config = base.OnlineQuantizationConfig(
        quantization.resolve_quantization_config(asked.quantization, asked.quantization_config)
    )
    config.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    chosen = {
        name: config.resolve_quant_method_cls(linear, f"model.layers.0.{name}")
        for name in ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.gate", "feed_forward.router")
    }
    assert [found and found[-1] for found in chosen.values()] == [
        fp8.Fp8PerTensorOnlineLinearMethod,
        fp8.Fp8PerTensorOnlineLinearMethod,
        None,
        None,
    ]


def test_where_the_gpu_does_not_tell_its_memory_nothing_is_refused(release: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("serve.engines.vllm.total_memory", lambda: None)
    room = VllmEngine(load_settings({}), gpu=True).room(release)
    assert room.suffices
    room.require("tiny")


def test_without_a_gpu_it_is_the_machines_memory(release: Path) -> None:
    for engine in (TransformersEngine(load_settings({})), VllmEngine(load_settings({}), gpu=False)):
        assert engine.room(release) == Room(engine.memory(release), total_memory(), "32-bit")


@pytest.mark.parametrize(
    ("config", "counted"),
    [
        (LLAMA_8B, True),
        (
            LLAMA_8B | {"sliding_window": 4096, "use_sliding_window": False, "layer_types": ["full_attention"] * 32},
            True,
        ),
        ({"text_config": LLAMA_8B}, True),
        (LLAMA_8B | {"sliding_window": 4096}, False),
        (LLAMA_8B | {"layer_types": ["full_attention", "sliding_attention"]}, False),
        (LLAMA_8B | {"kv_lora_rank": 512}, False),
        ({}, False),
    ],
)
def test_the_cache_of_a_model_whose_layers_keep_less_than_all_is_left_out(
    release: Path, config: dict[str, Any], counted: bool
) -> None:
    (release / "config.json").write_text(json.dumps(config))
    assert cache_bytes(release, 8192) == (8192 * 128 << 10 if counted else 0)


@pytest.mark.parametrize(
    ("config", "setting", "expected"),
    [
        ({"max_position_embeddings": 2048}, 0, 2048),
        ({"max_position_embeddings": 131072}, 0, 8192),
        ({"max_position_embeddings": 131072}, 32768, 32768),
        ({"max_position_embeddings": 2048}, 32768, 2048),
        ({"text_config": {"max_position_embeddings": 4096}}, 0, 4096),
        ({}, 0, 8192),
    ],
)
def test_the_context_is_the_models_own_within_the_setting(
    tmp_path: Path, config: dict[str, Any], setting: int, expected: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_length(tmp_path, setting) == expected


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_model_without_a_readable_config(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidInput):
        context_length(tmp_path, 0)


@pytest.mark.parametrize(("wanted", "room"), [(0, None), (1, "8"), (24, "32"), (64, "64"), (512, "512")])
def test_vllm_makes_room_for_an_adapter_only_where_it_is_told_to(release: Path, wanted: int, room: str | None) -> None:
    kind = VllmEngine(load_settings({}, adapter_rank=wanted), gpu=True)
    command = kind.command(release, "r1", release / "engine.sock")
    assert options(command.argv).get("--max-lora-rank") == room
    assert ("--enable-lora" in command.argv) == (room is not None) == bool(kind.adapter_rank)
    assert command.environment.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") == (room and "1")


@pytest.mark.parametrize("wanted", [-1, 513])
def test_a_rank_that_vllm_cannot_make_room_for(wanted: int) -> None:
    with pytest.raises(InvalidInput, match="APPLIANCE_ADAPTER_RANK"):
        VllmEngine(load_settings({}, adapter_rank=wanted), gpu=True)
