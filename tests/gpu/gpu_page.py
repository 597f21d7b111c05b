"""What fits on which card, as a page: `python tests/gpu/gpu_page.py [--figures]` prints docs/GPU.md.

The forecasts are those that a worker makes on the card: the code is the same, the card's memory is given, and the
passes are simulated from the models' own shapes. What was measured comes from bench/results/gpu.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from appliance.architecture import empty_model
from appliance.gpu import Card
from appliance.settings import Settings
from appliance.supervisor.engines import Room
from appliance.train import forecast, products, simulation
from appliance.train.forecast import Box, Forecast, Size, Work, forecast_stage
from appliance.train.micro_batches import MicroBatchLimit
from appliance.train.recipe import Recipe, parse_recipe
from appliance.train.simulation import Pass
from serve.engines import vllm
from serve.engines.openai_engine import cache_bytes, context_length

GIB = 1 << 30
CARDS = (12, 16, 24, 48, 80)
"""GB, as they are sold."""
CONTEXT = 600 << 20
"""Bytes that CUDA takes of a card before a program has anything on it."""
FEW = (4, 8)
"""Layers of the models that are simulated."""
LEAST_CAPABILITY = (8, 0)
"""Of the cards that are supported."""
DISPLAY = GIB
"""Bytes that a desktop takes."""
MEASURED = json.loads((Path(__file__).parents[2] / "bench" / "results" / "gpu.json").read_text())


class Base(NamedTuple):
    name: str
    shape: dict[str, Any]


_QWEN3 = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "head_dim": 128}
BASES = (
    Base(
        "1.7B",
        _QWEN3
        | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
        | {"num_key_value_heads": 8, "tie_word_embeddings": True},
    ),
    Base(
        "8B",
        _QWEN3
        | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
        | {"num_key_value_heads": 8},
    ),
    Base(
        "14B",
        _QWEN3
        | {"hidden_size": 5120, "intermediate_size": 17408, "num_hidden_layers": 40, "num_attention_heads": 40}
        | {"num_key_value_heads": 8},
    ),
)
"""The shapes of Qwen3."""
ROWS = {"short rows": 400, "long rows": 4096}
"""Tokens of the longest."""
RECIPE = """
name = "r"
base = "b"
[[stages]]
method = "sft"
dataset = "d"
max_length = {longest}
"""


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """The forecast's constants as they are where there is a GPU, and each pass simulated once."""
    made: dict[int, tuple[Path, Any, int]] = {}

    @cache
    def meta_model(base: Path, adapter: Any, *, every_n_layers: int = 0) -> Any:
        model = simulation.meta_model(base, adapter)
        made[id(model)] = (base, adapter, every_n_layers)
        return model

    def simulate(model: Any, *size: int) -> Pass:
        return simulated(*made[id(model)], *size)

    values = {
        "ON_GPU": True,
        "DTYPE": torch.bfloat16,
        "SLACK": 1.0,
        "SLACK_TWICE": 1.0,
        "LOGITS_SLACK": 1.0,
        "CHECKPOINTED": (4, 2, 1),
        "SMALLER_PASSES": (1024,),
        "LARGER_PASSES": (4096, 8192),
        "meta_model": meta_model,
        "simulate": simulate,
    }
    with (
        patch.multiple(forecast, **values),
        patch.multiple(simulation, ON_GPU=True, DTYPE=torch.bfloat16),
        patch.object(products, "ON_GPU", True),
    ):
        yield


@cache
def simulated(base: Path, adapter: Any, every_n_layers: int, *size: int) -> Pass:
    """What a pass through the model takes, whose layers are alike: from passes through a few of them."""
    shape = json.loads((base / "config.json").read_bytes())
    passes = {}
    for layers in FEW:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": layers}))
            model = simulation.meta_model(Path(folder), adapter, every_n_layers=every_n_layers)
            passes[layers] = astuple(simulation.simulate(model, *size))
    few, more = FEW
    times = (shape["num_hidden_layers"] - few) / (more - few)
    return Pass(*(round(one + times * (other - one)) for one, other in zip(passes[few], passes[more], strict=True)))


def folder_of(base: Base, within: Path) -> Path:
    """A directory with the base's shape, and its weights in bfloat16 as far as their file says which they are."""
    folder = within / base.name
    if not folder.exists():
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(base.shape | {"max_position_embeddings": 40960}))
        header, end = {}, 0
        for name, parameter in empty_model(folder).named_parameters():
            begin, end = end, end + 2 * parameter.numel()
            header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [begin, end]}
        said = json.dumps(header).encode()
        with open(folder / "model.safetensors", "wb") as file:
            file.write(len(said).to_bytes(8, "little") + said)
            file.truncate(8 + len(said) + end)
    return folder


