"""The verify stage: what can be measured on the files of a release without an engine, and the probes for the engine."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from appliance.data.dataset import Row
from appliance.data.render import Conversation, Rendered
from appliance.data.tokenizer import load_tokenizer
from appliance.errors import ApplianceError, InvalidInput, is_out_of_memory
from appliance.gpu import chosen
from appliance.home import Home, write_json
from appliance.models import is_quantised, model_path
from appliance.release.adapter import require_trained
from appliance.release.base_answers import ask_base
from appliance.release.fidelity import TIMES_NOISE, Measured, judge_fidelity
from appliance.release.fp8 import round_to_fp8
from appliance.release.gates import UNMEASURED, Gate, Scored, save_served
from appliance.release.held_out import (
    held_out_set,
    judged_on,
    last_stage_rows,
    preferred,
    render,
    render_answered,
)
from appliance.release.manifest import DEQUANTISED, read_manifest, template_of
from appliance.release.merge import SCORES
from appliance.release.oracle import Oracle
from appliance.release.probes import evenly, make_probes
from appliance.release.quality import (
    LEAST_WORSE,
    PLAINLY_WORSE,
    RUINED,
    Comparison,
    Preference,
    judge_quality,
)
from appliance.release.rounding import Rounding
from appliance.release.scores import Scores, score
from appliance.release.streaming import load_to_score, make_writable
from appliance.release.structure import judge_layout, judge_weights
from appliance.release.weights import DTYPES, layout
from appliance.train.events import EventLog
from appliance.train.model import DTYPE, release_memory
from appliance.train.recipe import Recipe

SERVED_CONVERSATIONS = 16
SERVED_LONGEST = 2048
"""Tokens of a conversation that every engine's context has room for."""
LEAST_SERVED = 0.02
"""Nats by which an engine's kernels alone may set its log-probabilities apart."""
TIMES_FP8 = 1.2
"""How many times what FP8 does to a model counts as the same model: its noise is large, and alike in all roundings."""
FP8_SCATTER = 5.0
"""What is added to that for an average over few tokens, times the root of their number."""


def verify_stage(home: Home, run: Path, recipe: Recipe, events: EventLog, live: str) -> dict[str, Any]:
    """Judge gates 1, 2 and 5 on `merge/model/` of the run and write `verify/probes.json`; returns the stage's figures.

    `live` is the id of the release that answers now, or empty: then the base is what the release is compared with.
    """
    base = model_path(home, recipe.base)
    model_folder = run / "merge" / "model"
    tokenizer = load_tokenizer(base, recipe.template)
    probes = make_probes(home, recipe, tokenizer)
    if recipe.only_nudges:
        probes = ask_base(base, tokenizer, probes, events)
    write_json(run / "verify" / "probes.json", [asdict(probe) for probe in probes])

    gates = {"structure": judge_layout(base, model_folder)}
    if gates["structure"].passed and not recipe.changes_weights:
        nothing = Gate(True, {}, "nothing was trained: the release is the base")
        structure = judge_weights(base, model_folder, None, lambda *_: None)
        gates = {"structure": structure, "fidelity": nothing, "quality": nothing}
    elif gates["structure"].passed:
        gates = _measure(home, run, recipe, base, tokenizer, live)
    if not gates["structure"].passed:
        unmeasured = Gate(False, {}, f"{UNMEASURED}the structure is wrong")
        gates |= {"fidelity": unmeasured, "quality": unmeasured}
    for name, gate in gates.items():
        events.append("gate", "verify", gate=name, **asdict(gate))
    return {"gates": {name: asdict(gate) for name, gate in gates.items()}}


def _measure(home: Home, run: Path, recipe: Recipe, base: Path, tokenizer: Any, live: str) -> dict[str, Gate]:
    """Gates 1, 2 and 5 of a merged model whose files are laid out as the base's."""
    folder = run / "merge" / "model"
    if not (run / "merge" / SCORES).exists():
        raise InvalidInput("merged_before", "the run was merged by an earlier version", "queue its recipe again")
    require_trained(folder / "adapter", run, recipe)
    measured = Measured.load(run / "merge" / SCORES)
    chosen, answered = held_out_set(home, recipe, tokenizer), last_stage_rows(home, recipe, tokenizer)
    conversations = [*render(tokenizer, chosen.conversations), *render_answered(tokenizer, answered)]
    count = len(chosen.conversations)
    preference = preferred(home, recipe, tokenizer)
    answers = [preference.good, preference.bad] if preference else []
    lived, theirs = _live_set(home, recipe, live, tokenizer)
    kept = json.loads((run / "merge" / "result.json").read_bytes())["kept"]
    oracle = Oracle(folder / "adapter", base, rounded=kept == DEQUANTISED)

    model = load_to_score(folder)
    own = score(model, conversations, measured.merged_into.ids)
    own_of_live = score(model, lived) if lived else None
    own_of_answers = [score(model, render(tokenizer, rows)) for rows in answers]
    make_writable(model, run / "verify")
    structure = judge_weights(base, folder, oracle, partial(_round_again, model, oracle, _coarser(folder)))
    if not structure.passed:
        return {"structure": structure}
    noisy = score(model, conversations, own.ids)
    if asked := _asked(conversations, measured.merged_into):
        limit = TIMES_NOISE * _mean_apart(measured.merged_into.logps, noisy.logps) + LEAST_SERVED
        save_served(run, [one for _, one in asked], limit, _fp8_limit(model, folder, asked))
    del model, oracle
    release_memory()
    fidelity = judge_fidelity(measured, own, noisy, [row.sign for row in answered], count)

    rival = _rival(home, recipe, live, [chosen.conversations, *answers])
    its, *its_of_answers = [score(rival.model, rows) for rows in rival.sets]
    remembered, prefers = None, None
    if own_of_live and rival.live:
        remembered = Comparison(own_of_live, score(rival.model, theirs))
    if preference:
        good, bad = map(Comparison, own_of_answers, its_of_answers)
        prefers = Preference(good, bad, preference.pairs)
    quality = judge_quality(
        rival.name,
        Comparison(own.part(0, count), its),
        least=_least_worse(recipe, plain=chosen.plain),
        preference=prefers,
        lived=remembered,
        limit=recipe.forgetting_limit,
    )
    return {"structure": structure, "fidelity": fidelity, "quality": quality}


