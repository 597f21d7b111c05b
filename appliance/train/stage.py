"""One training stage, from the previous stage's adapter to its own."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from appliance.data.dataset import Dataset, Row, prompt_messages
from appliance.data.render import render_prompt
from appliance.errors import InvalidInput
from appliance.home import Home, building, require_space
from appliance.models import count_parameters, model_path
from appliance.release.weights import require_present
from appliance.train.callbacks import Cadence, Guard, Reporter
from appliance.train.checkpoints import newest_whole
from appliance.train.dpo import DPO
from appliance.train.events import EventLog
from appliance.train.interruption import INTERRUPTED, Interruption
from appliance.train.kto import KTO
from appliance.train.model import (
    ON_GPU,
    add_adapter,
    load_adapter,
    load_model,
    load_tokenizer,
    quantised_modules,
    stop_token_ids,
)
from appliance.train.recipe import AnyStage, Recipe
from appliance.train.rows import HELD_OUT_ROWS, Example, tokenise
from appliance.train.sft import SFT
from appliance.train.trainer import Method

METHODS: dict[str, Method] = {"sft": SFT, "dpo": DPO, "kto": KTO}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
CHECKPOINTS_KEPT = 2
WITH_OPTIMISER = 3
"""A checkpoint holds each trained weight and AdamW's two moments of it."""
SAMPLES = 2
SAMPLE_TOKENS = 48


def train_stage(
    home: Home, run: Path, recipe: Recipe, name: str, events: EventLog, interruption: Interruption
) -> dict[str, Any]:
    """Train the stage `name` of a run, going on from its last whole checkpoint; leaves `adapter/` in its directory.

    Returns the stage's figures. Exits with INTERRUPTED after a checkpoint where that was asked for.
    Raises ApplianceError for what cannot be trained on or with.
    """
    base = model_path(home, recipe.base)
    recipe = recipe.for_base(count_parameters(base))
    stage = recipe.stage(name)
    folder = run / name
    tokenizer = load_tokenizer(base)
    dataset = Dataset.open(home, stage.dataset)
    train_rows, held_out_rows = dataset.split(recipe.eval_share)
    train, held_out = _examples(dataset, train_rows, held_out_rows[:HELD_OUT_ROWS], tokenizer, stage, events)
    figures: dict[str, Any] = {"rows": len(train), "held_out_rows": len(held_out)}

    adapter = folder / "adapter"
    model = load_model(base, quantised=recipe.adapter.kind == "qlora")
    if adapter.exists():
        model = load_adapter(model, adapter, trainable=False)
    else:
        model = _train(run, recipe, stage, base, model, tokenizer, train, held_out, events, interruption)
    stops = stop_token_ids(tokenizer, base)
    for row in (held_out_rows or train_rows)[:SAMPLES]:
        if not interruption.requested:
            _sample(model, tokenizer, stops, dataset.rows[row], name, events)
    return figures | _losses(events, name)


def _examples(
    dataset: Dataset,
    train_rows: list[int],
    held_out_rows: list[int],
    tokenizer: Any,
    stage: AnyStage,
    events: EventLog,
) -> tuple[list[Example], list[Example]]:
    method = METHODS[stage.method]
    if dataset.kind != method.kind:
        raise InvalidInput(
            "wrong_dataset_kind",
            f"{stage.method} trains on {method.kind} rows, and dataset {dataset.id} holds {dataset.kind} rows",
            f"name a {method.kind} dataset in stage {stage.name}, or change its method",
        )

    def row_example(row: dict[str, Any]) -> Example:
        return method.example(tokenizer, row)

    train, left_out = tokenise(dataset, train_rows, stage, row_example, method.length)
    held_out, left_out_too = tokenise(dataset, held_out_rows, stage, row_example, method.length)
    if left_out + left_out_too:
        message = f"{left_out + left_out_too} rows longer than {stage.max_length} tokens are left out"
        events.append("warning", stage.name, message=message)
    if not train:
        raise InvalidInput("no_rows", f"no row of {dataset.id} is left to train on", "raise max_length, or add rows")
    return train, held_out


