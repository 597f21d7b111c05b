"""Adapters of PEFT as changes to stored weights: what PEFT itself would merge, and what is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_model
from tiny_families import make_family
from transformers import AutoModelForCausalLM, GPT2Config

from appliance.adapters import CONFIG, WEIGHTS
from appliance.errors import InvalidInput
from appliance.release import weights
from appliance.release.adapter import read_changes, rounded_changes
from appliance.release.weights import layout, write_weights
from appliance.train.model import nf4_round_trip

IDS = torch.tensor([[1, 40, 60, 80, 100, 2], [1, 5, 15, 25, 35, 45]])
TIED = "model.embed_tokens.weight"
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tied` and `untied`, Llamas; `sharded`, the tied one in several files; `gpt2`, whose layers are Conv1D.

    `gpt2 as published` has the names of its publisher's files, without that of the body. Of mixtures of experts,
    `qwen3_moe` and `mixtral` have tensors of each expert in their files, `gpt_oss` one of all, as (inputs, outputs).
    """
    folder = tmp_path_factory.mktemp("bases")
    make_model(folder / "tied")
    model = AutoModelForCausalLM.from_pretrained(folder / "tied")
    model.save_pretrained(folder / "sharded", max_shard_size="100KB")
    model.config.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(model.config).save_pretrained(folder / "untied")
    config = GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_inner=96, initializer_range=0.2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "gpt2")
    shutil.copytree(folder / "gpt2", folder / "gpt2 as published")
    path = folder / "gpt2 as published" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    for family in ("qwen3_moe", "mixtral", "gpt_oss"):
        # Eleven: the numbers in their names are not in the order of letters.
        make_family(folder / family, family, **{"num_local_experts" if family != "qwen3_moe" else "num_experts": 11})
    return folder


def adapt(base: Path, folder: Path, **settings: Any) -> Path:
    """Save an adapter whose every trainable value is random."""
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **settings})
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for parameter in {id(p): p for p in model.parameters() if p.requires_grad}.values():
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (1 if parameter.ndim == 1 else 0))
        model.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model.eval()(IDS).logits
    return values


MERGEABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("tied", {"target_modules": ["q_proj", "down_proj"]}),
    "sharded": ("sharded", {"target_modules": ["q_proj", "up_proj"]}),
    "rslora": ("tied", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "dora": ("tied", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "patterns": (
        "tied",
        {
            "target_modules": ["q_proj", "k_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 8},
            "alpha_pattern": {"k_proj": 3},
        },
    ),
    "saved": ("tied", {"target_modules": ["q_proj"], "modules_to_save": ["norm", "k_proj"]}),
    "saved embeddings": ("untied", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    "head": ("untied", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding": ("untied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "dora embedding": ("untied", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}),
    "fan in fan out": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "names without the body's": ("gpt2 as published", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "each expert's": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "one of the experts'": ("mixtral", {"target_modules": [], "target_parameters": [EXPERTS[0]], "use_rslora": True}),
    "all experts'": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "patterns of experts": (
        "qwen3_moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": EXPERTS,
            "rank_pattern": {"experts.down_proj": 2},
            "alpha_pattern": {"layers.1.mlp.experts.gate_up_proj": 3},
        },
    ),
    "dora fan in": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "use_dora": True}),
}


@pytest.mark.parametrize("case", MERGEABLE)
def test_the_files_compute_what_the_adapter_does(
    bases: Path, tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_BLOCK", 1000)
    kind, settings = MERGEABLE[case]
    base = bases / kind
    adapter = adapt(base, tmp_path / "adapter", **settings)
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = logits(model)
    wanted = logits(PeftModel.from_pretrained(model, adapter))
    assert float((wanted - plain).abs().max()) > 0.1

    changes = read_changes(adapter, base)
    out = tmp_path / "out"
    out.mkdir()
    write_weights(base, out, changes)
    for path in base.glob("*.json"):
        (out / path.name).write_bytes(path.read_bytes())
    assert float((logits(AutoModelForCausalLM.from_pretrained(out)) - wanted).abs().max()) < 2e-4

    assert layout(out) == layout(base)
    for path in base.glob("*.safetensors"):
        before, after = load_file(path), load_file(out / path.name)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == changes.keys() & before.keys()
    assert len({shard for shard, _, _ in layout(out).values()}) == (1 if kind != "sharded" else 4)


def test_an_embedding_tied_to_the_head_is_changed_for_both(bases: Path, tmp_path: Path) -> None:
    """PEFT changes either side of a tied pair alike only when asked to, and only then can one tensor hold it."""
    targets = {"target_modules": ["q_proj", "embed_tokens"]}
    with pytest.raises(InvalidInput, match="are one tensor") as caught:
        read_changes(adapt(bases / "tied", tmp_path / "apart", **targets), bases / "tied")
    assert "ensure_weight_tying" in caught.value.next
    together = adapt(bases / "tied", tmp_path / "together", ensure_weight_tying=True, **targets)
    tensors = load_file(together / WEIGHTS)
    prefix = "base_model.model."
    tensors[f"{prefix}lm_head.lora_A.weight"] = tensors[f"{prefix}model.embed_tokens.lora_embedding_B"].T.contiguous()
    tensors[f"{prefix}lm_head.lora_B.weight"] = tensors[f"{prefix}model.embed_tokens.lora_embedding_A"].T.contiguous()
    save_file(tensors, together / WEIGHTS)
    assert TIED in read_changes(together, bases / "tied")
    whole = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    assert TIED in read_changes(adapt(bases / "tied", tmp_path / "whole", **whole), bases / "tied")


def test_rounding_goes_before_the_change_and_leaves_the_head_alone(bases: Path, tmp_path: Path) -> None:
    base = bases / "untied"
    changes = read_changes(adapt(base, tmp_path / "adapter", target_modules=["q_proj"], use_dora=True), base)
    rounded = rounded_changes(base, changes)
    write_weights(base, tmp_path, rounded)
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(after[name], changes[name](nf4_round_trip(before[name]), slice(0, 64)))
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(after[down], nf4_round_trip(before[down]))
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"])


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "trained biases": ("tied", {"bias": "all"}),
    "lora_bias": ("tied", {"lora_bias": True}),
    "single trained tokens": ("tied", {"trainable_token_indices": [1, 2]}),
    "begun with pissa": ("tied", {"init_lora_weights": "pissa"}),
    "lm_head.weight and model.embed_tokens.weight are one tensor": ("tied", {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_merged_is_named(bases: Path, tmp_path: Path, reason: str) -> None:
    kind, settings = REFUSED[reason]
    adapter = adapt(bases / kind, tmp_path / "adapter", **{"target_modules": ["q_proj"], **settings})
    with pytest.raises(InvalidInput, match=reason) as caught:
        read_changes(adapter, bases / kind)
    assert caught.value.code == "not_mergeable"


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PROMPT_TUNING"),
        (IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]), "IA3"),
    ],
)
def test_other_kinds_of_adapters_are_named(bases: Path, tmp_path: Path, config: Any, kind: str) -> None:
    get_peft_model(AutoModelForCausalLM.from_pretrained(bases / "tied"), config).save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match=f"PEFT's type {kind}"):
        read_changes(tmp_path, bases / "tied")


