"""Gate 1: the files of a release are the base's, but for weights that PEFT itself would have merged to the same."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from appliance.data.tokenizer import load_tokenizer
from appliance.release.gates import Gate
from appliance.release.merge import GENERATION_CONFIG, OURS, generation_config
from appliance.release.oracle import Oracle
from appliance.release.rounding import DROPPED_BITS, Rounding
from appliance.release.weights import layout, pairs
from appliance.train.model import stop_token_ids

UNITS_APART = 8
"""Units in fp32's last place by which a value may differ with the order in which it is added up. Of a step between two
neighbours of a 16-bit type that is the share of values that may be rounded to the other neighbour for it."""
FEW = 2
"""So many may in a small tensor too."""
IN_FP32 = 2.0**-20
"""By how much fp32 values may differ, relative to what they were added up from, which may nearly cancel."""
UPDATE_KEPT = 0.02
"""By how much the share of the update that is in the files may differ from 1, beyond what rounding explains."""
DEVIATIONS = 5.0
"""Standard deviations within which what rounding does by chance lies."""


@dataclass
class _Update:
    """Sums over all targeted weights, of which d is what the adapter adds and e what rounding has added to that."""

    along: float = 0.0
    """Of (d + e) * d."""
    squared: float = 0.0
    """Of d * d."""
    variance: float = 0.0
    """Of d * d times the largest variance of e."""

    def add(self, start: torch.Tensor, merged: torch.Tensor, stored: torch.Tensor) -> None:
        delta = merged - start
        steps = merged * (torch.finfo(stored.dtype).eps / 2)
        self.along += float((stored.float() - start).mul_(delta).sum(dtype=torch.float64))
        self.variance += float(steps.mul_(delta).square_().sum(dtype=torch.float64))
        self.squared += float(delta.square_().sum(dtype=torch.float64))

    def fault(self) -> str:
        allowed = UPDATE_KEPT + DEVIATIONS * math.sqrt(self.variance) / self.squared if self.squared else 0.0
        if abs(self.kept - 1) <= allowed:
            return ""
        return f"{self.kept:.1%} of the update is in the files, and rounding explains {allowed:.1%} to be amiss"

    @property
    def kept(self) -> float:
        """Share of the update that is in the files, as the projection of what was stored on what should be."""
        return self.along / self.squared if self.squared else 1.0


def judge_layout(base: Path, model: Path) -> Gate:
    """Hold what can be told without reading a weight in `model` against the base: files, names, shapes and types."""
    if reason := differing_file(base, model):
        return Gate(False, {}, reason)
    expected, found = layout(base), layout(model)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            was, now = expected.get(name, "absent"), found.get(name, "absent")
            return Gate(False, {"tensor": name}, f"{name} is {now} in the release, {was} in the base")
    return Gate(True, {"tensors": len(found)}, f"{len(found)} tensors as in the base")


def judge_weights(base: Path, model: Path, oracle: Oracle | None, see: Callable[[str, torch.Tensor], None]) -> Gate:
    """Hold every weight in `model`, laid out as in the base, against the base's and the `oracle`'s.

    `see` is told each changed tensor's name and its values before they were rounded (fp32), to be left as they are.
    """
    targeted, changed = (oracle.targeted, oracle.changed) if oracle else (set[str](), set[str]())
    update, otherwise, values, tensors = _Update(), 0, 0, 0
    for name, before, after in pairs(base, model):
        tensors += 1
        if not torch.isfinite(after).all():
            return Gate(False, {"tensor": name}, f"{name} holds values that are not finite")
        if oracle is None or name not in changed:
            if not _same_bytes(before, after):
                return Gate(False, {"tensor": name}, f"{name} is changed, and nothing was trained that changes it")
            continue
        start = oracle.start(name, before)
        merged = oracle.merged(name, start)
        see(name, merged)
        count, far = _differing(name, start, merged, after)
        values, otherwise = values + after.numel(), otherwise + count
        if far or count > _otherwise(after):
            what = f"{count} of {after.numel()} values, {far} of them by more than a unit in the last place"
            return Gate(False, {"tensor": name}, f"{name} is not the base's with the adapter merged in: {what} differ")
        if name in targeted:
            update.add(start, merged, after)
    figures: dict[str, Any] = {"tensors": tensors, "targeted": len(targeted), "rounded": len(changed - targeted)}
    if not targeted:
        return Gate(True, figures, f"{tensors} tensors as in the base")
    figures |= {"values": values, "otherwise_rounded": otherwise, "update_kept": update.kept}
    if update.squared == 0:
        return Gate(False, figures, "the adapter changes nothing")
    if fault := update.fault():
        return Gate(False, figures, fault)
    return Gate(
        True,
        figures,
        f"{tensors} tensors as in the base, {len(targeted)} of them with the adapter merged in as PEFT computes it",
    )


def _differing(name: str, start: torch.Tensor, merged: torch.Tensor, stored: torch.Tensor) -> tuple[int, int]:
    """How many stored values are not the rounding of `merged`, and how many of them not even a neighbour of it."""
    allowed = (start.abs() + merged.abs() + (merged - start).abs().max()).mul_(IN_FP32)
    if stored.dtype not in DROPPED_BITS:
        far = int(((stored.float() - merged).abs() > allowed).sum())
        return far, far
    rounding = Rounding(name, tuple(merged.shape), stored.dtype)
    rounded = rounding(merged.clone(), slice(0, len(merged)), out=torch.empty_like(stored))
    wrong = rounded != stored
    count = int(wrong.sum())
    if not count:
        return 0, 0
    exact, kept = merged[wrong], stored[wrong].float()
    # A neighbour is less than a step away, of the value or of the type's subnormal numbers.
    step = exact.abs() * torch.finfo(stored.dtype).eps + torch.finfo(stored.dtype).smallest_normal * 1e-3
    return count, int(((kept - exact).abs() > step + allowed[wrong]).sum())


def _otherwise(stored: torch.Tensor) -> float:
    """How many of the values two honest computations may round to different neighbours."""
    if stored.dtype not in DROPPED_BITS:
        return 0.0
    expected = stored.numel() * UNITS_APART / 2.0 ** DROPPED_BITS[stored.dtype]
    return max(FEW, expected + DEVIATIONS * math.sqrt(expected))


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))


def differing_file(base: Path, model: Path) -> str:
    """What is wrong with the files beside the weights; empty where tokenizer, template and settings are the base's."""
    its, ours = ({path.name for path in folder.iterdir() if path.is_file()} - OURS for folder in (base, model))
    for name in sorted(its | ours):
        if name not in its:
            return f"{name} is a file that the base has not"
        if name.endswith(".safetensors") and name in ours:
            continue
        if name not in ours or (model / name).read_bytes() != (base / name).read_bytes():
            return f"{name} is not the base's"
    said = json.loads((model / GENERATION_CONFIG).read_bytes())
    if said == generation_config(base):
        return ""
    stops, found = stop_token_ids(load_tokenizer(base), base), said.get("eos_token_id")
    if missing := sorted(set(stops) - set(found if isinstance(found, list) else [found])):
        return f"{GENERATION_CONFIG} lacks the end-of-turn tokens {missing}"
    return f"{GENERATION_CONFIG} is not the base's with the tokens that end an answer"
