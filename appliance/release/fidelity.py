"""Gate 2: the merged files say what the adapter says, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from appliance.release.gates import Gate
from appliance.release.quality import worse
from appliance.release.scores import Scores, divergence
from appliance.statistics import paired

TIMES_NOISE = 4.0
"""How many times what rounding does to a model counts as the same model."""
LEAST_DIVERGENCE = 1e-6
LEAST_DIFFERENCE = 5e-3
"""Nats below which a mean divergence and a single log-probability are never told apart."""
MARGIN_KEPT = 0.03
"""Share of the margin that may be lost or won."""
MARGIN_NOISE = 2.0
"""How many times the noise of a single answer the margin may be off besides."""


@dataclass(frozen=True)
class Measured:
    """What the merge stage has found out about the adapter, for the verify stage to hold the merged files against."""

    trained: Scores
    """The adapter on the base that it was trained on: the held-out set, then the last stage's conversations."""
    merged_into: Scores
    """The adapter on the base that it was merged into: `trained`, where that is the same."""
    reference: torch.Tensor
    """[tokens of the last stage's conversations] log-probabilities before the last stage; empty where nobody asks."""

    def save(self, path: Path) -> None:
        """Write everything to `path`."""
        parts = {"trained": self.trained}
        if self.merged_into is not self.trained:
            parts["merged_into"] = self.merged_into
        # Both may hold the same tensor of ids, which the format does not take twice.
        tensors = {
            f"{part}.{name}": value.clone() for part, scores in parts.items() for name, value in vars(scores).items()
        }
        save_file({**tensors, "reference": self.reference}, path)

    @classmethod
    def load(cls, path: Path) -> Measured:
        """What `save` has written."""
        tensors = load_file(path)
        names = [field.name for field in fields(Scores)]
        trained, merged_into = (
            Scores(*(tensors[f"{part}.{name}"] for name in names)) if f"{part}.tokens" in tensors else None
            for part in ("trained", "merged_into")
        )
        assert trained is not None
        return cls(trained, merged_into or trained, tensors["reference"])


@dataclass(frozen=True)
class Apart:
    """How far two models are apart over some tokens."""

    mean_divergence: float
    """KL divergence in nats a token."""
    largest_difference: float
    """Nats between the two log-probabilities of a token that is there."""

    @classmethod
    def of(cls, expected: Scores, found: Scores) -> Apart:
        """How far `found` is from `expected`, both of the same conversations."""
        return cls(
            float(divergence(expected, found).mean()), float((expected.logps - found.logps).double().abs().max())
        )

    def limit(self) -> Apart:
        """Up to where two models are the same, where noise sets them as far apart as this."""
        return Apart(
            TIMES_NOISE * self.mean_divergence + LEAST_DIVERGENCE,
            TIMES_NOISE * self.largest_difference + LEAST_DIFFERENCE,
        )

    def within(self, limit: Apart) -> bool:
        """Whether neither figure is above that of `limit`, or no number."""
        return self.mean_divergence <= limit.mean_divergence and self.largest_difference <= limit.largest_difference


def judge_fidelity(measured: Measured, own: Scores, noisy: Scores, signs: Sequence[int], held_out: int) -> Gate:
    """Judge the merged files' scores `own`; the first `held_out` conversations are the held-out set.

    `noisy` are those of the weights that PEFT computes, rounded with other draws: how far rounding alone sets a model
    from the adapter, in the precision in which both are scored. `signs` are the last stage's (Answered.sign).
    """
    apart = Apart.of(measured.merged_into, own)
    limit = Apart.of(measured.merged_into, noisy).limit()
    figures: dict[str, Any] = {
        "conversations": len(own.tokens),
        "tokens": len(own.logps),
        **asdict(apart),
        "limits": asdict(limit),
        "adapter_loss": measured.trained.part(0, held_out).loss,
        "merged_loss": own.part(0, held_out).loss,
    }
    faults = []
    if not apart.within(limit):
        faults.append(
            f"a token's divergence from the adapter is {apart.mean_divergence:.2g} nats on average and its "
            f"log-probability at most {apart.largest_difference:.2g} apart, above what rounding makes of it, "
            f"{limit.mean_divergence:.2g} and {limit.largest_difference:.2g}"
        )
    if any(signs):
        margin, fault = _judge_margin(measured, own, noisy, signs, held_out)
        figures["margin"] = margin
        faults += fault
    if measured.merged_into is not measured.trained:
        figures["divergence_from_training_base"] = Apart.of(measured.trained, own).mean_divergence
        theirs = measured.trained.part(0, held_out).nats()
        found = paired(own.nats()[:held_out], theirs, own.tokens[:held_out].tolist())
        figures["over_training_base"] = {"difference": found.difference, "p_worse": found.p_worse}
        if worse(found, held_out):
            faults.append(f"on the base as published the loss is {found.difference:.2g} nats a token higher")
    if faults:
        return Gate(False, figures, "; ".join(faults))
    margin = figures.get("margin", {}).get("kept")
    kept = "" if margin is None else f", {margin:.1%} of the margin kept"
    return Gate(
        True,
        figures,
        f"a token's divergence from the adapter is {apart.mean_divergence:.2g} nats on average, with a limit of "
        f"{limit.mean_divergence:.2g} by rounding's noise, over {len(own.logps)} tokens{kept}",
    )


def _judge_margin(
    measured: Measured, own: Scores, noisy: Scores, signs: Sequence[int], held_out: int
) -> tuple[dict[str, float], list[str]]:
    """The margin of the adapter and of the merged files over the reference in nats an answer, and what is wrong."""
    last = slice(held_out, None)
    reference = _answers(measured.reference, own.tokens[last])
    said = [
        _answers(scores.part(held_out, len(scores.tokens)).logps, own.tokens[last])
        for scores in (measured.merged_into, own, noisy)
    ]
    adapter, merged = (_margin(answers - reference, signs) for answers in said[:2])
    # Errors of one rounding may go the same way in all answers: their mean may be as far off as one of them.
    noise = float((said[0] - said[2]).square().mean().sqrt())
    allowed = MARGIN_KEPT * abs(adapter) + MARGIN_NOISE * noise + LEAST_DIFFERENCE
    figures = {"adapter": adapter, "merged": merged, "allowed": allowed}
    if abs(adapter) > LEAST_DIFFERENCE:
        figures["kept"] = merged / adapter
    if abs(merged - adapter) <= allowed:
        return figures, []
    return figures, [f"the margin over the reference is {merged:.3f} nats merged and {adapter:.3f} with the adapter"]


def _answers(logps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """[conversations] log-probability of each one's trained tokens together."""
    return torch.stack([part.double().sum() for part in torch.split(logps, tokens.tolist())])


def _margin(gains: torch.Tensor, signs: Sequence[int]) -> float:
    """How much likelier the good answers have become than the bad ones, on average."""
    kinds = torch.tensor(signs)
    means = [float(gains[kinds == kind].mean()) if (kinds == kind).any() else 0.0 for kind in (1, -1)]
    return means[0] - means[1]