def _least_worse(recipe: Recipe, *, plain: bool) -> float:
    """Nats a token from which a higher loss on the held-out set counts."""
    if plain or recipe.only_nudges:
        return RUINED
    return LEAST_WORSE if not recipe.stages or recipe.stages[-1].method == "sft" else PLAINLY_WORSE


@torch.no_grad()
def _round_again(model: Any, oracle: Oracle, dtype: torch.dtype, name: str, exact: torch.Tensor) -> None:
    """Give the loaded model the values of a stored tensor as other draws would have rounded them."""
    rounding = Rounding(f"{name} again", tuple(exact.shape), dtype)
    again = torch.empty_like(exact, dtype=dtype)
    oracle.values(model, name).copy_(rounding(exact.clone(), slice(0, len(exact)), out=again))


def _asked(conversations: list[Conversation], adapter: Scores) -> list[tuple[Rendered, Scored]]:
    """Some conversations, spread over all, for the engine to say how likely it finds them."""
    examples = [example for conversation in conversations for example in conversation]
    logps = torch.split(adapter.logps, [sum(example.trained[1:]) for example in examples])
    short = [pair for pair in zip(examples, logps, strict=True) if len(pair[0].input_ids) <= SERVED_LONGEST]
    return [
        (row, Scored(row.input_ids, [at for at, trained in enumerate(row.trained) if trained and at], said.tolist()))
        for row, said in evenly(short, SERVED_CONVERSATIONS)
    ]


def _fp8_limit(model: Any, folder: Path, asked: list[tuple[Rendered, Scored]]) -> float | None:
    """Nats that an engine which serves the model in FP8 may be apart from the adapter; None where none can here.

    `model` has the weights that PEFT computes, and those in FP8 afterwards.
    """
    card = chosen()
    if card is None or not card.holds_fp8 or is_quantised(folder):
        return None
    round_to_fp8(model, inputs=card.multiplies_fp8)
    said = score(model, [[row] for row, _ in asked]).logps
    adapter = torch.tensor([logp for _, one in asked for logp in one.logps])
    return (TIMES_FP8 + FP8_SCATTER / math.sqrt(len(adapter))) * _mean_apart(adapter, said) + LEAST_SERVED


def _mean_apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Nats between two models' log-probabilities of the same tokens, on average."""
    return float((one - other).abs().mean())


@dataclass(frozen=True)
class _Rival:
    """The model that the release has to match."""

    name: str
    model: Any
    sets: list[list[Conversation]]
    """What both are judged on, through its own template."""
    live: bool


def _rival(home: Home, recipe: Recipe, live: str, judged: list[list[Row]]) -> _Rival:
    """The live release, else the base, and the sets of conversations that both are judged on.

    A live release that cannot be read, or not be told these conversations, must not keep another from taking its place.
    """
    if live:
        folder = home.releases / live
        try:
            tokenizer = load_tokenizer(folder, template_of(read_manifest(home, live)))
            rendered = [render(tokenizer, rows) for rows in judged]
            return _Rival(f"the live release {live}", load_to_score(folder), rendered, live=True)
        except Exception as error:  # running out of memory has many names
            if not (isinstance(error, ApplianceError) or is_out_of_memory(error)):
                raise
            print(f"the live release is not what this one is compared with: {error}", file=sys.stderr)
    release_memory()
    base = model_path(home, recipe.base)
    tokenizer = load_tokenizer(base, recipe.template)
    rendered = [render(tokenizer, rows) for rows in judged]
    return _Rival(f"the base {recipe.base}", load_to_score(base), rendered, live=False)


def _live_set(home: Home, recipe: Recipe, live: str, tokenizer: Any) -> tuple[list[Conversation], list[Conversation]]:
    """The live release's own held-out set through `tokenizer` and through its own.

    Empty where it has none that is here, is another than that of the run, and that both models can be told.
    """
    try:
        manifest = read_manifest(home, live)
        its_recipe = Recipe.model_validate(manifest["recipe"])
        same = judged_on(its_recipe) == judged_on(recipe) and its_recipe.eval_share == recipe.eval_share
        if judged_on(its_recipe) is None or same:
            return [], []
        theirs = load_tokenizer(home.releases / live, template_of(manifest))
        found = held_out_set(home, its_recipe, theirs)
        rows = found.conversations if found.held_out else []
        return render(tokenizer, rows), render(theirs, rows)
    except (ApplianceError, ValueError):  # there is none, its dataset is gone, or its recipe is another version's
        return [], []


def _coarser(model: Path) -> torch.dtype:
    """The coarser of the types in which a model's weights are stored and computed with."""
    stored = {DTYPES[dtype] for _, _, dtype in layout(model).values() if dtype in DTYPES}
    return max((*stored, DTYPE), key=lambda dtype: torch.finfo(dtype).eps)
