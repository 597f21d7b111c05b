"""The head by blocks, against the logits of the whole vocabulary."""

from __future__ import annotations

import pytest
import torch

from appliance.train import head
from appliance.train.head import TrainedLogProbs


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    scale: float,
    heat: float,
) -> torch.Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits / heat, -1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("softcap", "scale", "heat"), [(None, 1.0, 1.0), (None, 0.25, 0.7), (3.0, 1.0, 1.0), (2.0, 0.5, 2.0)]
)
def test_values_and_gradient_are_those_of_the_whole_vocabulary(
    monkeypatch: pytest.MonkeyPatch, bias: bool, softcap: float | None, scale: float, heat: float
) -> None:
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 3 * 50)
    torch.manual_seed(1)
    hidden = torch.randn(10, 8, requires_grad=True)
    weight, shift = torch.randn(50, 8), torch.randn(50) if bias else None
    targets, upstream = torch.randint(50, (10,)), torch.randn(10)

    log_probs, *_ = TrainedLogProbs.apply(hidden, weight, shift, targets, heat, 7, softcap, scale, ())
    expected = reference(hidden, weight, shift, softcap, scale, heat).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(log_probs, expected)
    (gradient,) = torch.autograd.grad(log_probs, hidden, upstream)
    torch.testing.assert_close(gradient, *torch.autograd.grad(expected, hidden, upstream))


def test_without_a_gradient_there_is_none_and_no_token_is_no_error() -> None:
    weight = torch.randn(50, 8)
    with torch.no_grad():
        log_probs, *_ = TrainedLogProbs.apply(torch.randn(4, 8), weight, None, torch.arange(4), 1.0, 7)
    assert not log_probs.requires_grad
    assert TrainedLogProbs.apply(torch.randn(0, 8), weight, None, torch.arange(0), 1.0, 7)[0].shape == (0,)
