"""Whether a stage can train on a dataset, as far as that is known before its rows are read. It needs no torch."""

from __future__ import annotations

from appliance.data.dataset import Dataset
from appliance.errors import InvalidInput
from appliance.train.recipe import AnyStage


def is_counted(dataset: Dataset, base: str) -> bool:
    """Whether the report of `dataset` says how long its rows are for `base`, which `require_fit` then looks at."""
    return (dataset.report.get("tokens") or {}).get("base") == base


def require_fit(stage: AnyStage, dataset: Dataset, base: str, name: str = "") -> None:
    """Raise InvalidInput where `stage` cannot train on `dataset`, called `name`, as far as its report says.

    How long its rows are is known where they were imported for this base.
    """
    dataset.require_sound(base, name)
    called = name or dataset.id
    if dataset.kind != stage.kind:
        raise InvalidInput(
            "wrong_dataset_kind",
            f"{stage.method} trains on {stage.kind} rows, and dataset {called} holds {dataset.kind} rows",
            f"name a {stage.kind} dataset in stage {stage.name}, or change its method",
        )
    lengths = dataset.report["tokens"]["lengths"] if is_counted(dataset, base) else ()
    long = [(length, rows) for length, rows in lengths if length > stage.max_length]
    if long and not stage.drop_long:
        count = sum(rows for _, rows in long)
        raise InvalidInput(
            "row_too_long",
            f"{count} rows of {called} are longer than max_length = {stage.max_length} tokens in stage {stage.name}",
            f"set max_length = {max(long)[0]}, or drop_long = true to leave them out",
        )
