"""One training stage, from the adapter that it goes on with to its own."""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PrinterCallback

from appliance.adapters import WEIGHTS
from appliance.architecture import quantised_modules
from appliance.data.dataset import Dataset
from appliance.data.tokenizer import load_tokenizer
from appliance.errors import InvalidInput
from appliance.home import Home, building, require_space, sha256
from appliance.models import count_parameters, model_path
from appliance.release.adapter import require_present
from appliance.release.peft_format import ADAPTER_SHA256
from appliance.train import products
from appliance.train.answers import is_displaced
from appliance.train.best import Best
from appliance.train.callbacks import Cadence, Reporter, is_evaluated
from appliance.train.checkpoints import KEPT, newest_usable, origin, step_of
from appliance.train.dpo import DPO
from appliance.train.events import EventLog
from appliance.train.examples import Examples, chosen, tokenised
from appliance.train.fit import require_fit
from appliance.train.forecast import Forecast, NoForecast, Size, Work, forecast_stage
from appliance.train.fused import fuse
from appliance.train.guard import Diverged, Guard
from appliance.train.interruption import INTERRUPTED, Interrupted, Interruption
from appliance.train.kto import KTO
from appliance.train.micro_batches import MicroBatchLimit
from appliance.train.model import (
    ON_GPU,
    add_adapter,
    load_adapter,
    load_model,
    require_covered,
    settle_router_loss,
    stop_token_ids,
    targeted_modules,
    targeted_parameters,
)
from appliance.train.recipe import AnyStage, Recipe
from appliance.train.rows import HELD_OUT_ROWS
from appliance.train.samples import Samples
from appliance.train.sft import SFT
from appliance.train.trainer import Method, TrainerInputs

METHODS: dict[str, Method] = {"sft": SFT, "dpo": DPO, "kto": KTO}
SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
WITH_OPTIMISER = 3
"""A checkpoint holds each trained weight and AdamW's two moments of it."""


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
    tokenizer = load_tokenizer(base, recipe.template)
    dataset = Dataset.open(home, stage.dataset)
    require_fit(stage, dataset, recipe.base)
    train_rows, held_out_rows = dataset.split(recipe.eval_share)
    evaluated = held_out_rows[:HELD_OUT_ROWS]
    train, held_out, left_out = _examples(home, dataset, (train_rows, evaluated), base, recipe, stage)
    if any(left_out):
        message = f"{sum(left_out)} rows longer than {stage.max_length} tokens are left out"
        events.append("warning", stage.name, message=message)
    rows, rows_held_out = len(train_rows) - left_out[0], len(evaluated) - left_out[1]
    figures: dict[str, Any] = {"rows": rows, "held_out_rows": rows_held_out}

    if not (folder / "adapter").exists():
        prompts = [dataset.rows[row] for row in (held_out_rows or train_rows)[: stage.samples]]
        samples = Samples(tokenizer, stop_token_ids(tokenizer, base), prompts, events, name)
        _train(run, recipe, stage, base, tokenizer, train, held_out, samples, events, interruption)
    for leftover in folder.glob("best-*"):
        shutil.rmtree(leftover)
    said = [event for event in events.read() if event["stage"] == stage.name]
    figures |= _losses(said, stage) | _memory(said) | {ADAPTER_SHA256: sha256(folder / "adapter" / WEIGHTS)}
    for message in set(figures["warnings"]) - {event.get("message") for event in said}:
        advice = (
            f"lower learning_rate (now {stage.learning_rate}), or see whether the held-out rows are like the others"
        )
        events.append("warning", stage.name, message=message, next=advice)
    return figures


def _examples(
    home: Home, dataset: Dataset, rows: tuple[list[int], list[int]], base: Path, recipe: Recipe, stage: AnyStage
) -> tuple[Examples, Examples, tuple[int, int]]:
    """Examples of rows to train on and held out, and of how many of each there are none because they are too long."""
    table = tokenised(home, dataset, base, recipe.template, stage.method)
    (train, left_out), (held_out, left_out_too) = (chosen(table, dataset, some, stage) for some in rows)
    if not len(train):
        raise InvalidInput("no_rows", "no row is left to train on", "raise max_length, or add rows")
    return train, held_out, (left_out, left_out_too)


def forecast_of(home: Home, recipe: Recipe, name: str, freed: int = 0) -> Forecast:
    """What the stage `name` will take, once so many more bytes are free than now.

    Raises ApplianceError for what could not be trained on or with.
    """
    base = model_path(home, recipe.base)
    stage = recipe.stage(name)
    dataset = Dataset.open(home, stage.dataset)
    require_fit(stage, dataset, recipe.base)
    train_rows, held_out_rows = dataset.split(recipe.eval_share)
    both = train_rows, held_out_rows[:HELD_OUT_ROWS]
    train, held_out, _ = _examples(home, dataset, both, base, recipe, stage)
    limit = MicroBatchLimit(stage.micro_batch_size or stage.batch_size)
    return _forecast(base, recipe, stage, train, held_out, limit, freed)


