"""Feedback on an answer."""

from __future__ import annotations

import re
from typing import Any

from appliance.traffic import Remark
from serve.wire.errors import ChatError
from serve.wire.fields import unknown

PATH = "/v1/feedback"

_EXPECTED = {
    "id": "the id of an answer",
    "rating": '"good" or "bad"',
    "correction": "a text that is not empty",
    "comment": "a text that is not empty",
}


def read_feedback(request: dict[str, Any]) -> Remark:
    """What a request says about an answer; a correction without a rating says that it was bad. Raises ChatError."""
    for name, value in request.items():
        if name not in _EXPECTED:
            raise unknown(name, _EXPECTED)
        if not (value is None or _is_text(value)) or (name == "rating" and value not in ("good", "bad", None)):
            raise ChatError(400, f"'{name}' must be {_EXPECTED[name]}", code="invalid_value", param=name)
    said = {name: value for name, value in request.items() if value is not None}
    for name, missing in (("id", "id" not in said), ("rating", said.keys().isdisjoint({"rating", "correction"}))):
        if missing:
            raise ChatError(400, f"'{name}' is missing", code="missing_parameter", param=name)
    return Remark(**{"rating": "bad", **said})


def _is_text(value: Any) -> bool:
    """Whether it is a text with something in it that can be stored: no half of a surrogate pair."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)
