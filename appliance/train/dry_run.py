"""What a run would take: `python -m appliance.train.dry_run HOME_ROOT REQUEST_JSON RESULT_JSON`.

A process of its own, because the models' code is more than the daemon should hold.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from appliance.errors import ApplianceError, reason
from appliance.home import Home, write_json
from appliance.train.recipe import AnyStage, Recipe, parse_recipe


class DryRunRequest(BaseModel):
    """A recipe, with its datasets by id and its learning rates, and the bytes that are freed before it would train.

    `names`: what each dataset is called. Without `forecast` only the rows are looked at.
    """

    recipe: str
    names: dict[str, str]
    freed: int = 0
    forecast: bool = True


def main(home_root: Path, request: Path, result: Path) -> None:
    """Leave {"stages"}, a forecast a training stage, or {"problem"} in `result`."""
    asked = DryRunRequest.model_validate_json(request.read_bytes())
    try:
        recipe, home = parse_recipe(asked.recipe), Home(home_root)
        outcome: dict[str, Any] = {"stages": [_looked_at(home, recipe, stage, asked) for stage in recipe.stages]}
    except ApplianceError as error:
        outcome = {"problem": error.problem()}
    except Exception as error:  # whatever a model's code raises is told, not the death of a process
        outcome = {"problem": ApplianceError("internal", reason(error), "see the daemon's log").problem()}
        traceback.print_exc()
    write_json(result, outcome)


def _looked_at(home: Home, recipe: Recipe, stage: AnyStage, asked: DryRunRequest) -> dict[str, Any]:
    """The forecast of a stage, if one is asked for. Raises ApplianceError, naming stage and dataset."""
    from appliance.train.stage import forecast_of, require_rows

    try:
        if asked.forecast:
            return {"stage": stage.name, **forecast_of(home, recipe, stage.name, asked.freed).event()}
        require_rows(home, recipe, stage.name)
        return {"stage": stage.name}
    except ApplianceError as error:
        error.message = f"stage {stage.name}, dataset {asked.names[stage.dataset]}: {error.message}"
        raise


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
