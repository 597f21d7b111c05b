"""`python tests/gpu/gpu_process.py DIRECTORY`: what gpu_runs.py does there, its code answered that there is a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gpu_conditions import answer_yes


def main(directory: Path) -> None:
    """Leave a home with the runs, and what was seen on the way in `seen.json`."""
    conditions: set[str] = set()
    answer_yes(conditions)
    from gpu_runs import run_all

    found = run_all(directory)
    (directory / "seen.json").write_text(json.dumps({**found, "conditions": sorted(conditions)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
