"""Packed rows train as padded ones do, see nothing of each other, and are refused where that cannot be had."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FACTS, add_run, events, read_recipe, stage, work
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, MistralConfig

from appliance.data.tokenizer import load_tokenizer
from appliance.home import Home
from appliance.train import packing, sft
from appliance.train.examples import Examples
from appliance.train.interruption import Interruption
from appliance.train.micro_batches import MicroBatchLimit
from appliance.train.model import add_adapter, load_model
from appliance.train.packing import attend, can_pack, fault_of_packing, pack, rows_apart
from appliance.train.recipe import Adapter
from appliance.train.rows import IGNORED
from appliance.train.sft import SFT
from appliance.train.stage import _arguments
from appliance.train.trainer import MicroBatchTrainer, TrainerInputs


def kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    key_bounds: torch.Tensor,
    longest: int,
    longest_key: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What torch's varlen_attn computes, on any device, a row at a time."""
    assert key_bounds is bounds
    assert longest == longest_key == int(bounds.diff().max())
    left, right = window_size
    assert right == 0
    rows = []
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        q, k, v = (heads[start:end].transpose(0, 1) for heads in (query, key, value))
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (back >= 0) & ((back <= left) | (left < 0))
        rows.append(scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa).transpose(0, 1))
    return torch.cat(rows)