def _train(
    run: Path,
    recipe: Recipe,
    stage: AnyStage,
    base: Path,
    model: Any,
    tokenizer: Any,
    train: list[Example],
    held_out: list[Example],
    events: EventLog,
    interruption: Interruption,
) -> Any:
    """The model with its trained adapter, which is saved."""
    folder = run / stage.name
    changed = quantised_modules(model) if recipe.adapter.kind == "qlora" else []
    previous = recipe.previous(stage.name)
    if previous:
        model = load_adapter(model, run / previous / "adapter", trainable=True)
    else:
        model = add_adapter(model, recipe.adapter, recipe.seed)
    require_present(base, {f"{module}.weight" for module in (*changed, *model.targeted_module_names)})
    trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    require_space(folder, trained + (CHECKPOINTS_KEPT + 1) * WITH_OPTIMISER * trained, "training")
    checkpoint = newest_whole(folder)
    arguments = _arguments(folder, recipe, stage, rows=len(train)) | {
        "eval_on_start": bool(held_out) and checkpoint is None
    }
    trainer = METHODS[stage.method].trainer(model, tokenizer, stage, arguments, train, held_out)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Guard(stage))
    trainer.add_callback(Reporter(events, stage))
    trainer.add_callback(Cadence(stage, interruption, evaluates=bool(held_out)))
    with interruption.deferred():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < trainer.state.max_steps:
            raise SystemExit(INTERRUPTED)
        with building(folder / "adapter") as saved:
            model.save_pretrained(saved, save_embedding_layers=False)
    return model


def _arguments(folder: Path, recipe: Recipe, stage: AnyStage, rows: int) -> dict[str, Any]:
    """Transformers' training arguments for `stage` over `rows` examples."""
    micro = stage.micro_batch_size or stage.batch_size
    steps = math.ceil(stage.epochs * math.ceil(rows / stage.batch_size))
    if stage.max_steps:
        steps = min(steps, stage.max_steps)
    return {
        "output_dir": str(folder),
        "seed": recipe.seed,
        "use_cpu": not ON_GPU,
        "bf16": ON_GPU,
        "gradient_checkpointing": ON_GPU,
        "dataloader_pin_memory": ON_GPU,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": stage.batch_size // micro,
        "max_steps": steps,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": SCHEDULES[stage.schedule],
        "warmup_steps": round(steps * stage.warmup_share),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "eval_strategy": "no",
        "save_strategy": "no",
        "save_total_limit": CHECKPOINTS_KEPT,
        "report_to": "none",
        "disable_tqdm": True,
    }


@torch.inference_mode()
def _sample(model: Any, tokenizer: Any, stops: list[int], row: Row, name: str, events: EventLog) -> None:
    """Say how the model answers the prompt of `row` now, greedily and briefly."""
    messages = prompt_messages(row)
    prompt = torch.tensor([render_prompt(tokenizer, messages, row.get("tools"))], device=model.device)
    model.eval()
    answer = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=False,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )
    text = tokenizer.decode(answer[0, prompt.shape[1] :], skip_special_tokens=True)
    events.append("sample", name, prompt=messages[-1]["content"], text=text)


def _losses(events: EventLog, name: str) -> dict[str, float]:
    """The last training loss, and the held-out loss before and after, from what the stage has reported."""
    reported = [event for event in events.read() if event["stage"] == name]
    steps = [event["loss"] for event in reported if event["event"] == "step"]
    evals = [event["loss"] for event in reported if event["event"] == "eval"]
    losses = {"train_loss": steps[-1]}
    if evals:
        losses |= {"held_out_loss_before": evals[0], "held_out_loss": evals[-1]}
    return losses
