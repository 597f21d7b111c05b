"""What a training stage will take, said before its first step: memory by part, disk, tokens, steps, time.

Shapes come from the model's own config (simulation.py), lengths from the dataset's rows, the rest is arithmetic.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from appliance.architecture import quantised_modules
from appliance.errors import InvalidInput, reason
from appliance.train import products
from appliance.train.callbacks import SHARE
from appliance.train.checkpoints import KEPT
from appliance.train.micro_batches import MicroBatchLimit
from appliance.train.model import DTYPE, ON_GPU
from appliance.train.order import cut_by_tokens, epoch_order
from appliance.train.products import RoundedLinear
from appliance.train.recipe import AnyStage, Recipe
from appliance.train.simulation import Pass, meta_model, simulate

EFFICIENCY, EFFICIENCY_IN_BF16, EFFICIENCY_ON_GPU = 0.36, 0.22, 0.4
"""Share of the speed of large matrix products that a whole step reaches: of SmolLM2 on a CPU, in fp32 as measured
(`around` in bench/results/train.json). The others are estimates: where its frozen layers multiply in bf16, and of an 8B
on an H200 from single passes (bench/results/gpu_layers.json)."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in NF4 with double quantisation: four bits, a byte for 64 weights, and 4 bytes for 256 of those."""
SLACK = 1.0 if ON_GPU else 1.65
"""What the C library holds for a byte of activations: pieces freed by one pass fit the next one badly. Measured by
bench/forecast.py, as are the next."""
SLACK_TWICE = 1.0 if ON_GPU else 7.5
"""The same with gradient checkpointing: the pieces of a layer come and go between the inputs that stay."""
LOGITS_SLACK = 1.0 if ON_GPU else 1.25
"""The same for logits: the softmax and the products have buffers of their own size."""
HELD = 1
"""Bytes that the C library still holds for a weight which was in fp32 before it was rounded to bf16."""
CHECKPOINTED = (4, 2, 1) if ON_GPU else (1,)
"""Each nth layer is computed twice where there is no room without, of these n the first that has room. On a CPU
SLACK_TWICE is known of all layers alone."""
SMALLER_PASSES = (1024,) if ON_GPU else ()
"""Tokens of a forward pass that are tried before any layer is computed twice: an 8B keeps a card nearly as busy."""
LARGER_PASSES = (4096, 8192) if ON_GPU else ()
"""Tokens of a forward pass where there is room for more than usual."""
MARGIN = 1.15
"""Times the forecast there has to be, for a stage to do without gradient checkpointing: how wrong a forecast may be."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part, at the moment of the peak."""

    weights: int
    adapter: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    overhead: int
    """The process without a model."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Forecast:
    """What one stage will take."""

    memory: Memory
    available: int
    """Bytes that this process could hold."""
    every_n_layers: int
    """Each nth layer is computed again in the backward pass: as the recipe says, or as the memory asks for. 0: none."""
    micro_batch_tokens: int
    """Most tokens of a forward pass of several rows."""
    rows_at_once: int
    width_at_once: int
    """Sequences, and tokens of each, of the largest forward pass."""
    disk: int
    """Bytes of checkpoints, adapter, and the release."""
    tokens: int
    steps: int
    seconds: int
    advice: str
    """The smallest change that makes it fit; empty where it fits."""

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.available

    @property
    def has_room(self) -> bool:
        """Whether it fits however wrong it may be."""
        return MARGIN * self.memory.total <= self.available

    def event(self) -> dict[str, Any]:
        """The fields of the run's event."""
        memory = asdict(self.memory) | {"total": self.memory.total}
        return asdict(self) | {"memory": memory, "fits": self.fits, "gradient_checkpointing": bool(self.every_n_layers)}


class NoForecast(InvalidInput):
    """This architecture cannot be run without numbers, so that nobody knows what it takes before it is trained."""

    def __init__(self, error: Exception) -> None:
        why = f"there is no forecast for this architecture: {reason(error)}"
        super().__init__("no_forecast", why, "train without one, or on another base")