def require_rows(home: Home, recipe: Recipe, name: str) -> None:
    """Raise InvalidInput where the rows of the stage `name` cannot all be trained on, as `train_stage` would."""
    stage = recipe.stage(name)
    dataset = Dataset.open(home, stage.dataset)
    train_rows, held_out_rows = dataset.split(recipe.eval_share)
    both = train_rows, held_out_rows[:HELD_OUT_ROWS]
    _examples(home, dataset, both, model_path(home, recipe.base), recipe, stage)


def _forecast(
    base: Path,
    recipe: Recipe,
    stage: AnyStage,
    train: Examples,
    held_out: Examples,
    limit: MicroBatchLimit,
    freed: int = 0,
) -> Forecast:
    method = METHODS[stage.method]
    rows, others = (list(map(Size, some.lengths, some.trained)) for some in (train, held_out))
    work = Work(rows, others, method.sequences, method.compared, limit)
    return forecast_stage(base, recipe, stage, work, _steps(stage, len(train)), freed)


def _train(
    run: Path,
    recipe: Recipe,
    stage: AnyStage,
    base: Path,
    tokenizer: Any,
    train: Examples,
    held_out: Examples,
    samples: Samples,
    events: EventLog,
    interruption: Interruption,
) -> None:
    """Train, and leave the adapter that the recipe asks for in the stage's directory."""
    folder = run / stage.name
    said = [event for event in events.read() if event["stage"] == stage.name]
    limit = MicroBatchLimit.after(
        said, stage.micro_batch_size or stage.batch_size, partial(events.append, "warning", stage.name)
    )
    every_n_layers = 1 if stage.gradient_checkpointing == "on" else 0
    try:
        forecast = _forecast(base, recipe, stage, train, held_out, limit)
        events.append("forecast", stage.name, **forecast.event())
        every_n_layers, limit.tokens = forecast.every_n_layers, forecast.micro_batch_tokens
    except NoForecast as error:
        events.append("warning", stage.name, message=error.message)
    model = _adapted_model(run, recipe, stage, base)
    if products.are_fast():
        products.round_frozen(model, limit.warn)
    fuse(model, limit.warn)
    if stage.gradient_checkpointing == "auto":
        limit.last_resort = partial(_checkpoint_gradients, model)
    trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    require_space(folder, 2 * trained + (KEPT + 1) * WITH_OPTIMISER * trained, "training")
    made_from = origin(recipe, stage.name)
    checkpoint, faults = newest_usable(folder, made_from)
    for fault in faults:
        events.append("warning", stage.name, message=f"{fault}: not used")
    best = Best(folder, events, stage)
    if checkpoint is None:
        best.forget()
    arguments = _arguments(folder, recipe, stage, len(train))
    arguments["eval_on_start"] = bool(len(held_out)) and _evaluation_due(
        checkpoint, stage, arguments["max_steps"], said
    )
    given = TrainerInputs(model, tokenizer, train, held_out, limit, interruption)
    trainer = METHODS[stage.method].trainer(stage, arguments, given)
    trainer.origin = made_from
    if every_n_layers:
        model.gradient_checkpointing_enable(every_n_layers=every_n_layers)
    trainer.remove_callback(PrinterCallback)
    cadence = Cadence(folder, stage, interruption, evaluates=bool(len(held_out)))
    for callback in (Reporter(events, stage), Guard(events, stage), samples, best, cadence):
        trainer.add_callback(callback)
    with interruption.deferred():
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            last_good: Path | None = None
        except Interrupted:
            trainer.save_last_step(since=step_of(checkpoint) if checkpoint else 0)
            raise SystemExit(INTERRUPTED) from None
        except Diverged as error:
            last_good, _ = newest_usable(folder, made_from)
            best_step = step_of(best.path) if best.path else 0
            if stage.on_bad_steps == "fail" or not (last_good or best_step):
                raise
            events.append("warning", stage.name, message=f"{error.message}: the stage ends with its last good adapter")
        if interruption.requested and trainer.state.global_step < trainer.state.max_steps:
            raise SystemExit(INTERRUPTED)
        kept = (best.path if stage.keep == "best" else None) or last_good
        with building(folder / "adapter") as saved:
            if kept is None:
                model.save_pretrained(saved, save_embedding_layers=False)
            else:
                for path in kept.glob("adapter_*"):
                    shutil.copyfile(path, saved / path.name)


def _checkpoint_gradients(model: Any) -> str:
    """Turn gradient checkpointing on, where it is not, and say so."""
    if model.is_gradient_checkpointing:
        return ""
    model.gradient_checkpointing_enable()
    return "gradient checkpointing"


