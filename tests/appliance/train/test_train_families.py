"""Models of other builds than a Llama's, from the first step to the gates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import add_run, events, make_model, result, stage, work
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from appliance.home import Home

TEXT: dict[str, Any] = {
    **{"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2},
    **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
}
VISION = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 8, "patch_size": 4},
}


def seeing() -> Any:
    config = Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=319, **{"eos_token_id": 0}
    )
    return Gemma3ForConditionalGeneration(config)


def experts() -> Any:
    """Whose routers have a loss of their own, and whose first layer has no experts."""
    config = Qwen3MoeConfig(
        **TEXT,
        mlp_only_layers=[0],
        moe_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
    )
    return Qwen3MoeForCausalLM(config)


def sinks() -> Any:
    return GptOssForCausalLM(GptOssConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2, sliding_window=16))


def transposed() -> Any:
    config = GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "text and images": seeing,
    "experts": experts,
    "experts and sinks": sinks,
    "transposed layers": transposed,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_from_its_first_step_to_the_gates(home: Home, family: str) -> None:
    torch.manual_seed(3)
    base = make_model(home.models / "other", model=FAMILIES[family]())
    stages = stage("sft", "FACTS", epochs=2) + stage("dpo", "PREFERENCES", epochs=1)
    run = add_run(home, "r", stages, base="other")
    assert work(run, "sft", "dpo", "merge", "verify") == 0
    assert events(run, "sample")
    assert events(run, "forecast")
    assert not events(run, "warning")
    gates = result(run, "verify")["gates"]
    assert all(gate["passed"] for gate in gates.values()), gates
    before, after = (
        {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
        for folder in (base, run / "merge" / "model")
    )
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert before.keys() == after.keys()
    assert changed
    assert not {name for name in changed if "vision" in name or "expert" in name or "router" in name}


def test_qlora_of_layers_that_nf4_does_not_hold_is_refused(home: Home) -> None:
    make_model(home.models / "other", model=transposed())
    run = add_run(home, "r", stage("sft", "FACTS"), base="other", kind="qlora")
    assert work(run, "sft") == 1
    assert "no linear layer that NF4 can hold" in (run / "sft" / "failure.json").read_text()


def test_an_architecture_that_cannot_be_forecast_is_trained(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("data-dependent")

    monkeypatch.setattr("appliance.train.forecast.simulate", fail)
    run = add_run(home, "r", stage("sft", "FACTS", epochs=1))
    assert work(run, "sft") == 0
    assert not events(run, "forecast")
    (warning,) = events(run, "warning")
    assert warning["message"] == "there is no forecast for this architecture: RuntimeError: data-dependent"
    assert "memory_forecast" not in result(run, "sft")


def test_sample_answers_that_fail_end_no_run(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no cache")

    monkeypatch.setattr("appliance.train.samples.Samples._answers", fail)
    run = add_run(home, "r", stage("sft", "FACTS", epochs=1))
    assert work(run, "sft") == 0
    assert not events(run, "sample")
    assert {event["message"] for event in events(run, "warning")} == {
        "no sample answers this time: ValueError: no cache"
    }


def test_a_base_that_is_a_directory_is_read_as_it_was_published(home: Home) -> None:
    base: Path = make_model(home.models / "other", model=seeing())
    stored = {name for path in base.glob("*.safetensors") for name in load_file(path)}
    assert any(name.startswith("language_model.model.") for name in stored), "named as on the Hub"
