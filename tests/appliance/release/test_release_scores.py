"""How likely a model finds conversations, and how far two models are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_model

from appliance.data.render import Rendered
from appliance.release import scores
from appliance.release.scores import LIKELIEST, divergence, score
from appliance.train.model import load_model

EXAMPLES = [
    Rendered([1, 40, 60, 80, 100, 2], [False, False, True, True, True, True]),
    Rendered([1, 5, 15], [False, False, True]),
    Rendered([1, 7, 8, 9, 10, 11, 12, 13, 14, 2], [False, True, True, False, False, True, False, True, True, True]),
]
CONVERSATIONS = [EXAMPLES[:1], EXAMPLES[1:]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_model(make_model(tmp_path_factory.mktemp("scores") / "tiny"))


def distributions(model: Any, row: Rendered) -> torch.Tensor:
    """[trained tokens, vocabulary] log-probabilities, each computed alone."""
    with torch.no_grad():
        logits = model(torch.tensor([row.input_ids])).logits[0]
    places = [place for place, trained in enumerate(row.trained) if trained]
    return torch.stack([torch.log_softmax(logits[place - 1].double(), -1) for place in places])


def test_each_trained_token_has_the_log_probability_that_it_has_alone(model: Any) -> None:
    found = score(model, CONVERSATIONS)
    assert found.tokens.tolist() == [4, 1 + 6]
    wanted = [distributions(model, row) for row in EXAMPLES]
    places = [[t for t, trained in zip(row.input_ids, row.trained, strict=True) if trained] for row in EXAMPLES]
    logps = [of[range(len(ids)), ids] for of, ids in zip(wanted, places, strict=True)]
    assert torch.allclose(found.logps.double(), torch.cat(logps), atol=1e-4)
    assert found.nats() == pytest.approx([-float(logps[0].sum()), -float(torch.cat(logps[1:]).sum())], abs=1e-3)
    assert found.loss == pytest.approx(-float(torch.cat(logps).mean()), abs=1e-4)
    top = torch.cat(wanted).topk(LIKELIEST)
    assert torch.allclose(found.likeliest.double(), top.values, atol=1e-4)
    assert found.part(1, 2).logps.tolist() == found.logps[4:].tolist()


@pytest.mark.parametrize(("name", "value"), [("TOKENS_AT_ONCE", 1), ("LOGITS_AT_ONCE", 1), ("LOGITS_AT_ONCE", 700)])
def test_how_it_is_divided_changes_nothing(model: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: int) -> None:
    whole = score(model, CONVERSATIONS)
    monkeypatch.setattr(scores, name, value)
    parted = score(model, CONVERSATIONS, whole.ids)
    assert torch.allclose(whole.logps, parted.logps, atol=1e-5)
    assert torch.allclose(whole.likeliest, parted.likeliest, atol=1e-5)


def test_the_layers_are_gone_through_once_and_no_more_logits_are_made_than_fit(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "LOGITS_AT_ONCE", 2 * 320)
    monkeypatch.setattr(scores, "TOKENS_AT_ONCE", 1)
    passes, made = [], []
    hooks = [
        model.model.layers[0].register_forward_hook(lambda *_: passes.append(1)),
        model.lm_head.register_forward_hook(lambda module, inputs, output: made.append(output.shape[:2].numel())),
    ]
    score(model, CONVERSATIONS)
    for hook in hooks:
        hook.remove()
    assert (len(passes), max(made), sum(made)) == (3, 2, 4 + 1 + 6)
    assert "forward" not in vars(model.model)


def test_a_model_that_makes_all_logits_is_scored_alike(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = score(model, CONVERSATIONS)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda logits_to_keep=0, **arguments: forward(**arguments))
    whole = score(model, CONVERSATIONS)
    monkeypatch.setattr(model, "base_model_prefix", "none")
    headless = score(model, CONVERSATIONS)
    for found in (whole, headless):
        assert torch.allclose(found.logps, kept.logps, atol=1e-5)
        assert found.ids.tolist() == kept.ids.tolist()


def test_where_memory_runs_out_fewer_rows_are_scored_at_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, rows, forward = score(model, CONVERSATIONS), [], model.forward

    def small(input_ids: torch.Tensor, **arguments: Any) -> Any:
        rows.append(len(input_ids))
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(input_ids=input_ids, **arguments)

    monkeypatch.setattr(model, "forward", small)
    found = score(model, CONVERSATIONS)
    assert rows == [3, 1, 2, 1, 1]
    assert torch.allclose(whole.logps, found.logps, atol=1e-5)

    def none(**_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", none)
    with pytest.raises(torch.OutOfMemoryError):
        score(model, CONVERSATIONS)


def test_the_divergence_is_that_of_distributions_with_the_rest_as_one(model: Any, tmp_path: Path) -> None:
    one = score(model, CONVERSATIONS)
    other_model = load_model(make_model(tmp_path / "other"))
    with torch.no_grad():
        for weight in other_model.parameters():
            weight.mul_(1.01)
    other = score(other_model, CONVERSATIONS, one.ids)
    found = divergence(one, other)
    full = torch.cat([distributions(model, row) for row in EXAMPLES])
    theirs = torch.cat([distributions(other_model, row) for row in EXAMPLES])
    exact = (full.exp() * (full - theirs)).sum(1)
    assert (found <= exact + 1e-6).all()
    assert float(found.mean()) > 0.5 * float(exact.mean()) > 0
    assert float(divergence(one, score(model, CONVERSATIONS, one.ids)).max()) < 1e-9
