"""What a training stage will take, said before its first step: memory by part, disk, tokens, steps, time.

Shapes come from the model's own config (simulation.py), lengths from the dataset's rows, the rest is arithmetic.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from appliance.train.checkpoints import KEPT
from appliance.train.model import DTYPE, ON_GPU, quantised_modules
from appliance.train.order import cut_by_tokens, epoch_order
from appliance.train.recipe import AnyStage, Recipe
from appliance.train.room import Room
from appliance.train.simulation import meta_model, simulate

FORWARD = 1 / 3
"""Share of a step's operations that a forward pass alone takes; with frozen weights between a third and a half."""
EFFICIENCY = 0.45
"""Share of the speed of large matrix products that a whole step reaches; see bench/results/train.json."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in NF4 with double quantisation: four bits, a byte for 64 weights, and 4 bytes for 256 of those."""
SLACK = 1.0 if ON_GPU else 1.65
"""What the C library holds for a byte of activations: pieces freed by one pass fit the next one badly. Measured by
bench/forecast.py, as is the next."""
LOGITS_SLACK = 1.0 if ON_GPU else 1.25
"""The same for logits: the softmax and the products have buffers of their own size."""


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

    def event(self) -> dict[str, Any]:
        """The fields of the run's event."""
        memory = asdict(self.memory) | {"total": self.memory.total}
        return asdict(self) | {"memory": memory, "fits": self.fits}


@dataclass(frozen=True)
class Work:
    """What goes through the model in a stage."""

    lengths: Sequence[int]
    """Tokens of the longest sequence of each row to train on."""
    held_out: Sequence[int]
    sequences: int
    """Sequences a row."""
    room: Room

    def passes(self, stage: AnyStage, seed: int) -> list[tuple[int, int]]:
        """The forward passes of the first epoch: rows, and tokens of the longest."""
        order = epoch_order(self.lengths, stage.batch_size, seed, 0)
        found = []
        for start in range(0, len(order), stage.batch_size):
            lengths = [self.lengths[row] for row in order[start : start + stage.batch_size]]
            cuts = cut_by_tokens(lengths, self.room.tokens // self.sequences, self.room.rows)
            found += [(cut.stop - cut.start, max(lengths[cut])) for cut in cuts]
        return found


def forecast_stage(base: Path, recipe: Recipe, stage: AnyStage, work: Work, steps: int) -> Forecast:
    """The forecast for `stage` in this process, which has imported what training needs and loaded no model yet."""
    process = _process_memory()
    available = torch.cuda.mem_get_info()[0] if ON_GPU else psutil.virtual_memory().available + process
    overhead = 0 if ON_GPU else process
    speed = EFFICIENCY * matmul_speed()
    found = _forecast(base, recipe, stage, work, steps, available=available, overhead=overhead, speed=speed)
    if found.fits:
        return found

    def fits(recipe: Recipe, stage: AnyStage, work: Work) -> bool:
        return _forecast(base, recipe, stage, work, steps, available=available, overhead=overhead, speed=speed).fits

    return replace(found, advice=_advice(recipe, stage, work, found.rows_at_once // work.sequences, fits))


def _process_memory() -> int:
    return int(psutil.Process().memory_info().rss)


def matmul_speed(size: int = 2048) -> float:
    """Floating-point operations a second that matrix products reach here, in the precision of training."""
    one = torch.randn(size, size, device="cuda" if ON_GPU else "cpu", dtype=DTYPE)
    best = math.inf
    for _ in range(4):
        begun = time.perf_counter()
        (one @ one)[0, 0].item()
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def _forecast(
    base: Path,
    recipe: Recipe,
    stage: AnyStage,
    work: Work,
    steps: int,
    *,
    available: int,
    overhead: int,
    speed: float,
) -> Forecast:
    model = meta_model(base, recipe.adapter)
    passes = work.passes(stage, recipe.seed)
    rows, width = max(passes, key=lambda one: (one[0] * one[1], one[1]))
    largest = simulate(model, rows * work.sequences, width)
    trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    memory = Memory(
        weights=_weights(model, quantised=recipe.adapter.kind == "qlora"),
        adapter=trained,
        gradients=trained,
        optimiser=2 * trained,
        activations=round(SLACK * _kept(model, largest.activations, rows * work.sequences * width)),
        logits=round(LOGITS_SLACK * largest.logits),
        overhead=overhead,
    )
    epochs = steps / math.ceil(len(work.lengths) / stage.batch_size)
    evaluations = 1 + steps // stage.evaluate_every
    through = epochs * sum(rows * width for rows, width in passes) + FORWARD * evaluations * sum(work.held_out)
    if stage.method != "sft":
        # The reference's log-probabilities, once a row.
        through += FORWARD * (sum(work.lengths) + sum(work.held_out))
    operations = largest.operations / (rows * width) * through
    return Forecast(
        memory=memory,
        available=available,
        rows_at_once=rows * work.sequences,
        width_at_once=width,
        disk=(2 + 3 * (KEPT + 1)) * trained + sum(file.stat().st_size for file in base.glob("*.safetensors")),
        tokens=round(epochs * sum(work.lengths) * work.sequences),
        steps=steps,
        seconds=round(operations / speed),
        advice="",
    )


def _weights(model: Any, *, quantised: bool) -> int:
    """Bytes of the frozen weights; on a CPU the rounded ones stay in fp32, on a GPU one layer is unpacked at a time."""
    frozen = int(sum(weight.nbytes for weight in model.parameters() if not weight.requires_grad))
    if not (quantised and ON_GPU):
        return frozen
    layers = [model.get_submodule(name).weight for name in quantised_modules(model) if "lora" not in name]
    sizes = [int(layer.numel()) for layer in layers]
    packed = NF4_BYTES * sum(sizes) + DTYPE.itemsize * max(sizes)
    return int(frozen - sum(layer.nbytes for layer in layers) + packed)


def _kept(model: Any, activations: int, tokens: int) -> int:
    """Bytes of activations at once: on a GPU checkpointing keeps each layer's input, and one layer in full."""
    if not ON_GPU:
        return activations
    config = model.config.get_text_config()
    layers = int(config.num_hidden_layers)
    return int(activations // layers + layers * tokens * config.hidden_size * DTYPE.itemsize)


def _advice(
    recipe: Recipe, stage: AnyStage, work: Work, rows: int, fits: Callable[[Recipe, AnyStage, Work], bool]
) -> str:
    """The first of the changes, the least costly first, with which the stage fits."""
    fewer = rows // 2
    while fewer:
        smaller = replace(work, room=replace(work.room, rows=fewer))
        if fits(recipe, stage, smaller):
            return f"set micro_batch_size = {fewer}"
        fewer //= 2
    work = replace(work, room=replace(work.room, rows=1))
    if ON_GPU and recipe.adapter.kind != "qlora":
        adapter = recipe.adapter.model_copy(update={"kind": "qlora"})
        if fits(recipe.model_copy(update={"adapter": adapter}), stage, work):
            return 'set kind = "qlora" in [adapter]'
    longest = max(work.lengths)
    while (longest := longest // 2) >= 16:
        kept = [length for length in work.lengths if length <= longest]
        if kept and fits(recipe, stage, replace(work, lengths=kept)):
            return (
                f"set micro_batch_size = 1, max_length = {longest} and drop_long = true, "
                f"which leaves out {len(work.lengths) - len(kept)} of {len(work.lengths)} rows"
            )
    return "take a smaller base model, or free memory"