def edit(adapter: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(adapter / WEIGHTS)
    change(tensors)
    save_file(tensors, adapter / WEIGHTS)


LLAMA = "base_model.model.model"
Q = f"{LLAMA}.layers.0.self_attn.q_proj"
FLAT = torch.ones(4, 64)


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("no module model.layers.9.x_proj", lambda t: t.update({f"{LLAMA}.layers.9.x_proj.lora_A.weight": FLAT})),
        ("holds one factor only for model.layers.0.self_attn.q_proj", lambda t: t.pop(f"{Q}.lora_B.weight")),
        ("q_proj.weight has the shape", lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(80, 4)})),
        ("disagree on DoRA", lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(64)})),
        ("model.norm is a LlamaRMSNorm", lambda t: t.update({f"{LLAMA}.norm.lora_A.weight": FLAT})),
        ("no tensor model.other.weight", lambda t: t.update({f"{LLAMA}.other.weight": torch.ones(64)})),
        (
            "vocabulary was resized",
            lambda t: t.update(
                {
                    f"{LLAMA}.embed_tokens.lora_embedding_A": torch.ones(4, 328),
                    f"{LLAMA}.embed_tokens.lora_embedding_B": torch.ones(64, 4),
                    f"{LLAMA}.embed_tokens.base_layer.weight": torch.ones(328, 64),
                }
            ),
        ),
    ],
)
def test_what_does_not_fit_the_base_is_named(
    bases: Path, tmp_path: Path, reason: str, change: Callable[[dict[str, torch.Tensor]], None]
) -> None:
    adapter = adapt(bases / "untied", tmp_path / "adapter", target_modules=["q_proj"])
    edit(adapter, change)
    with pytest.raises(InvalidInput, match=reason):
        read_changes(adapter, bases / "untied")


def test_an_adapter_in_a_pickle_or_cut_short_is_refused(bases: Path, tmp_path: Path) -> None:
    adapter = adapt(bases / "tied", tmp_path / "adapter", target_modules=["q_proj"])
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInput, match="no usable"):
        read_changes(adapter, bases / "tied")
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(InvalidInput, match="no usable"):
        read_changes(adapter, bases / "tied")
    (adapter / CONFIG).write_text(json.dumps([]))
    with pytest.raises(InvalidInput):
        read_changes(adapter, bases / "tied")
