"""Faults of a merge: other changes to the base than those of the run's adapter, written as the merge writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from appliance.home import Home
from appliance.models import model_path
from appliance.release.adapter import LowRank, Rounded, read_changes, rounded_changes
from appliance.release.manifest import DEQUANTISED
from appliance.release.weights import Change, write_weights
from appliance.train.recipe import Recipe

Changes = dict[str, Change]


@dataclass(frozen=True)
class Merged:
    """A run that has merged: its base, the changes of its last adapter, and those of the stage before, if any."""

    base: Path
    changes: Changes
    before: Changes | None


def _on(changes: Changes, where: Callable[[str], bool], change: Callable[[str, LowRank], LowRank]) -> Changes:
    """`changes` with `change` made to the low-rank part of those whose name is as `where` says."""

    def changed(name: str, found: Change) -> Change:
        if isinstance(found, Rounded):
            return replace(found, then=changed(name, found.then)) if found.then is not None else found
        return change(name, found) if isinstance(found, LowRank) and where(name) else found

    return {name: changed(name, found) for name, found in changes.items()}


def _scaled(factor: float) -> Callable[[Merged], Changes]:
    return lambda run: _on(run.changes, lambda _: True, lambda _, part: replace(part, scale=factor * part.scale))


def _negated(where: Callable[[str], bool]) -> Callable[[Merged], Changes]:
    return lambda run: _on(run.changes, where, lambda _, part: replace(part, scale=-part.scale))


def _noise(where: Callable[[str], bool]) -> Callable[[Merged], Changes]:
    """Random factors of the same size in place of what was learnt."""

    def shuffled(name: str, part: LowRank) -> LowRank:
        draw = torch.Generator().manual_seed(len(name))
        left, right = (
            torch.randn(factor.shape, generator=draw) * factor.square().mean().sqrt()
            for factor in (part.left, part.right)
        )
        return replace(part, left=left, right=right)

    return lambda run: _on(run.changes, where, shuffled)


def _swapped(run: Merged) -> Changes:
    """The updates of q_proj of two neighbouring layers, each in the other's place."""
    last = max(_layer(name) for name in run.changes)
    one, other = (f"model.layers.{number}.self_attn.q_proj.weight" for number in (last // 3, last // 3 + 1))
    parts = {name: _low_rank(run.changes[name]) for name in (one, other)}
    return _on(run.changes, parts.__contains__, lambda name, _: parts[other if name == one else one])


def _forgotten(run: Merged) -> Changes:
    """One weight left as the base has it."""
    name = max(run.changes)
    return {other: change for other, change in run.changes.items() if other != name}


@dataclass(frozen=True)
class _Shifted:
    """One per cent more."""

    whole: bool = False

    def fits(self, shape: tuple[int, ...]) -> bool:
        return True

    def __call__(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        return weight.mul_(1.01)


def _low_rank(change: Change | None) -> LowRank:
    if isinstance(change, Rounded):
        return _low_rank(change.then)
    assert isinstance(change, LowRank)
    return change


def _layer(name: str) -> int:
    return int(name.split(".")[2])


def _middle(run: Merged) -> Changes:
    chosen = max(_layer(name) for name in run.changes) // 6
    return _negated(lambda name: _layer(name) == chosen)(run)


def _other_stage(run: Merged) -> Changes:
    assert run.before is not None
    return run.before


FAULTS: dict[str, Callable[[Merged], Changes]] = {
    "another stage's adapter": _other_stage,
    "alpha x 0.9": _scaled(0.9),
    "alpha x 0.8": _scaled(0.8),
    "alpha x 0.7": _scaled(0.7),
    "alpha x 1.25": _scaled(1.25),
    "alpha x 1.5": _scaled(1.5),
    "q_proj of two layers swapped": _swapped,
    "one layer with the wrong sign": _middle,
    "k_proj with the wrong sign": _negated(lambda name: "k_proj" in name),
    "k_proj replaced by noise": _noise(lambda name: "k_proj" in name),
    "v_proj with the wrong sign": _negated(lambda name: "v_proj" in name),
    "one layer replaced by noise": _noise(lambda name: ".layers.1." in name),
    "one weight forgotten": _forgotten,
    "a norm changed by one per cent": lambda run: {**run.changes, "model.norm.weight": _Shifted()},
}
"""What each does to the files of a run that has merged."""


def merged(home: Home, run: Path, recipe: Recipe, kept: str) -> Merged:
    """What is needed to plant a fault in a run."""
    base = model_path(home, recipe.base)
    previous = recipe.parent(recipe.stages[-1].name)

    def changes(adapter: Path) -> Changes:
        found = read_changes(adapter, base)
        return rounded_changes(base, found) if kept == DEQUANTISED else found

    before = changes(run / previous / "adapter") if previous else None
    return Merged(base, changes(recipe.last_adapter(run)), before)


def plant(run: Merged, fault: str, folder: Path) -> None:
    """Write the weights into `folder` with the fault, over what is there."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    write_weights(run.base, folder, FAULTS[fault](run))
