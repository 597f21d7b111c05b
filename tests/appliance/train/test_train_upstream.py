"""What the training room stands on in Transformers, TRL and PEFT: each goes red when that changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset as Table
from peft import LoraConfig, get_peft_model
from tiny import FACTS
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainerCallback, TrainingArguments
from trl import DPOTrainer, KTOTrainer, SFTConfig, SFTTrainer

from appliance.train.trainer import MicroBatchTrainer

PRIVATE = {
    "_save_checkpoint": "the only way to write a checkpoint elsewhere first, so that it is whole or absent",
    "_prepare_dataset": "TRL's, which would tokenise again",
    "_compute_kl_logps": "TRL's, whose mean over a micro-batch is one over the step here",
}
"""Private methods of the trainers above ours that are overridden, and why."""


class Ours(MicroBatchTrainer, SFTTrainer):
    """As the methods mix it."""


def test_no_other_private_method_is_overridden() -> None:
    from appliance.train.dpo import _Trainer as Dpo
    from appliance.train.kto import _Trainer as Kto
    from appliance.train.sft import _Trainer as Sft

    overridden = {
        name
        for kind in (MicroBatchTrainer, Sft, Dpo, Kto)
        for name in vars(kind)
        if name.startswith("_") and not name.startswith("__")
        if any(hasattr(above, name) for above in (Trainer, SFTTrainer, DPOTrainer, KTOTrainer))
    }
    assert overridden == PRIVATE.keys()


class Steps(Trainer):
    """Plain steps of which the loss is told."""

    calls: list[tuple[Any, Any]]
    returned: list[float]

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        self.calls.append((inputs, num_items_in_batch))
        loss = super().training_step(model, inputs, num_items_in_batch)
        return torch.full_like(loss, self.returned.pop(0)) if self.returned else loss


def model() -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=32,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
    )


ROWS = [{"input_ids": [1, 2, 3, number], "labels": [1, 2, 3, number]} for number in range(4, 16)]


def steps(folder: Path, returned: tuple[float, ...] = (), callbacks: tuple[Any, ...] = (), **settings: Any) -> Steps:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=3,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **{"save_strategy": "no", **settings},
    )
    trainer = Steps(model=model(), args=arguments, train_dataset=ROWS, callbacks=list(callbacks))
    trainer.calls, trainer.returned = [], list(returned)
    trainer.train()
    return trainer


def test_a_training_step_is_given_the_rows_of_an_optimiser_step_and_how_many_labels_are_predicted(
    tmp_path: Path,
) -> None:
    trainer = steps(tmp_path)
    assert [len(inputs["input_ids"]) for inputs, _ in trainer.calls] == [4, 4, 4]
    assert [int(items) for _, items in trainer.calls] == [12, 12, 12], "of each row all labels but the first"


def test_a_loss_that_is_nan_stays_in_transformers_sum_for_all_later_steps(tmp_path: Path) -> None:
    """So ours never returns one; once this is mended it may."""
    trainer = steps(tmp_path, returned=(float("nan"),))
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [loss != loss for loss in logged] == [True, True, True]


def test_gradients_can_be_taken_away_between_clipping_and_the_optimisers_step(tmp_path: Path) -> None:
    """What leaves out a step whose gradients are NaN: the weights of that step, and their moments, stay."""

    class Away(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            model.zero_grad()

    before = model().state_dict()
    after = steps(tmp_path, callbacks=(Away(),)).model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())
    moved = steps(tmp_path).model.state_dict()
    assert not all(torch.equal(weight, moved[name]) for name, weight in before.items())


def test_a_checkpoint_is_written_in_the_output_directory_of_that_moment(tmp_path: Path) -> None:
    trainer = steps(tmp_path / "one")
    trainer.args.output_dir = str(tmp_path / "two")
    trainer._save_checkpoint(trainer.model, None)
    written = {path.name for path in (tmp_path / "two" / "checkpoint-3").iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "model.safetensors"} <= written


def test_trls_head_gives_log_probabilities_of_the_counted_tokens(tmp_path: Path) -> None:
    """Shifted by one, zero where a token does not count: what losses, rewards and gates are made of."""
    config = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_length=None)
    rows = [{"input_ids": [1, 2, 3, 4], "attention_mask": [1, 1, 1, 1], "labels": [-100, 2, -100, 4]}]
    trainer = SFTTrainer(model=model(), args=config, train_dataset=Table.from_list(FACTS), processing_class=tokenizer())
    seen: list[Any] = []
    trainer.model.register_forward_hook(lambda module, arguments, output: seen.append(output))
    inputs = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
    trainer.compute_loss(trainer.model, inputs)
    found = seen[0].log_probs
    logits = trainer.model(input_ids=inputs["input_ids"]).logits.log_softmax(-1)[0]
    assert seen[0].label_mask.tolist() == [[True, False, True]]
    assert found[0].tolist() == pytest.approx([float(logits[0, 2]), 0.0, float(logits[2, 4])], abs=1e-5)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1}, unk_token="<unk>"))
    made = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def test_peft_takes_dense_layers_beside_experts_for_experts() -> None:
    """Why those are left out of the targets of a mixture of experts; once this is mended they can be trained."""
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        moe_intermediate_size=8,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        mlp_only_layers=[0],
    )
    settings = LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], r=2)
    adapted = get_peft_model(AutoModelForCausalLM.from_config(config), settings)
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert any(".layers.1.mlp.experts." in name for name in trained)
    assert not any(".layers.0.mlp." in name for name in trained)