class Size(NamedTuple):
    """How much a row is."""

    length: int
    """Tokens of its longest sequence."""
    trained: int
    """Trained tokens of all its sequences."""


class Part(NamedTuple):
    """A forward pass of a step."""

    rows: int
    width: int
    """Tokens of the longest sequence, to which the others are padded."""
    trained: int


@dataclass(frozen=True)
class Work:
    """What goes through the model in a stage."""

    rows: Sequence[Size]
    held_out: Sequence[Size]
    sequences: int
    """Sequences a row that are trained on."""
    compared: int
    """Sequences a row that only go forward, in training too."""
    limit: MicroBatchLimit

    def parts(self, stage: AnyStage, seed: int) -> list[Part]:
        """The forward passes of the first epoch's steps."""
        order = epoch_order([row.length for row in self.rows], stage.batch_size, seed, 0)
        found = []
        for start in range(0, len(order), stage.batch_size):
            batch = [self.rows[row] for row in order[start : start + stage.batch_size]]
            cuts = cut_by_tokens([row.length for row in batch], self.limit.tokens // self.sequences, self.limit.rows)
            for cut in cuts:
                lengths, trained = zip(*batch[cut], strict=True)
                found.append(Part(len(lengths), max(lengths), sum(trained)))
        return found


@dataclass(frozen=True)
class Plan:
    """What would be run."""

    recipe: Recipe
    stage: AnyStage
    work: Work
    steps: int
    every_n_layers: int
    """Each nth layer is computed twice; 0: none."""


Change = tuple[str, Callable[[Plan], Plan]]
"""What to set, and the plan with it."""


@dataclass(frozen=True)
class Box:
    """What this process has, which has imported what training needs and loaded no model yet."""

    available: int
    """Bytes that it could hold."""
    overhead: int
    """Bytes that it holds."""
    speed: float
    """Floating-point operations a second of a training step."""

    @classmethod
    def here(cls, freed: int = 0) -> Box:
        """This box, once so many more bytes are free than now."""
        process = _process_memory()
        available = torch.cuda.mem_get_info()[0] if ON_GPU else psutil.virtual_memory().available + process
        return cls(available + freed, 0 if ON_GPU else process, training_speed())


def forecast_stage(base: Path, recipe: Recipe, stage: AnyStage, work: Work, steps: int, freed: int = 0) -> Forecast:
    """The forecast for `stage` in this process, and with it whether the stage uses gradient checkpointing.

    `freed`: bytes that will be free before it begins, and are not now. Raises NoForecast.
    """
    box = Box.here(freed)
    plan = Plan(recipe, stage, work, steps, every_n_layers=1 if stage.gradient_checkpointing == "on" else 0)
    found = _forecast(base, plan, box)
    if stage.gradient_checkpointing == "auto" and not found.has_room:
        plan, found = _checkpointed(base, plan, found, box)
    elif found.has_room and not plan.every_n_layers and not work.limit.settled:
        found = _with_larger_passes(base, plan, found, box)
    if found.fits:
        return found
    advice = _advice(plan, found.rows_at_once // work.sequences, lambda other: _forecast(base, other, box).fits)
    return replace(found, advice=advice)


def _checkpointed(base: Path, plan: Plan, found: Forecast, box: Box) -> tuple[Plan, Forecast]:
    """The plan of smaller passes, else that which computes the fewest layers twice, of those that have room.

    Where none has, the one that takes the least.
    """
    tried = [(plan, found)]
    smaller = [_with_tokens(tokens, plan) for tokens in SMALLER_PASSES if tokens < plan.work.limit.tokens]
    twice = (replace(one, every_n_layers=every) for one in (plan, *smaller) for every in CHECKPOINTED)
    for other in (*smaller, *twice):
        tried.append((other, _forecast(base, other, box)))
        if tried[-1][1].has_room:
            return tried[-1]
    # Of a small model it may take no less.
    return min(tried, key=lambda one: one[1].memory.total)


def _with_larger_passes(base: Path, plan: Plan, found: Forecast, box: Box) -> Forecast:
    """The forecast of the largest passes that there is room for: a large card is not busy with small ones."""
    for tokens in LARGER_PASSES:
        larger = _forecast(base, _with_tokens(tokens, plan), box)
        taken, before = (one.rows_at_once * one.width_at_once for one in (larger, found))
        if not larger.has_room or taken <= before:
            break
        found = larger
    return found


def _process_memory() -> int:
    return int(psutil.Process().memory_info().rss)


def training_speed() -> float:
    """Floating-point operations a second of a training step here."""
    if ON_GPU:
        return EFFICIENCY_ON_GPU * matmul_speed(4096)
    return (EFFICIENCY_IN_BF16 if products.are_fast() else EFFICIENCY) * matmul_speed(2048)


def matmul_speed(size: int) -> float:
    """Floating-point operations a second that matrix products reach here, in the precision of frozen layers."""
    dtype = torch.bfloat16 if products.are_fast() else DTYPE
    one = torch.randn(size, size, device="cuda" if ON_GPU else "cpu", dtype=dtype)
    best = math.inf
    for _ in range(4):
        begun = time.perf_counter()
        (one @ one)[0, 0].item()
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def _forecast(base: Path, plan: Plan, box: Box) -> Forecast:
    recipe, stage, work = plan.recipe, plan.stage, plan.work
    try:
        model = meta_model(base, recipe.adapter, every_n_layers=plan.every_n_layers)
    except InvalidInput as error:
        if error.code != "bad_model":
            raise
        raise NoForecast(error) from error
    parts = work.parts(stage, recipe.seed)
    widest = max(parts, key=lambda part: (part.rows * part.width, part.width))
    # Activations go by all tokens, logits by the trained ones, and those may be most in another pass.
    largest = Part(widest.rows * work.sequences, widest.width, max(part.trained for part in parts))
    try:
        taken = simulate(model, *largest)
    except Exception as error:  # models are their publishers' code, which may look at numbers that are not there
        raise NoForecast(error) from error
    trained = sum(weight.numel() * torch.float32.itemsize for weight in model.parameters() if weight.requires_grad)
    memory = Memory(
        weights=_weights(model, quantised=recipe.adapter.kind == "qlora"),
        adapter=trained,
        gradients=trained,
        optimiser=2 * trained,
        activations=round((SLACK_TWICE if plan.every_n_layers else SLACK) * taken.activations),
        logits=round(LOGITS_SLACK * taken.logits),
        overhead=box.overhead,
    )
    return Forecast(
        memory=memory,
        available=box.available,
        every_n_layers=plan.every_n_layers,
        micro_batch_tokens=work.limit.tokens,
        rows_at_once=largest.rows,
        width_at_once=largest.width,
        disk=(2 + 3 * (KEPT + 1)) * trained + sum(file.stat().st_size for file in base.glob("*.safetensors")),
        tokens=round(_epochs(plan) * sum(row.length for row in work.rows) * work.sequences),
        steps=plan.steps,
        seconds=round(_operations(plan, parts, largest, taken) / box.speed),
        advice="",
    )


def _weights(model: Any, *, quantised: bool) -> int:
    """Bytes of the frozen weights; on a CPU the rounded ones stay in fp32, on a GPU one layer is unpacked at a time."""
    frozen = int(sum(weight.nbytes for weight in model.parameters() if not weight.requires_grad))
    frozen += HELD * sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, RoundedLinear))
    if not (quantised and ON_GPU):
        return frozen
    layers = [model.get_submodule(name).weight for name in quantised_modules(model) if "lora" not in name]
    sizes = [int(layer.numel()) for layer in layers]
    packed = NF4_BYTES * sum(sizes) + DTYPE.itemsize * max(sizes)
    return int(frozen - sum(layer.nbytes for layer in layers) + packed)