def test_rows_follow_each_other_and_nothing_predicts_a_first_token() -> None:
    padded = {
        "input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]),
        "labels": torch.tensor([[5, IGNORED, 7], [8, 9, IGNORED]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
    }
    packed = pack(padded)
    assert packed["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert packed["labels"].tolist() == [[IGNORED, IGNORED, 7, IGNORED, 9]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert packed["cu_seq_lens_q"].tolist() == packed["cu_seq_lens_k"].tolist() == [0, 3, 5]
    assert packed["cu_seq_lens_q"].dtype == torch.int32, "which the kernel asks for"
    assert packed["max_length_q"] == packed["max_length_k"] == 3


@pytest.fixture
def trainer(home: Home, tmp_path: Path) -> MicroBatchTrainer:
    """One whose adapter is no longer zero."""
    recipe = read_recipe(add_run(home, "r", stage("sft", "FACTS", batch_size=6)))
    tokenizer = load_tokenizer(home.models / "tiny")
    model = add_adapter(load_model(home.models / "tiny"), recipe.adapter, 3)
    examples = Examples.of([example for row in FACTS for example in SFT.examples(tokenizer, row)], SFT)
    given = TrainerInputs(model, tokenizer, examples, examples, MicroBatchLimit(), Interruption())
    built: MicroBatchTrainer = SFT.trainer(
        recipe.stages[0], _arguments(tmp_path, recipe, recipe.stages[0], len(examples)), given
    )
    torch.manual_seed(4)
    with torch.no_grad():
        for weight in built.model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    built.create_optimizer_and_scheduler(1)
    return built


@pytest.fixture(params=["sdpa", "eager", "kernel"])
def packed(request: pytest.FixtureRequest, trainer: MicroBatchTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs the rows for Transformers' own attention, which masks them, or for ours."""
    monkeypatch.setattr(packing, "varlen_attn", kernel)
    if request.param != "kernel":
        trainer.model.set_attn_implementation(request.param)
        monkeypatch.setattr(sft, "rows_apart", nullcontext)


def batch_of(trainer: MicroBatchTrainer) -> tuple[dict[str, torch.Tensor], Any]:
    (batch,), items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    return batch, items


def step(trainer: MicroBatchTrainer, batch: dict[str, torch.Tensor], items: Any) -> tuple[float, list[torch.Tensor]]:
    loss = trainer.training_step(trainer.model, batch, items)
    return float(loss), [weight.grad.clone() for weight in trainer.model.parameters() if weight.grad is not None]


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("tokens", [40, 10_000])
def test_loss_and_gradient_are_those_of_padded_rows(trainer: MicroBatchTrainer, tokens: int) -> None:
    trainer.limit.tokens = tokens
    batch, items = batch_of(trainer)
    assert (batch["attention_mask"] == 0).any()
    padded, expected = step(trainer, batch, items)
    held_out = trainer.evaluate()["eval_loss"]
    trainer.packs = True  # type: ignore[attr-defined]  # of sft's trainer
    assert {part["input_ids"].shape[0] for part, _ in trainer.micro_batches(batch)} == {1}
    loss, gradients = step(trainer, batch, items)
    assert loss == pytest.approx(padded, abs=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(held_out, abs=1e-5)
    assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-3
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("packed")
def test_a_token_of_one_row_changes_nothing_in_the_loss_of_another(trainer: MicroBatchTrainer) -> None:
    trainer.packs = True  # type: ignore[attr-defined]  # of sft's trainer
    batch, items = batch_of(trainer)
    batch["labels"][[0, 1, 2, 4, 5]] = IGNORED
    loss, gradients = step(trainer, batch, items)
    for row in (0, 1, 2, 4, 5):
        other = batch["input_ids"].clone()
        other[row, 4] = 99
        changed, moved = step(trainer, {**batch, "input_ids": other}, items)
        assert changed == loss
        assert all(torch.equal(one, before) for one, before in zip(moved, gradients, strict=True))
    batch["input_ids"][3, 4] = 99
    assert step(trainer, batch, items)[0] != loss


def test_training_and_evaluation_both_go_through_the_kernel(
    trainer: MicroBatchTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []

    def counted(query: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        used.append(len(query))
        return kernel(query, *arguments, **named)

    monkeypatch.setattr(packing, "varlen_attn", counted)
    trainer.packs = True  # type: ignore[attr-defined]  # of sft's trainer
    step(trainer, *batch_of(trainer))
    assert used
    used.clear()
    trainer.evaluate()
    assert used


@pytest.mark.parametrize("window", [3, 64])
def test_a_sliding_window_is_that_of_the_model(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(packing, "varlen_attn", kernel)
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=64, num_key_value_heads=2, sliding_window=window, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(0, 64, (2, 12))
    batch = pack({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)})
    with torch.no_grad():
        expected = model(ids).logits.flatten(0, 1)
        with rows_apart(model):
            logits = model(**batch).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_torchs_kernel_takes_what_it_is_given() -> None:
    """On the meta device, where it checks its arguments and computes nothing."""
    query, key, value = (
        torch.empty(1, heads, 10, 16, device="meta", dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2, 2)
    )
    bounds = torch.empty(3, device="meta", dtype=torch.int32)
    out, _ = attend(None, query, key, value, None, cu_seq_lens_q=bounds, max_length_q=6, scaling=0.25, sliding_window=4)
    assert out.shape == (1, 10, 4, 16)
    out.sum().backward()
    assert query.grad is not None
    assert value.grad is not None
    assert (query.grad.shape, value.grad.shape) == (query.shape, value.shape)


def model_of(tiny_model: Path, **adapter: Any) -> Any:
    return add_adapter(load_model(tiny_model), Adapter(kind="lora", rank=4, **adapter), 3)


def test_a_model_whose_rows_stay_apart_can_be_packed(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "varlen_attn", kernel)
    model = model_of(tiny_model, dropout=0.5)
    assert fault_of_packing(model) == ""
    assert not any(weight.grad is not None for weight in model.parameters())


def leaking(query: Any, key: Any, value: Any, bounds: torch.Tensor, *_: Any, **named: Any) -> torch.Tensor:
    whole = bounds[[0, -1]]
    return kernel(query, key, value, whole, whole, len(query), len(query), **named)


def unscaled(*arguments: Any, **named: Any) -> torch.Tensor:
    return kernel(*arguments, **{**named, "scale": 1.0})


@pytest.mark.parametrize(
    ("attention", "fault"),
    [(leaking, "not stay apart"), (unscaled, "differs from the same row alone"), (None, "refuses")],
)
def test_a_model_that_fails_the_trial_is_refused(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, attention: Any, fault: str
) -> None:
    if attention:
        monkeypatch.setattr(packing, "varlen_attn", attention)
    model = model_of(tiny_model)
    assert fault in fault_of_packing(model)
    assert model.config._attn_implementation == "sdpa"


def test_what_the_kernel_leaves_out_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "varlen_attn", kernel)
    model = model_of(tiny_model)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    assert "dropout" in fault_of_packing(model)
    monkeypatch.setattr(type(model.get_base_model()), "_supports_flash_attn", False)
    assert "needs masks" in fault_of_packing(model)


def test_a_lack_of_memory_is_no_reason_to_pad(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(packing, "varlen_attn", full)
    with pytest.raises(torch.OutOfMemoryError):
        fault_of_packing(model_of(tiny_model))


def test_a_cpu_pads_and_says_nothing(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "varlen_attn", kernel)
    said: list[Any] = []
    assert not can_pack(model_of(tiny_model), said.append)
    assert said == []


def test_where_the_kernel_refuses_a_run_says_so_once_and_trains_padded(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = stage("sft", "FACTS", max_steps=3)
    plain, refused, packing_run = (add_run(home, id, settings) for id in ("plain", "refused", "packing"))
    work(plain, "sft")
    monkeypatch.setattr(packing, "ON_GPU", True)
    work(refused, "sft")
    widths: list[int] = []

    def watched(query: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        widths.append(len(query))
        return kernel(query, *rest, **options)

    monkeypatch.setattr(packing, "varlen_attn", watched)
    work(packing_run, "sft")
    (warning,) = events(refused, "warning")
    assert warning["message"].startswith("rows are padded instead of packed: the attention kernel refuses")
    assert not events(packing_run, "warning")
    taken = [[event["loss"] for event in events(run, "step")] for run in (plain, refused, packing_run)]
    assert taken[1] == taken[0]
    assert taken[2] == pytest.approx(taken[0], abs=1e-4)
    assert len(set(widths)) > 1, "more than the trial was packed"
