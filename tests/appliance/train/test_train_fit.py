"""What training would refuse is refused when a recipe is queued, as far as it can be known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from appliance.data.dataset import Dataset
from appliance.errors import InvalidInput
from appliance.train.fit import require_fit
from appliance.train.recipe import DpoStage, KtoStage, SftStage


def dataset(kind: Any, **tokens: Any) -> Dataset:
    report = {"findings": [], "tokens": tokens or None}
    return Dataset("d-1", kind, Path(), [], report)  # type: ignore[arg-type]


STAGES = {
    "messages": SftStage(method="sft", name="s", dataset="d-1", max_length=64),
    "preference": DpoStage(method="dpo", name="s", dataset="d-1"),
    "unpaired": KtoStage(method="kto", name="s", dataset="d-1"),
}


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_method_trains_on_rows_of_its_kind(kind: str, stage: str) -> None:
    if kind == stage:
        return require_fit(STAGES[stage], dataset(kind), "tiny")
    says = f"{STAGES[stage].method} trains on {stage} rows, and dataset mine holds {kind} rows"
    with pytest.raises(InvalidInput, match=says):
        require_fit(STAGES[stage], dataset(kind), "tiny", "mine")


def test_rows_that_were_counted_as_too_long_are_told() -> None:
    found = dataset("messages", base="tiny", lengths=[[60, 3], [64, 1], [65, 2], [90, 1]])
    with pytest.raises(
        InvalidInput, match="3 rows of mine are longer than max_length = 64 tokens in stage s"
    ) as caught:
        require_fit(STAGES["messages"], found, "tiny", "mine")
    assert caught.value.next.startswith("set max_length = 90, or drop_long = true")
    require_fit(STAGES["messages"], found, "another base")
    require_fit(STAGES["messages"].model_copy(update={"drop_long": True}), found, "tiny")
    require_fit(STAGES["messages"].model_copy(update={"max_length": 90}), found, "tiny")
