"""Whether an adapter from elsewhere fits a base: `python -m appliance.release.given HOME_ROOT REQUEST RESULT`.

What the merge would refuse it for, before a run is queued: tensors that the base has no place for, or too few of them.
A process of its own, because it needs torch.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from appliance.errors import ApplianceError, InvalidInput, reason
from appliance.home import Home, write_json
from appliance.models import model_path


class GivenRequest(BaseModel):
    """The directory of the adapter, and the base that it is for."""

    adapter: Path
    base: str


def main(home_root: Path, request: Path, result: Path) -> None:
    """Leave {} in `result`, or {"problem"}."""
    from appliance.release.adapter import read_changes, require_complete

    asked = GivenRequest.model_validate_json(request.read_bytes())
    outcome: dict[str, Any] = {}
    try:
        base = model_path(Home(home_root), asked.base)
        read_changes(asked.adapter, base)
        require_complete(asked.adapter, base)
    except ApplianceError as error:
        outcome["problem"] = error.problem()
    except Exception as error:  # whatever PEFT raises of settings that it does not know
        outcome["problem"] = InvalidInput(
            "not_mergeable", f"the adapter cannot be put on {asked.base}: {reason(error)}", "save it with PEFT again"
        ).problem()
    write_json(result, outcome)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
