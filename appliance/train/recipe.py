"""The recipe: a typed TOML file that says everything about a run. This module needs no torch."""

from __future__ import annotations

import difflib
import tomllib
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from appliance.errors import InvalidInput
from appliance.home import NAME_PATTERN

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Adapter(_Section):
    """The trained part. Defaults suit instruction tuning of small and medium models."""

    kind: Literal["lora", "qlora"] = "qlora"
    """lora trains on the 16-bit base, qlora on the base in NF4 with double quantisation."""
    rank: int = Field(16, ge=1, le=512)
    """Rank of the two factors; more rank, more capacity and memory."""
    alpha: int = Field(32, ge=1, le=4096)
    """Scale: the update is (alpha / rank) * B A."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the modules that get an adapter; all-linear: every linear layer but the output head."""


class Stage(_Section):
    """What every training stage has."""

    dataset: Name
    """Name or id of an imported dataset."""
    name: str = ""
    """Directory and label of the stage; empty: the method's name."""
    epochs: float = Field(3, gt=0, le=1000)
    """Passes over the training split."""
    max_steps: int = Field(0, ge=0)
    """Stop after so many optimiser steps; 0: as many as the epochs need."""
    batch_size: int = Field(8, ge=1, le=4096)
    """Rows in an optimiser step."""
    micro_batch_size: int = Field(0, ge=0, le=4096)
    """Rows in one forward pass; 0: the batch size. A divisor of the batch size; the rest is accumulation."""
    warmup_share: float = Field(0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    max_length: int = Field(1024, ge=16, le=1 << 20)
    """Longest row in tokens; longer rows are an error unless `drop_long`."""
    drop_long: bool = False
    """Leave out rows longer than `max_length`, counted in the run's events, instead of refusing to train."""
    checkpoint_every: int = Field(20, ge=1)
    """Steps between checkpoints."""
    evaluate_every: int = Field(20, ge=1)
    """Steps between evaluations of the held-out loss."""

    @model_validator(mode="after")
    def _divisible(self) -> Stage:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError("micro_batch_size must divide batch_size")
        return self


class SftStage(Stage):
    """Supervised fine-tuning on the assistant's turns."""

    method: Literal["sft"]
    learning_rate: float = Field(2e-4, gt=0, lt=1)
    """Peak learning rate; a LoRA value, ten times that of full fine-tuning."""


class DpoStage(Stage):
    """Direct preference optimisation; the reference is the adapter that the stage starts from, frozen."""

    method: Literal["dpo"]
    learning_rate: float = Field(1e-5, gt=0, lt=1)
    """Peak learning rate; a LoRA value."""
    beta: float = Field(0.1, gt=0, le=10)
    """Strength of the pull towards the reference."""


AnyStage = Annotated[SftStage | DpoStage, Field(discriminator="method")]


class Recipe(_Section):
    """One run from base model to release. Without stages, the base itself is released."""

    name: Name
    """What runs and releases of this recipe are called."""
    base: Name
    """Name of a pulled base model."""
    seed: int = Field(17, ge=0, lt=1 << 31)
    """Seed of data order, adapter initialisation and dropout."""
    promote: bool = False
    """Make the release live as soon as it is verified."""
    eval_share: float = Field(0.1, ge=0, le=0.5)
    """Share of the prompts of each dataset that is held out."""
    fidelity_tolerance: float = Field(0.05, gt=0, le=1)
    """Largest rise in held-out loss (nats a token) from the adapter on its training base to the merged weights."""
    adapter: Adapter = Adapter()
    stages: tuple[AnyStage, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _name_stages(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("stages"), list | tuple):
            return values
        stages = [
            {**stage, "name": stage.get("name") or stage.get("method", "")} if isinstance(stage, dict) else stage
            for stage in values["stages"]
        ]
        return {**values, "stages": stages}

    @model_validator(mode="after")
    def _distinct_stages(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        reserved = {"merge", "verify", "probe"} & set(names)
        if reserved:
            raise ValueError(f"a stage cannot be named {min(reserved)!r}")
        if len(set(names)) != len(names):
            raise ValueError("two stages have the same name; give each its own `name`")
        return self

    def stage(self, name: str) -> SftStage | DpoStage:
        """The training stage called `name`. Raises KeyError."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def pipeline(self) -> tuple[str, ...]:
        """Names of all stages of a run in order: training, then merge, verify and probe."""
        return (*(stage.name for stage in self.stages), "merge", "verify", "probe")

    def previous(self, name: str) -> str | None:
        """Name of the training stage before `name`, whose adapter it starts from."""
        names = [stage.name for stage in self.stages]
        index = names.index(name)
        return names[index - 1] if index else None


def parse_recipe(text: str) -> Recipe:
    """Read a recipe. Raises InvalidInput naming the key (and what was probably meant) or the line."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput("bad_recipe", f"the recipe is not TOML: {error}", "mend that line") from None
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise InvalidInput("bad_recipe", *_explain(error)) from None


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as TOML with every default written out, so that it runs the same under later defaults."""
    return str(tomli_w.dumps(recipe.model_dump(mode="json")))


def _explain(error: ValidationError) -> tuple[str, str]:
    """What is wrong with one key, and what to do. A key too much comes first: it may be a missing one, mistyped."""
    first = min(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    location = [part for part in first["loc"] if part not in ("sft", "dpo")]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if first["type"] == "extra_forbidden":
        key = str(location[-1])
        close = difflib.get_close_matches(key, _known_keys(), n=1, cutoff=0.6)
        hint = f"did you mean `{close[0]}`?" if close else "take it out"
        return f"the recipe has an unknown key `{where}`", hint
    if first["type"] == "missing":
        return f"the recipe lacks `{where}`", f"add `{location[-1]} = ...`"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"the recipe's `{where}` has no known method", "set method to sft or dpo"
    message = first["msg"].removeprefix("Value error, ")
    if not where:
        return f"the recipe is not valid: {message}", "mend it, then try again"
    return f"the recipe's `{where}` is not valid: {message}", f"it is {first['input']!r} now"


def _known_keys() -> list[str]:
    return sorted({key for model in (Recipe, Adapter, SftStage, DpoStage) for key in model.model_fields})
