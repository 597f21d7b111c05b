"""Rows as a base model is trained on them: `python -m appliance.data.preview HOME_ROOT REQUEST_JSON RESULT_JSON`.

A process of its own, because a tokenizer is more than the daemon should hold.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from appliance.data.dataset import Dataset, Row
from appliance.data.render import Rendered, render_conversation
from appliance.data.requests import PreviewRequest
from appliance.data.template_input import special_ids
from appliance.data.tokenizer import load_tokenizer
from appliance.data.tokens import conversations
from appliance.errors import ApplianceError, InvalidInput
from appliance.home import Home, write_json


def preview(tokenizer: Any, row: Row) -> list[dict[str, Any]]:
    """The examples that `row` is trained as.

    Each is {"tokens", "trained", "pieces"}, or {"problem"} where it cannot be trained on; a piece is a text of tokens
    that are alike: {"text", "trained", "special"}.
    """
    found: list[dict[str, Any]] = []
    for messages in conversations(row):
        try:
            examples = render_conversation(tokenizer, messages, row.get("tools"))
        except InvalidInput as error:
            found.append({"problem": error.message})
            continue
        found += [
            {"tokens": len(one.input_ids), "trained": sum(one.trained), "pieces": _pieces(tokenizer, one)}
            for one in examples
        ]
    return found


def _pieces(tokenizer: Any, rendered: Rendered) -> list[dict[str, Any]]:
    special = special_ids(tokenizer)
    runs: list[tuple[bool, bool, list[int]]] = []
    for token, trained in zip(rendered.input_ids, rendered.trained, strict=True):
        like = (trained, token in special)
        if not runs or runs[-1][:2] != like:
            runs.append((*like, []))
        runs[-1][2].append(token)
    return [
        {"text": tokenizer.decode(ids, clean_up_tokenization_spaces=False), "trained": trained, "special": special}
        for trained, special, ids in runs
    ]


def main(home_root: Path, request: Path, result: Path) -> None:
    """Leave {"rows"}, one list of examples a row, or {"problem"} in `result`."""
    asked = PreviewRequest.model_validate_json(request.read_bytes())
    try:
        dataset, tokenizer = Dataset.open(Home(home_root), asked.dataset), load_tokenizer(asked.base)
        rows = dataset.rows[asked.offset : asked.offset + asked.limit]
        outcome: dict[str, Any] = {"rows": [preview(tokenizer, row) for row in rows]}
    except ApplianceError as error:
        outcome = {"problem": error.problem()}
    write_json(result, outcome)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