def _evaluation_due(checkpoint: Path | None, stage: AnyStage, last: int, said: list[dict[str, Any]]) -> bool:
    """Whether the state to begin with is to be evaluated, and has not been, because it was interrupted."""
    if checkpoint is None:
        return True
    step = step_of(checkpoint)
    evaluated = any(event["event"] == "eval" and event["step"] == step for event in said)
    return is_evaluated(step, stage, last) and not evaluated


def _adapted_model(run: Path, recipe: Recipe, stage: AnyStage, base: Path) -> Any:
    """The base with a new adapter, or with the one that the stage goes on with.

    Raises InvalidInput for an adapter that does not cover what its recipe says, or could not be merged.
    """
    model = load_model(base, quantised=recipe.adapter.kind == "qlora")
    settle_router_loss(model)
    changed = quantised_modules(model) if recipe.adapter.kind == "qlora" else []
    meant = targeted_modules(model, recipe.adapter.targets, recipe.adapter.layers)
    of_experts = targeted_parameters(model, recipe.adapter.target_parameters, recipe.adapter.layers)
    if origin := recipe.starting_adapter(run, stage.name):
        model = load_adapter(model, origin, trainable=True)
    else:
        model = add_adapter(model, recipe.adapter, recipe.seed)
    require_covered(model, meant | of_experts)
    linear = {f"{module}.weight" for module in (*changed, *model.targeted_module_names)}
    require_present(base, linear, set(model.targeted_parameter_names))
    return model


def _steps(stage: AnyStage, rows: int) -> int:
    """Optimiser steps of `stage` over `rows` rows."""
    steps = math.ceil(stage.epochs * math.ceil(rows / stage.batch_size))
    return min(steps, stage.max_steps) if stage.max_steps else steps


def _arguments(folder: Path, recipe: Recipe, stage: AnyStage, rows: int) -> dict[str, Any]:
    """Transformers' training arguments for `stage` over `rows` examples."""
    steps = _steps(stage, rows)
    return {
        "output_dir": str(folder),
        "seed": recipe.seed,
        "use_cpu": not ON_GPU,
        "bf16": ON_GPU,
        # It is turned on by hand: Transformers would take all layers.
        "gradient_checkpointing": False,
        "dataloader_pin_memory": ON_GPU,
        "per_device_train_batch_size": stage.batch_size,
        "per_device_eval_batch_size": HELD_OUT_ROWS,
        "max_steps": steps,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": SCHEDULES[stage.schedule],
        "warmup_steps": round(steps * stage.warmup_share),
        "weight_decay": stage.weight_decay,
        "adam_beta1": stage.adam_betas[0],
        "adam_beta2": stage.adam_betas[1],
        # 0 would leave the gradient's norm unmeasured until the step is over.
        "max_grad_norm": stage.max_grad_norm or math.inf,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "include_num_input_tokens_seen": "non_padding",
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _losses(said: list[dict[str, Any]], stage: AnyStage) -> dict[str, Any]:
    """The last training loss, the held-out loss before and of the kept adapter, and what the model card has to say."""
    steps = [event["loss"] for event in said if event["event"] == "step"]
    evals = {event["step"]: event for event in said if event["event"] == "eval"}
    figures: dict[str, Any] = {"train_loss": steps[-1], "warnings": []}
    before = evals.get(0)
    if before:
        figures["held_out_loss_before"] = before["loss"]
    if evals:
        kept = min(evals.values(), key=lambda one: float(one["loss"])) if stage.keep == "best" else evals[max(evals)]
        figures |= {"held_out_loss": kept["loss"], "held_out_interval": kept.get("interval")}
        after = [event["loss"] for step, event in evals.items() if step]
        if before and kept is before and after:
            losses = f"{min(after):.4f} at best, and {before['loss']:.4f} before"
            unchanged = 'keep = "best" leaves the adapter as it was'
            figures["warnings"].append(f"the held-out loss is no lower after {stage.name} ({losses}): {unchanged}")
        elif before and kept["loss"] >= before["loss"]:
            losses = f"{kept['loss']:.4f}, and {before['loss']:.4f} before"
            figures["warnings"].append(f"the held-out loss is no lower after {stage.name}: {losses}")
        if is_displaced(kept.get("reward_chosen_interval")):
            reward = f"reward {kept['reward_chosen']:.3g}"
            figures["warnings"].append(f"the chosen answers are less likely after {stage.name} than before ({reward})")
    return figures


def _memory(said: list[dict[str, Any]]) -> dict[str, int]:
    """Bytes held at most, and bytes forecast where that could be said."""
    forecast = [event["memory"]["total"] for event in said if event["event"] == "forecast"]
    peak = max(event["memory"] for event in said if event["event"] == "step")
    return ({"memory_forecast": forecast[-1]} if forecast else {}) | {"memory_peak": peak}