def _epochs(plan: Plan) -> float:
    return plan.steps / math.ceil(len(plan.work.rows) / plan.stage.batch_size)


def _operations(plan: Plan, parts: list[Part], one: Part, taken: Pass) -> float:
    """Floating-point operations of the stage, where `one` pass has taken so many."""
    stage, work, epochs = plan.stage, plan.work, _epochs(plan)
    tokens = one.rows * one.width
    forward, both, head = taken.forward / tokens, (taken.forward + taken.backward) / tokens, taken.head / one.trained

    def scored(rows: Sequence[Size], sequences: int) -> float:
        return sum(sequences * forward * row.length + head / 2 * row.trained for row in rows)

    steps = sum(both * work.sequences * part.rows * part.width + head * part.trained for part in parts)
    if work.compared:
        steps += scored(work.rows, work.compared)
    evaluation = scored(work.held_out, work.sequences + work.compared)
    training = epochs * steps
    # By steps, or by time, where one comes before them and one after.
    every = stage.evaluate_every
    total = training + (1 + plan.steps // every) * evaluation if every else (1 + SHARE) * training + 2 * evaluation
    if stage.method != "sft":
        # The reference's log-probabilities, once a row.
        total += scored(work.rows, work.sequences + work.compared) + evaluation
    return total


def _advice(plan: Plan, rows: int, fits: Callable[[Plan], bool]) -> str:
    """The first change with which the plan fits, or else what all of them together need.

    First come fewer rows in a pass, then gradient checkpointing: the training stays the same. Then the base is
    rounded, which changes it a little, and last rows are left out.
    """
    fewer: list[Change] = [(f"micro_batch_size = {count}", partial(_with_rows, count)) for count in _halves(rows, 1)]
    others: list[Change] = []
    if plan.every_n_layers != 1:
        others.append(('gradient_checkpointing = "on"', partial(replace, every_n_layers=1)))
    if ON_GPU and plan.recipe.adapter.kind != "qlora":
        others.append(('kind = "qlora" in [adapter]', _quantised))
    for said, change in (*fewer, *others):
        if fits(change(plan)):
            return f"set {said}"
    together = [*fewer[-1:], *others]
    for _, change in together:
        plan = change(plan)
    if len(together) > 1 and fits(plan):
        return f"set {_listed(said for said, _ in together)}"
    every = plan.work.rows
    for longest in _halves(max(row.length for row in every), 16):
        kept = [row for row in every if row.length <= longest]
        if kept and fits(replace(plan, work=replace(plan.work, rows=kept))):
            settings = [*(said for said, _ in together), f"max_length = {longest}", "drop_long = true"]
            return f"set {_listed(settings)}, which leaves out {len(every) - len(kept)} of {len(every)} rows"
    return "take a smaller base model, or free memory"


def _with_tokens(tokens: int, plan: Plan) -> Plan:
    return replace(plan, work=replace(plan.work, limit=replace(plan.work.limit, tokens=tokens)))


def _with_rows(count: int, plan: Plan) -> Plan:
    return replace(plan, work=replace(plan.work, limit=replace(plan.work.limit, rows=count)))


def _quantised(plan: Plan) -> Plan:
    adapter = plan.recipe.adapter.model_copy(update={"kind": "qlora"})
    return replace(plan, recipe=plan.recipe.model_copy(update={"adapter": adapter}))


def _halves(number: int, least: int) -> list[int]:
    """Half of `number`, half of that, and so on, none below `least`."""
    return [number >> times for times in range(1, number.bit_length()) if number >> times >= least]


def _listed(settings: Iterable[str]) -> str:
    *first, last = settings
    return f"{', '.join(first)} and {last}" if first else last
