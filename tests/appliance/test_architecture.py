"""What is inside base models of every build: images, experts, Mamba, stored under other names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_families import make_family
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    Mamba2Config,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from appliance.architecture import (
    Architecture,
    empty_model,
    linear_modules,
    named_together,
    quantised_modules,
    require_mergeable,
)
from appliance.errors import InvalidInput

TEXT: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8},
    **{"num_attention_heads": 2, "num_key_value_heads": 1},
}
VISION = {
    **{"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"image_size": 8, "patch_size": 4},
}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of text and images as it is published: its text is stored under other names than the model's."""
    folder = tmp_path_factory.mktemp("models") / "seeing"
    config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "experts"
    config = Qwen3MoeConfig(**TEXT, moe_intermediate_size=8, num_experts=2, num_experts_per_tok=1)
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_model_is_of_the_class_that_it_was_published_as(seeing: Path) -> None:
    assert type(empty_model(seeing)) is Gemma3ForConditionalGeneration


def test_only_layers_of_text_are_adapted(seeing: Path) -> None:
    model = empty_model(seeing)
    found = linear_modules(model)
    assert {name.rpartition(".")[2] for name in found} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert all(name.startswith("model.language_model.layers.0.") for name in found)
    assert any("vision_tower" in name and name.endswith("q_proj") for name, _ in model.named_modules())


def test_names_that_a_tower_has_too_are_told_by_a_pattern(seeing: Path, experts: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = empty_model(seeing)
    meant = set(linear_modules(model))
    settings = named_together(model, meant)
    assert isinstance(settings, str)
    adapted = inject_adapter_in_model(LoraConfig(target_modules=settings), model, low_cpu_mem_usage=True)
    assert {name.removesuffix(".lora_A") for name, _ in adapted.named_modules() if name.endswith(".lora_A")} == meant
    model = empty_model(experts)
    assert named_together(model, set(linear_modules(model))) == ["k_proj", "o_proj", "q_proj", "v_proj"]


def test_parameters_are_found_under_the_names_that_files_have(seeing: Path) -> None:
    stored = {name for path in seeing.glob("*.safetensors") for name in load_file(path)}
    architecture = Architecture(seeing)
    for module in linear_modules(architecture.skeleton):
        (name,) = architecture.stored([f"{module}.weight"])
        assert name in stored
        assert name != f"{module}.weight"
    tied = architecture.tied("lm_head.weight")
    assert tied == {"lm_head.weight", "model.language_model.embed_tokens.weight"}
    assert set(architecture.stored(tied)) <= stored


def test_a_prefix_that_files_leave_out_is_no_matter(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    architecture = Architecture(tmp_path)
    assert architecture.stored(["transformer.h.0.attn.c_attn.weight"]) == ["h.0.attn.c_attn.weight"]
    assert "transformer.h.0.attn.c_attn" in linear_modules(architecture.skeleton)
    assert quantised_modules(architecture.skeleton) == []


def test_experts_are_made_of_several_tensors_and_not_merged(experts: Path) -> None:
    architecture = Architecture(experts)
    with pytest.raises(InvalidInput, match="is made of other tensors in the files") as caught:
        architecture.stored(["model.layers.0.mlp.experts.gate_up_proj"])
    assert caught.value.code == "not_mergeable"


def test_what_kernels_take_the_weights_of_is_left_alone(tmp_path: Path) -> None:
    config = Mamba2Config(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4, num_heads=4, head_dim=8, n_groups=1
    )
    config.save_pretrained(tmp_path)
    names = {name.rpartition(".")[2] for name in linear_modules(empty_model(tmp_path))}
    assert "in_proj" in names
    assert "out_proj" not in names


def test_a_model_that_answers_no_texts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}')
    with pytest.raises(InvalidInput, match="does not answer texts") as caught:
        empty_model(tmp_path)
    assert caught.value.code == "unsupported_architecture"
    (tmp_path / "config.json").write_text('{"model_type": "unheard_of"}')
    with pytest.raises(InvalidInput) as caught:
        empty_model(tmp_path)
    assert caught.value.code == "bad_model"


@pytest.mark.parametrize(("family", "without"), [("deepseek_v4", "o_a_proj"), ("phimoe", "router")])
def test_layers_that_answer_more_than_a_product_are_not_adapted(tmp_path: Path, family: str, without: str) -> None:
    model = empty_model(make_family(tmp_path / "base", family))
    assert any(name.endswith(without) for name, _ in model.named_modules())
    found = linear_modules(model)
    assert found
    assert not any(name.endswith(without) for name in found)


def test_gpt_neox_reads_forwards_whatever_its_config_says(tmp_path: Path) -> None:
    require_mergeable(make_family(tmp_path / "base", "gpt_neox"))
    with pytest.raises(InvalidInput, match="a model of the type bert does not go on with a text"):
        require_mergeable(make_family(tmp_path / "bert", "bert"))


def test_a_linear_layer_of_a_models_own_is_one(tmp_path: Path) -> None:
    found = linear_modules(empty_model(make_family(tmp_path / "base", "falcon")))
    assert {name.rpartition(".")[2] for name in found} >= {"query_key_value", "dense"}
