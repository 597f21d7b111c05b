"""Each setting of a recipe does what it says."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import FACTS, PREFERENCES, add_run, events, failure, read_recipe, stage, work

from appliance.data.tokenizer import load_tokenizer
from appliance.home import Home
from appliance.train.examples import Examples
from appliance.train.interruption import Interruption
from appliance.train.micro_batches import MicroBatchLimit
from appliance.train.model import add_adapter, load_model, targeted_modules
from appliance.train.stage import METHODS, _arguments
from appliance.train.trainer import MicroBatchTrainer, TrainerInputs


def trainer(home: Home, folder: Path, method: str = "sft", steps: int = 10, **settings: Any) -> MicroBatchTrainer:
    run = add_run(home, f"r{len(list(home.runs.iterdir()))}", stage(method, "FACTS", max_steps=steps, **settings))
    recipe = read_recipe(run)
    tokenizer = load_tokenizer(home.models / "tiny")
    model: PeftModel = add_adapter(load_model(home.models / "tiny"), recipe.adapter, 3)
    rows = FACTS if method == "sft" else PREFERENCES
    found = [example for row in rows for example in METHODS[method].examples(tokenizer, row)]
    examples = Examples.of(found, METHODS[method])
    arguments = _arguments(folder, recipe, recipe.stages[0], len(examples))
    given = TrainerInputs(model, tokenizer, examples, examples, MicroBatchLimit(), Interruption())
    built: MicroBatchTrainer = METHODS[method].trainer(recipe.stages[0], arguments, given)
    built.create_optimizer_and_scheduler(steps)
    return built


def test_adamw_has_the_recipes_decay_and_betas_and_moves_nothing_beforehand(home: Home, tmp_path: Path) -> None:
    built = trainer(home, tmp_path, weight_decay=0.3, adam_betas=(0.8, 0.95), learning_rate=0.01)
    (group,) = (group for group in built.optimizer.param_groups if group["params"])
    assert (group["weight_decay"], group["betas"], group["lr"]) == (0.3, (0.8, 0.95), 0.01)
    fresh = add_adapter(load_model(home.models / "tiny"), read_recipe(home.runs / "r0").adapter, 3)
    for (name, weight), (_, other) in zip(built.model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(weight, other), name


def test_factors_b_learn_faster_by_the_ratio_of_loraplus(home: Home, tmp_path: Path) -> None:
    built = trainer(home, tmp_path, loraplus_ratio=16, learning_rate=0.001, warmup_share=0.0, schedule="constant")
    names = {id(weight): name for name, weight in built.model.named_parameters()}
    rates = {names[id(weight)]: group["lr"] for group in built.optimizer.param_groups for weight in group["params"]}
    assert len(rates) == 2 * 14
    assert {rate for name, rate in rates.items() if ".lora_A." in name} == {0.001}
    assert {rate for name, rate in rates.items() if ".lora_B." in name} == {0.016}
    assert {len(state) for state in built.optimizer.state.values()} == {3}, "those that were moved have moments too"


@pytest.mark.parametrize(
    ("schedule", "at"),
    [
        ("cosine", lambda done: (1 + math.cos(math.pi * done)) / 2),
        ("linear", lambda done: 1 - done),
        ("constant", lambda done: 1),
    ],
)
def test_the_learning_rate_rises_over_the_warm_up_and_falls_by_the_schedule(home: Home, schedule: str, at: Any) -> None:
    settings = {"warmup_share": 0.3, "schedule": schedule, "learning_rate": 0.01, "max_steps": 20}
    run = add_run(home, "r", stage("sft", "FACTS", **settings, epochs=20, evaluate_every=50))
    assert work(run, "sft") == 0
    rates = [event["lr"] for event in events(run, "step")]
    expected = [0.01 * step / 6 for step in range(6)] + [0.01 * at((step - 6) / 14) for step in range(6, 20)]
    assert rates == pytest.approx(expected)


def gradients(built: MicroBatchTrainer) -> float:
    """The norm of the gradients that a first step of the optimiser is given."""
    seen: list[float] = []
    built.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(norm(optimizer)))

    def norm(optimizer: torch.optim.Optimizer) -> float:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        return float(torch.stack([weight.grad.norm() for weight in weights if weight.grad is not None]).norm())

    built.train()
    return seen[0]


def test_gradients_are_clipped_at_the_recipes_norm_or_never(home: Home, tmp_path: Path) -> None:
    free = gradients(trainer(home, tmp_path, steps=1, max_grad_norm=0))
    assert gradients(trainer(home, tmp_path, steps=1, max_grad_norm=free / 4)) == pytest.approx(free / 4, rel=1e-3)
    assert gradients(trainer(home, tmp_path, steps=1, max_grad_norm=4 * free)) == pytest.approx(free, rel=1e-4)


def test_noise_on_the_embeddings_is_there_while_training_only(home: Home, tmp_path: Path) -> None:
    seen: list[tuple[bool, torch.Tensor]] = []
    built = trainer(home, tmp_path, steps=1, neftune_alpha=5)
    layer = built.model.get_base_model().model.layers[0]
    layer.register_forward_pre_hook(lambda module, arguments: seen.append((module.training, arguments[0].detach())))
    embedding = built.model.get_base_model().get_input_embeddings()
    ids: list[torch.Tensor] = []
    embedding.register_forward_pre_hook(lambda module, arguments: ids.append(arguments[0]))
    built.train()
    built.evaluate()
    off = {
        training: float((hidden - embedding.weight[tokens]).abs().max())
        for (training, hidden), tokens in zip(seen, ids, strict=True)
    }
    width = max(tokens.shape[1] for (training, _), tokens in zip(seen, ids, strict=True) if training)
    assert off[False] == 0
    assert 0.5 * 5 / math.sqrt(width * 64) < off[True] <= 5 / math.sqrt(min(t.shape[1] for t in ids) * 64)


def test_rows_with_noise_are_not_packed(home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("appliance.train.sft.can_pack", lambda *_: True)
    packs = {alpha: trainer(home, tmp_path, steps=1, neftune_alpha=alpha).packs for alpha in (0, 5)}  # type: ignore[attr-defined]
    assert packs == {0: True, 5: False}


def test_only_the_layers_that_the_recipe_names_are_trained(home: Home) -> None:
    for layers, expected in (((-1,), {"1"}), ((0,), {"0"}), ((0, 1), {"0", "1"}), ((), {"0", "1"})):
        run = add_run(home, f"r{''.join(map(str, layers))}", stage("sft", "FACTS", max_steps=1))
        text = (run / "recipe.toml").read_text()
        (run / "recipe.toml").write_text(text.replace("layers = []", f"layers = {list(layers)}"))
        assert work(run, "sft") == 0
        names = load_file(run / "sft" / "adapter" / "adapter_model.safetensors")
        assert {name.split(".layers.")[1].split(".")[0] for name in names} == expected


def test_a_layer_that_there_is_not_is_refused(home: Home) -> None:
    run = add_run(home, "r", stage("sft", "FACTS"))
    text = (run / "recipe.toml").read_text()
    (run / "recipe.toml").write_text(text.replace("layers = []", "layers = [2]"))
    assert work(run, "sft") != 0
    assert failure(run, "sft")["reason"] == "the adapter's layer 2 is none of the base model"
    assert failure(run, "sft")["next"] == "choose from 0 to 1, or from -2 to -1"


def test_layers_are_counted_from_either_end(home: Home) -> None:
    model = load_model(home.models / "tiny")
    found = targeted_modules(model, ("q_proj",), (-2, 1))
    assert found == {f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)}


def test_on_a_gpu_the_adapters_inputs_are_no_copies_in_fp32(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast has the products in bf16, and what PEFT would cast for them is kept for the backward pass."""
    monkeypatch.setattr("appliance.train.model.DTYPE", torch.bfloat16)
    monkeypatch.setattr("appliance.train.trainer.ON_GPU", True)
    monkeypatch.setattr("appliance.train.stage.ON_GPU", True)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    built = trainer(home, tmp_path)
    seen = set()
    for name, module in built.model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda _, given: seen.add(given[0].dtype))
    batch = next(iter(built.get_train_dataloader()))
    (inputs,), items = built.get_batch_samples(iter([batch]), 1, built.args.device)
    built.training_step(built.accelerator.prepare_model(built.model), inputs, items)
    assert seen == {torch.bfloat16}
    layers = [module for module in built.model.modules() if hasattr(module, "cast_input_dtype_enabled")]
    assert layers
    assert all(layer.cast_input_dtype_enabled for layer in layers), "as generation without autocast needs it"