def trained_on(card: int, folder: Path, longest: int, *, display: bool = False) -> Forecast:
    """The forecast of supervised fine-tuning with the defaults on a card of so many GB, for rows up to `longest`."""
    recipe: Recipe = parse_recipe(RECIPE.format(longest=longest)).for_base(10**10)
    rows = [Size(length, length // 2) for length in range(longest // 4, longest + 1, longest // 20)] * 50
    work = Work(rows, rows[:64], 1, 0, MicroBatchLimit(8, tokens=2048))
    available = card * 10**9 - CONTEXT - DISPLAY * display
    with patch.object(Box, "here", lambda freed=0: Box(available + freed, 0, 1e14)):
        return forecast_stage(folder, recipe, recipe.stages[0], work, 400)


def served_on(card: int, folder: Path, *, beside: bool = False) -> tuple[Room, int]:
    """What verifying and serving a release of the base takes of a card of so many GB, and the tokens of its cache."""
    total = card * 10**9
    engine = vllm.VllmEngine(Settings(), gpu=True)
    card_here = Card(0, "", "", total, 0, 0, LEAST_CAPABILITY)
    with patch.multiple(vllm, total_memory=lambda: total, chosen=lambda: card_here):
        room = engine.room(folder, beside=beside)
    assert room.available is not None
    one_request = cache_bytes(folder, context_length(folder, 0))
    return room, (room.available - room.needed + one_request) // cache_bytes(folder, 1)


def said_of_serving(room: Room, tokens: int) -> str:
    """What is served, in a cell of the table."""
    how = "in FP8" if room.precision == "FP8" else "yes"
    return f"{how}, {tokens // 1000},000 tokens of cache" if room.suffices else "no"


def said_of(found: Forecast) -> str:
    """A forecast in a cell of the table."""
    if not found.fits:
        return f"no: {found.advice}"
    extra = {0: "", 1: ", layers twice"}.get(found.every_n_layers, f", 1 layer in {found.every_n_layers} twice")
    passes = f", passes of {found.micro_batch_tokens}" if found.micro_batch_tokens != 2048 else ""
    return f"{found.memory.total / GIB:.1f} GiB{extra}{passes}"


def tables() -> str:
    """What is trained, and what is served, on each card."""
    with tempfile.TemporaryDirectory() as scratch, as_on_a_gpu():
        folders = {base.name: folder_of(base, Path(scratch)) for base in BASES}
        columns = [(base, rows) for base in BASES for rows in ROWS]
        lines = [
            "| card | " + " | ".join(f"{base.name}, {rows}" for base, rows in columns) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for card in CARDS:
            cells = [said_of(trained_on(card, folders[base.name], ROWS[rows])) for base, rows in columns]
            lines.append(f"| {card} GB | " + " | ".join(cells) + " |")
        lines += ["", "| card | " + " | ".join(f"{base.name} served" for base in BASES) + " |"]
        lines.append("|---" * (len(BASES) + 1) + "|")
        for card in CARDS:
            cells = [said_of_serving(*served_on(card, folders[base.name])) for base in BASES]
            lines.append(f"| {card} GB | " + " | ".join(cells) + " |")
        lines += ["", "| card | " + " | ".join(f"two engines of {base.name}" for base in BASES) + " |"]
        lines.append("|---" * (len(BASES) + 1) + "|")
        for card in CARDS:
            cells = [said_of_serving(*served_on(card, folders[base.name], beside=True)) for base in BASES]
            lines.append(f"| {card} GB | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measured() -> str:
    """What a card has shown, from the record of the self-test."""
    ratios, targets = MEASURED["ratios"], MEASURED["targets"]
    lines = ["| figure | measured | wanted |", "|---|---|---|"]
    for how, wanted in targets.items():
        word = how.replace("_", " ")
        lines += [
            f"| {name.replace('_', ' ')} | {ratios[name]:.4g} | {word} {limit:g} |" for name, limit in wanted.items()
        ]
    return "\n".join(lines)


def main() -> None:
    """Print the page."""
    page = (Path(__file__).parent / "page.md").read_text()
    stack = MEASURED["figures"]["stack"]
    card = f"{stack['machine']['device']}, driver {stack['driver']}, PyTorch {stack['machine']['versions']['torch']}"
    sys.stdout.write(page.format(tables=tables(), measured=measured(), card=card))


if __name__ == "__main__":
    main()
