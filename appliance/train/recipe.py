"""The recipe: a typed TOML file that says everything about a run. This module needs no torch."""

from __future__ import annotations

import difflib
import math
import tomllib
from datetime import date
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, StrictInt, StringConstraints, ValidationError, model_validator

from appliance.data.dataset import Kind
from appliance.data.tokenizer import TemplateSettings
from appliance.errors import InvalidInput
from appliance.home import NAME_PATTERN

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, validate_by_name=True)


class Adapter(_Section):
    """The trained part: two small factors beside each linear layer, the only weights that change."""

    kind: Literal["lora", "qlora", "rslora", "dora"] = "qlora"
    """qlora trains over the base in NF4 with double quantisation: a quarter of the memory of 16 bits at nearly the same
    loss, hence the default. lora trains over the 16-bit base, faster where memory allows. rslora scales by the root of
    the rank, which keeps ranks of 64 and more learning. dora also trains the length of each weight column: often
    better at ranks of 8 and less, at a slower step. rslora and dora train over the 16-bit base."""
    rank: int = Field(16, ge=1, le=512)
    """Rank of the two factors: capacity, and memory in proportion. 16 holds what a few thousand rows teach; 64 and more
    pay off on tens of thousands."""
    alpha: int = Field(0, ge=0, le=4096)
    """Scale: the update is (alpha / rank) * B A, for rslora (alpha / sqrt(rank)) * B A. 0 makes the scale 2, for which
    the learning rates below are chosen: then the rank can change without them."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input in sft; 0, because so few weights overfit little and it costs time. dpo and kto
    train without, or the policy would differ from its own reference. With it a step depends a little on how its rows
    are divided into micro-batches."""
    targets: tuple[str, ...] = ("all-linear",)
    """Names of the modules that get an adapter. all-linear, every linear layer but the output head: attention alone
    learns less at the same number of weights."""
    target_parameters: tuple[str, ...] = ()
    """Of a mixture of experts, names of the parameters with a matrix for each expert that get an adapter, such as
    experts.down_proj. all-experts: all of them; empty: none, because what is beside the experts learns most tasks, and
    each expert has factors of its own. They stay in 16 bits, also for qlora."""
    layers: tuple[StrictInt, ...] = ()
    """Numbers of the layers that get an adapter, from 0, or from -1 for the last; empty: all of them."""

    @model_validator(mode="before")
    @classmethod
    def _scale(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("alpha", 0) != 0:
            return values
        rank = values.get("rank", 16)
        if not isinstance(rank, int) or rank < 1:
            return values
        scaled_by = math.sqrt(rank) if values.get("kind") == "rslora" else rank
        return {**values, "alpha": max(round(2 * scaled_by), 1)}

    @model_validator(mode="after")
    def _experts_take(self) -> Adapter:
        if not self.targets and not self.target_parameters:
            raise ValueError("an adapter without targets trains nothing; name some, or take `targets` out")
        if self.target_parameters and (self.kind == "dora" or self.dropout):
            other = 'kind = "dora"' if self.kind == "dora" else "dropout"
            raise ValueError(f"experts take no {other}; take it or target_parameters out")
        return self


class Stage(_Section):
    """What every training stage has."""

    dataset: Name
    """Name or id of an imported dataset."""
    name: str = ""
    """Directory and label of the stage; empty: the method's name."""
    from_: str = Field("", alias="from")
    """The stage whose adapter this one goes on with; empty: the one before it, of the first what `start` names. base:
    none, it makes a new adapter."""
    epochs: float = Field(3, gt=0, le=1000)
    """Passes over the training split. A LoRA adapter takes two or three before the held-out loss turns."""
    max_steps: int = Field(0, ge=0)
    """Stop after so many optimiser steps; 0: as many as the epochs need."""
    batch_size: int = Field(8, ge=1, le=4096)
    """Rows in an optimiser step. LoRA bears large batches worse than full fine-tuning: 8 to 32."""
    micro_batch_size: int = Field(0, ge=0, le=4096)
    """Most rows in one forward pass; 0: as many as fit 512 tokens (2048 on a GPU), which nearly fill the processor. The
    step is the same however its rows are divided: fewer only saves memory."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """on: each layer keeps only its input and is computed again in the backward pass: a fraction of the memory of
    activations for about half as much time again, and the same training. auto: off where the forecast has room without
    it, else on, which the run's forecast says, and on from when the memory is not enough for a single row."""
    learning_rate: float = Field(0, ge=0, lt=1)
    """Peak learning rate. 0: by the size of the base, because larger models diverge sooner."""
    warmup_share: float = Field(0.03, ge=0, lt=1)
    """Share of the steps over which the learning rate rises; Adam's first steps are its least certain."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up. cosine ends near zero, which settles the last steps."""
    weight_decay: float = Field(0.0, ge=0, le=1)
    """Decay of the adapter's weights by AdamW; 0, because the base that they are added to is what keeps them small."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients longer than this are shortened to it; 0: never."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of AdamW's means of gradients and of their squares. 0.95 for the second forgets spikes sooner."""
    loraplus_ratio: float = Field(1.0, ge=1, le=128)
    """LoRA+: how many times the learning rate the factor B has; 1: the same. Its paper takes 16, with a learning rate
    two to four times smaller."""
    max_length: int = Field(1024, ge=16, le=1 << 20)
    """Longest row in tokens; longer rows are an error unless `drop_long`. Nothing is ever cut."""
    drop_long: bool = False
    """Leave out rows longer than `max_length`, counted in the run's events, instead of refusing to train."""
    checkpoint_every: int = Field(0, ge=0)
    """Steps between checkpoints. 0: by time, every one to five minutes, so that a power cut costs five minutes and a
    step at most."""
    evaluate_every: int = Field(0, ge=0)
    """Steps between evaluations of the held-out loss. 0: by time, so that they and their samples take a fortieth of the
    training's: which steps they come after depends on the machine then, as does the adapter that is the best. There is
    one before the first step and one after the last in any case, and with `patience` after each tenth."""
    samples: int = Field(2, ge=0, le=16)
    """Held-out prompts that the model answers at each evaluation, so that a person watches it learn."""
    keep: Literal["best", "last"] = "best"
    """Which adapter the stage leaves: that of the lowest held-out loss, or that of the last step. The best is the one
    that the stage began with where no step is better. Where the loss is no lower than before, the run and the model
    card say so."""
    patience: int = Field(0, ge=0)
    """Stop after so many evaluations in a row without a held-out loss lower than before, that before the first step
    included; 0: never, because the schedule's end often lowers it once more."""
    bad_steps: int = Field(3, ge=1)
    """So many bad steps in a row end the stage at its last good checkpoint; each is a warning. Bad is a loss that is
    NaN, infinite or exactly 0, a gradient norm a hundred times its median, and a model that has lost half of what it
    knew of the answers, which ends the stage at once where held-out rows show it. An update that is NaN is left out."""
    on_bad_steps: Literal["fail", "keep"] = "fail"
    """fail: the run fails, saying why. keep: the stage leaves the adapter of the last good checkpoint."""


class SftStage(Stage):
    """Supervised fine-tuning on the assistant's turns of `messages` rows: teaches what to say.

    Its learning rates are about ten times those of full fine-tuning, as an adapter needs: 1e-3 for a base of less than
    half a billion parameters, 5e-4 to 3 billion, 2e-4 to 15 billion, 1e-4 above.
    """

    kind: ClassVar[Kind] = "messages"
    method: Literal["sft"]
    neftune_alpha: float = Field(0.0, ge=0, le=100)
    """NEFTune: noise on the embeddings while training, which may loosen the style of a model trained on few rows; its
    paper takes 5 to 15. 0: none. Rows are then padded instead of packed, and a step depends on how they are
    divided into micro-batches, by whose width the noise is."""


class DpoStage(Stage):
    """Direct preference optimisation on `preference` rows: teaches which of two answers is better.

    The reference is the adapter that the stage starts from, frozen; after an sft stage that is the sft adapter. Its
    learning rates are a fortieth of sft's: a preference is learnt in few steps and unlearns language in a few more.
    """

    kind: ClassVar[Kind] = "preference"
    method: Literal["dpo"]
    epochs: float = Field(1, gt=0, le=1000)
    """Passes over the training split; one, because pairs seen twice are soon learnt by heart."""
    beta: float = Field(0.1, gt=0, le=10)
    """Strength of the pull towards the reference; 0.1 is the paper's. Raise it where answers turn strange."""
    loss_type: Literal["sigmoid", "ipo", "apo_zero"] = "sigmoid"
    """What a pair costs. sigmoid is dpo's own. ipo aims at a margin of 1 / (2 beta) a token, and so does not run away
    on few pairs. apo_zero makes chosen answers likelier and rejected ones less likely,
    each by itself."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs that may be judged the wrong way round, which the sigmoid then allows for."""
    sft_weight: float = Field(0.0, ge=0, le=100)
    """Weight of the chosen answer's own loss a token beside the preference's. 1, as the paper on iterative reasoning
    takes, where the chosen answers become less likely; the run warns of that."""

    @model_validator(mode="after")
    def _smoothed(self) -> DpoStage:
        if self.label_smoothing and self.loss_type != "sigmoid":
            raise ValueError(f"label_smoothing is of the sigmoid loss; take it out, or loss_type = {self.loss_type!r}")
        return self


class KtoStage(Stage):
    """Kahneman-Tversky optimisation on `unpaired` rows: teaches from single answers judged good or bad.

    The reference is as in dpo, and so are its learning rates, for the same reason.
    """

    kind: ClassVar[Kind] = "unpaired"
    method: Literal["kto"]
    epochs: float = Field(1, gt=0, le=1000)
    """Passes over the training split; one, as for dpo."""
    batch_size: int = Field(16, ge=2, le=4096)
    """Rows in an optimiser step, over which the KL term is estimated: fewer than 8 make it noise."""
    beta: float = Field(0.1, gt=0, le=10)
    """Strength of the pull towards the reference; 0.1 is the paper's."""
    desirable_weight: float = Field(1.0, gt=0, le=100)
    """Weight of the answers judged good. The paper asks for weight times number of the good ones to be 1 to 1.33 times
    that of the bad ones."""
    undesirable_weight: float = Field(1.0, gt=0, le=100)
    """Weight of the answers judged bad; lower it where they are the more."""


AnyStage = Annotated[SftStage | DpoStage | KtoStage, Field(discriminator="method")]
THINKS = {"auto": None, "on": True, "off": False}
"""What a chat template is told by a recipe's `thinking`."""
AFTER_TRAINING = ("merge", "verify", "probe")
"""The stages that make a release of what was trained last."""
BASE = "base"
"""What a stage is `from` that goes on with nothing."""
_STAGES: dict[str, type[Stage]] = {"sft": SftStage, "dpo": DpoStage, "kto": KtoStage}
METHOD_NAMES = tuple(_STAGES)

SFT_LEARNING_RATES = ((500_000_000, 1e-3), (3_000_000_000, 5e-4), (15_000_000_000, 2e-4))
"""Default by parameters of the base, each up to a size. Source: arXiv 2305.14314 for 7 billion and more; below, the
rule of LoRA Without Regret (2025) by width, 5e-4 * (2000 / width) ** 0.78."""
LARGEST_SFT_LEARNING_RATE = 1e-4
"""For any base above."""
PREFERENCE_SHARE = 1 / 40
"""Of the sft rate, for dpo and kto: 5e-6 for a base of 8 billion parameters, as in the Zephyr recipes."""


_RETIRED = {"fidelity_tolerance"}
"""Keys that recipes on disk still have and nothing reads any more."""


class Given(_Section):
    """An adapter that was trained elsewhere; `appliance merge` writes this."""

    sha256: str
    """SHA-256 of its weights, which lie beside the recipe."""
    quantised: bool = False
    """It was trained over the base in NF4."""
    dataset: Name | Literal[""] = ""
    """Name or id of the dataset that the merged weights are judged on; empty: a few plain questions."""
    nudges: bool = False
    """It was trained by preferences alone, so that it answers much as its base does."""


class Start(_Section):
    """The release whose adapter a run goes on with; `start = "RELEASE"` is short for it."""

    release: Name
    """Id of a release on this box, trained here on the same base."""
    sha256: str = ""
    """SHA-256 of its adapter's weights, written when the run is queued."""
    nudges: bool = False
    """Whether it was trained by preferences alone, written then too."""


class Recipe(_Section):
    """One run from base model to release. Without stages, the base itself is released, or with a given adapter."""

    name: Name
    """What runs and releases of this recipe are called."""
    base: Name
    """Name of a pulled base model."""
    seed: int = Field(17, ge=0, lt=1 << 31)
    """Seed of data order, adapter initialisation and dropout."""
    promote: bool = False
    """Make the release live as soon as it is verified."""
    clock: date = Field(default_factory=date.today)
    """Today, for chat templates that ask (Llama 3.2, SmolLM3, gpt-oss): one day for training, gates and the engine that
    serves the release, so that what is served is what was proven. By default the day on which the run is queued."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Whether the model thinks before it answers, where its chat template can be told (Qwen3, Gemma 4, GLM-4.5): in
    training, in the gates, and by default when it is served; a client may ask for the other. auto: on where a dataset
    has thoughts; else as the release that `start` names; else off. Without stages, as the template does by itself."""
    eval_share: float = Field(0.1, ge=0, le=0.5)
    """Share of each dataset that is held out, drawn by the hash of its prompts, and 256 rows at most: more would make
    the figures hardly surer."""
    forgetting_limit: float = Field(0.0, ge=0)
    """By how much the loss on the live release's own held-out rows may rise (nats a token) before the quality gate
    refuses; 0: by anything, and the release's card says by how much."""
    start: Start | None = None
    """A release whose adapter the first stage goes on with, with that adapter's own settings instead of `[adapter]`. To
    train on a release's merged weights instead, pull them as a base: `appliance pull NAME --from RELEASE`."""
    end: Literal["release", "adapter"] = "release"
    """What the run ends in: a release of what its last stage trained, or that adapter alone, with its figures."""
    adapter: Adapter = Adapter()
    stages: tuple[AnyStage, ...] = ()
    given: Given | None = None
    rechecks: Name | None = None
    """The release whose gates the run repeats, on that release's own files; `appliance verify --gates` writes this."""

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, values: Any) -> Any:
        return (
            {key: value for key, value in values.items() if key not in _RETIRED} if isinstance(values, dict) else values
        )

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

    @model_validator(mode="before")
    @classmethod
    def _start_by_its_name(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("start"), str):
            return {**values, "start": {"release": values["start"]}}
        return values

    @model_validator(mode="after")
    def _trained_or_given(self) -> Recipe:
        if self.stages and self.given:
            raise ValueError("a given adapter is merged as it is; take the stages out")
        if not self.stages and (self.start or self.end != "release"):
            raise ValueError("without a stage there is nothing to start or to end; add a stage")
        if self.promote and self.end != "release":
            raise ValueError(f'a run with end = "{self.end}" makes no release to promote; take one of the two out')
        return self

    @model_validator(mode="after")
    def _distinct_stages(self) -> Recipe:
        names = [stage.name for stage in self.stages]
        reserved = {*AFTER_TRAINING, BASE, "start"} & set(names)
        if reserved:
            raise ValueError(f"a stage cannot be named {min(reserved)!r}")
        if len(set(names)) != len(names):
            raise ValueError("two stages have the same name; give each its own `name`")
        for index, stage in enumerate(self.stages):
            if stage.from_ not in ("", BASE, *names[:index]):
                raise ValueError(f"stage {stage.name!r} is from {stage.from_!r}, and no stage before it has that name")
        if self.start and self.stages and not self.goes_on(self.stages[-1].name):
            raise ValueError("the last stage does not go back to what `start` names; take `start` out, or its `from`")
        return self

    @property
    def template(self) -> TemplateSettings:
        """What the base's chat template is told."""
        return TemplateSettings(today=self.clock, thinking=THINKS[self.thinking])

    @property
    def changes_weights(self) -> bool:
        """Whether the release differs from the base."""
        return bool(self.stages) or self.given is not None

    @property
    def only_nudges(self) -> bool:
        """Whether no stage teaches answers, with where they end: the release answers much as its base does."""
        if self.given:
            return self.given.nudges
        if self.start and not self.start.nudges and self.goes_on(self.stages[-1].name):
            return False
        return bool(self.stages) and all(stage.method != "sft" for stage in self.chain())

    @property
    def quantised(self) -> bool:
        """Whether the adapter is trained over the base in NF4."""
        return self.given.quantised if self.given else self.adapter.kind == "qlora"

    @property
    def datasets(self) -> dict[str, str]:
        """The dataset of each stage that the last one goes on from, and the one that a given adapter is judged on."""
        given = {"given": self.given.dataset} if self.given and self.given.dataset else {}
        return {stage.name: stage.dataset for stage in self.chain()} | given

    def stage(self, name: str) -> AnyStage:
        """The training stage called `name`. Raises KeyError."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def for_base(self, parameters: int) -> Recipe:
        """The recipe with the learning rates that a base of so many parameters calls for, where it names none."""
        fitting = (rate for size, rate in SFT_LEARNING_RATES if parameters < size)
        sft_rate = next(fitting, LARGEST_SFT_LEARNING_RATE)
        stages = []
        for stage in self.stages:
            default = sft_rate if stage.method == "sft" else sft_rate * PREFERENCE_SHARE
            stages.append(stage.model_copy(update={"learning_rate": stage.learning_rate or default}))
        return self.model_copy(update={"stages": tuple(stages)})

    def pipeline(self) -> tuple[str, ...]:
        """Names of all stages of a run in order: training, then for a release merge, verify and probe."""
        return (*(stage.name for stage in self.stages), *(AFTER_TRAINING if self.end == "release" else ()))

    def last_adapter(self, run: Path) -> Path:
        """The adapter that the last training stage leaves in the directory of a run, or that the run was given."""
        return (run / self.stages[-1].name if self.stages else run) / "adapter"

    def parent(self, name: str) -> str | None:
        """Name of the training stage whose adapter `name` goes on with. Raises KeyError."""
        origin = self.stage(name).from_
        if origin:
            return origin if origin != BASE else None
        names = [stage.name for stage in self.stages]
        index = names.index(name)
        return names[index - 1] if index else None

    def chain(self, name: str = "") -> tuple[AnyStage, ...]:
        """The stages whose training is in the adapter of `name`, or of the last stage, the first of them first."""
        found: list[AnyStage] = []
        following = name or (self.stages[-1].name if self.stages else None)
        while following:
            found.insert(0, self.stage(following))
            following = self.parent(following)
        return tuple(found)

    def goes_on(self, name: str) -> bool:
        """Whether the adapter of stage `name` goes back to that of the release that the run starts from."""
        return self.start is not None and self.chain(name)[0].from_ != BASE

    def starting_adapter(self, run: Path, name: str) -> Path | None:
        """The adapter in the directory of a run that stage `name` goes on with; None: it makes a new one."""
        if parent := self.parent(name):
            return run / parent / "adapter"
        return run / "start" if self.goes_on(name) else None


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
    return str(tomli_w.dumps(recipe.model_dump(mode="json", exclude_none=True, by_alias=True)))


def _explain(error: ValidationError) -> tuple[str, str]:
    """What is wrong with one key, and what to do. A key too much comes first: it may be a missing one, mistyped."""
    first = min(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    location = [part for part in first["loc"] if part not in METHOD_NAMES]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    if first["type"] == "extra_forbidden":
        key = str(location[-1])
        if others := [method for method, stage in _STAGES.items() if key in stage.model_fields]:
            hint = "take it out" if location[0] == "stages" else "move it below a [[stages]]"
            return f"the recipe's `{where}` is a key of {' and '.join(others)} stages", hint
        close = difflib.get_close_matches(key, _known_keys(), n=1, cutoff=0.6)
        hint = f"did you mean `{close[0]}`?" if close else "take it out"
        return f"the recipe has an unknown key `{where}`", hint
    if first["type"] == "value_error":
        return f"the recipe is not valid: {first['msg'].removeprefix('Value error, ')}", "mend it, then try again"
    if first["type"] == "missing" and isinstance(location[-1], int):
        return f"the recipe's `{where.rpartition('[')[0]}` has too few items", "see docs/RECIPES.md"
    if first["type"] == "missing":
        return f"the recipe lacks `{where}`", f"add `{location[-1]} = ...`"
    if first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return f"the recipe's `{where}` has no known method", f"set method to one of {', '.join(METHOD_NAMES)}"
    if not where:
        return f"the recipe is not valid: {first['msg'].removeprefix('Value error, ')}", "mend it, then try again"
    given = first["input"]
    if where == "base" and isinstance(given, str) and "/" in given:
        pull = f"`appliance pull {given}`, then name it as `appliance models` does"
        return f"the recipe's `base` is {given!r}, and has to be the name of a model that is here", pull
    wanted = _WANTED.get(first["type"], first["msg"].removeprefix("Value error, ").replace("Input should be", "", 1))
    limits = {key: f"{limit:g}" if isinstance(limit, float) else limit for key, limit in first.get("ctx", {}).items()}
    wanted = wanted.format(**limits).strip()
    listed = first["type"] in _LISTS and isinstance(given, str)
    example = f', such as `{location[-1]} = ["{given}"]`' if listed else ""
    return f"the recipe's `{where}` is {given!r:.60}, and has to be {wanted}{example}", "see docs/RECIPES.md"


_LISTS = ("tuple_type", "list_type")
_WANTED = {
    "string_pattern_mismatch": "a name of letters, digits, dots and dashes",
    "string_type": "a text in quotes",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a number",
    "literal_error": "{expected}",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    **dict.fromkeys(_LISTS, "a list"),
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type"), "a table"),
    **dict.fromkeys(
        ("date_type", "date_parsing", "date_from_datetime_parsing", "date_from_datetime_inexact"),
        "a day, such as 2026-01-31",
    ),
}
"""What a key has to be, by pydantic's types of errors."""


def _known_keys() -> list[str]:
    models: tuple[type[BaseModel], ...] = (Recipe, Adapter, *_STAGES.values())
    return sorted({field.alias or key for model in models for key, field in model.model_fields.items()})
