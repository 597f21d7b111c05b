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
from appliance.train.recipe import parse_recipe


class DryRunRequest(BaseModel):
    """A recipe, with its datasets by id and its learning rates, and the bytes that are freed before it would train."""

    recipe: str
    freed: int = 0


def main(home_root: Path, request: Path, result: Path) -> None:
    """Leave {"stages"}, a forecast a training stage, or {"problem"} in `result`."""
    from appliance.train.stage import forecast_of

    asked = DryRunRequest.model_validate_json(request.read_bytes())
    try:
        recipe, home = parse_recipe(asked.recipe), Home(home_root)
        forecasts = {one.name: forecast_of(home, recipe, one.name, asked.freed) for one in recipe.stages}
        outcome: dict[str, Any] = {"stages": [{"stage": name, **one.event()} for name, one in forecasts.items()]}
    except ApplianceError as error:
        outcome = {"problem": error.problem()}
    except Exception as error:  # whatever a model's code raises is told, not the death of a process
        outcome = {"problem": ApplianceError("internal", reason(error), "see the daemon's log").problem()}
        traceback.print_exc()
    write_json(result, outcome)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
